"""The handwritten digits as a folder of images."""

import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from lightning_modules.data import digits
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.data.digits import cache_root, digits_root, write_digits


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache") / "digits"
    write_digits(root)
    return root


@pytest.fixture
def copy(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "digits"))


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_every_digit_is_there_once_in_the_right_place(written):
    labels = load_digits().target
    paths = list(written.glob("*/*/*.png"))
    assert Counter(path.parts[-3] for path in paths) == {"train": 1437, "val": 360}
    assert sorted(int(path.stem) for path in paths) == list(range(1797))
    assert all(path.parts[-2] == str(labels[int(path.stem)]) for path in paths)
    for split, size in (("train", 1437), ("val", 360)):
        counts = Counter(path.parts[-2] for path in paths if path.parts[-3] == split)
        for label in range(10):
            share = (labels == label).mean() * size
            assert abs(counts[str(label)] - share) <= 1


def test_pixels_are_the_scan_enlarged(written):
    images, _ = load_digits(return_X_y=True)
    at = (np.arange(32) + 0.5) / 4 - 0.5  # the center of each new pixel among the old ones
    weights = np.stack([np.interp(at, np.arange(8), row) for row in np.eye(8)], axis=1)  # (32, 8)
    for path in sorted(written.glob("*/*/*.png"))[::97]:
        scan = images[int(path.stem)].reshape(8, 8) * 255 / 16
        with Image.open(path) as image:
            assert image.mode == "L"
            np.testing.assert_allclose(np.asarray(image), weights @ scan @ weights.T, atol=1.5)


def test_second_call_writes_nothing(copy, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    monkeypatch.setattr(digits, "_render", lambda: pytest.fail("must not render again"))
    write_digits(copy)
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before


def test_what_is_missing_is_written_again_and_other_files_are_kept(copy, written):
    next(copy.glob("train/3/*.png")).unlink()
    (copy / "notes.txt").write_text("mine")
    write_digits(copy)
    assert contents(copy) == {**contents(written), "notes.txt": b"mine"}


def test_interrupted_write_is_completed(tmp_path, written, monkeypatch):
    atomic_write, calls = digits.atomic_write, []

    def fail_later(path):
        calls.append(path)
        if len(calls) == 50:
            raise KeyboardInterrupt
        return atomic_write(path)

    root = tmp_path / "digits"
    monkeypatch.setattr(digits, "digits_root", lambda: root)  # as the cache folder
    monkeypatch.setattr(digits, "atomic_write", fail_later)
    with pytest.raises(KeyboardInterrupt):
        write_digits(root)
    monkeypatch.setattr(digits, "atomic_write", atomic_write)
    write_digits(root)
    assert contents(root) == contents(written)


def test_concurrent_writers(tmp_path, written, monkeypatch):
    root = tmp_path / "digits"
    monkeypatch.setattr(digits, "digits_root", lambda: root)
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(write_digits, root) for _ in range(4)]:
            future.result()
    assert contents(root) == contents(written)


def test_other_peoples_folders_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"")
    with pytest.raises(FileExistsError, match="not a copy of the digits"):
        write_digits(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["photo.png"]  # noqa: PTH208


def test_where_the_cache_is(monkeypatch):
    monkeypatch.delenv("MOBILEONE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert digits_root() == Path("/xdg/mobileone-lightning/digits")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path("~/.cache/mobileone-lightning").expanduser()
    monkeypatch.setenv("MOBILEONE_CACHE", "/own")
    assert digits_root() == Path("/own/digits")
    assert digits_root("/given") == Path("/given")


def test_data_module_reads_them(written, monkeypatch):
    monkeypatch.setenv("MOBILEONE_CACHE", str(written.parent))
    data = ImageDataModule(dataset="digits", input_size=(1, 32, 32), num_workers=0, batch_size=64)
    assert data.class_names == [str(digit) for digit in range(10)]
    data.setup("fit")
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (64, 1, 32, 32)
    assert len(set(targets.tolist())) == 10
    assert len(data.val_dataloader().dataset) == 360
