"""Shards hold the images of a folder, survive a kill, and are read in exact epochs."""

import gc
import json
import shutil
import signal
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_modules.cli.main import main
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.data.samplers import SampleKey, ShardSampler
from lightning_modules.data.shards import writer
from lightning_modules.data.shards.reader import open_shards, verify_shards
from lightning_modules.data.shards.writer import make_shards
from lightning_modules.data.splits import open_split
from tests.helpers.paths import PROGRAMS
from tests.helpers.processes import start_python
from tests.helpers.ranks import on_rank

SPLITS = {"train": {"cat": 12, "dog": 11}, "val": {"cat": 4, "dog": 3}}


@pytest.fixture
def folder(make_folder):
    return make_folder(SPLITS, size=(9, 8))


@pytest.fixture
def shards(folder, tmp_path):
    make_shards(folder, tmp_path / "shards", images_per_shard=5)
    return tmp_path / "shards"


def module(root, rank=0, processes=1, **options):
    defaults = {"batch_size": 2, "input_size": 8, "num_workers": 0, "seed": 1, "dataset": "wds"}
    data = on_rank(ImageDataModule(str(root), **{**defaults, **options}), rank, processes)
    data.setup("fit")
    return data


def by_library(urls):
    """All samples of some shards, as the WebDataset library reads them."""
    webdataset = pytest.importorskip("webdataset", reason="needs the extra `shards`")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        gc.collect()
    return samples


def contents(root, split):
    """File contents and class names below a split of the folder."""
    return Counter((p.read_bytes(), p.parent.name) for p in (root / split).rglob("*.png"))


def files_of(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# --- what is written


def test_every_image_once_as_the_webdataset_library_reads_it(folder, shards):
    manifest = json.loads((shards / "_info.json").read_text())
    assert manifest["classes"] == ["cat", "dog"]
    for split, source in (("train", "train"), ("validation", "val")):
        described = manifest["splits"][split]
        urls = [str(shards / name) for name in described["filenames"]]
        samples = by_library(urls)
        found = Counter((s["png"], manifest["classes"][int(s["cls"])]) for s in samples)
        assert found == contents(folder, source)
        assert described["num_samples"] == sum(described["shard_lengths"]) == len(samples)
        for sample in samples:
            original = folder / source / json.loads(sample["json"])["filename"]
            assert original.read_bytes() == sample["png"]


def test_random_access_gives_the_same_as_the_library(shards):
    dataset = open_shards(shards, "train")
    urls = sorted(str(path) for path in shards.glob("train-*.tar"))
    samples = by_library(urls)
    assert len(dataset) == len(samples) == 23
    for index, sample in enumerate(samples):
        file, target = dataset.reader[index]
        assert (file.read(), target) == (sample["png"], int(sample["cls"]))


@pytest.mark.filterwarnings("ignore")
def test_timms_own_reader_understands_the_manifest(shards):
    from timm.data import create_dataset

    dataset = create_dataset("wds/", str(shards), split="validation", is_training=False)
    assert sorted(target for _, target in dataset) == [0] * 4 + [1] * 3
    del dataset
    gc.collect()  # it leaves its files open: have that warned about here and now


def test_training_images_are_mixed_and_validation_images_are_not(shards):
    first = [open_shards(shards, "train").reader[index][1] for index in range(5)]
    assert 0 < sum(first) < 5
    assert [open_shards(shards, "validation").reader[i][1] for i in range(7)] == [0] * 4 + [1] * 3


# --- stopping and continuing


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_stopped_run_continues_and_ends_with_the_same_bytes(
    folder, shards, tmp_path, monkeypatch, stop
):
    target, done = tmp_path / "again", []
    write = writer._write

    def fail(*arguments):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(write(*arguments))

    monkeypatch.setattr(writer, "_write", fail)
    with pytest.raises(KeyboardInterrupt):
        make_shards(folder, target, images_per_shard=5)
    assert not target.exists()
    (partial,) = tmp_path.glob("again.partial-*")
    kept = {p.name: p.stat().st_mtime_ns for p in partial.glob("*.tar")}
    assert len(kept) == stop
    monkeypatch.setattr(writer, "_write", write)
    make_shards(folder, target, images_per_shard=5)
    assert all((target / name).stat().st_mtime_ns == when for name, when in kept.items())
    assert files_of(target) == files_of(shards)
    assert not partial.exists()


@pytest.mark.slow
def test_killed_in_the_middle(make_folder, tmp_path):
    """SIGKILL at several moments, then the same command until it ends."""
    root = make_folder({"train": {"a": 60, "b": 60}, "val": {"a": 2, "b": 2}}, "big", (60, 60))
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    make_shards(root, complete, images_per_shard=4)
    kills = 0
    for shards_before in (0, 3, 9):
        process = start_python(PROGRAMS / "slow_shards.py", root, killed)
        while process.poll() is None:
            if len(list(tmp_path.glob("killed.partial-*/*.tar"))) > shards_before:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 3
    assert not killed.exists()
    make_shards(root, killed, images_per_shard=4)
    assert files_of(killed) == files_of(complete)


def test_an_empty_current_folder_is_filled(folder, shards, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make_shards(folder, ".", images_per_shard=5)
    assert files_of(tmp_path / "here") == files_of(shards)


def test_finished_shards_are_left_alone(folder, shards):
    before = {p.name: p.stat().st_mtime_ns for p in shards.iterdir()}
    assert make_shards(folder, shards, images_per_shard=5).splits["train"].num_samples == 23
    assert {p.name: p.stat().st_mtime_ns for p in shards.iterdir()} == before


@pytest.mark.parametrize("options", [{"images_per_shard": 6}, {"seed": 1}])
def test_other_shards_are_not_mixed(folder, shards, options):
    before = files_of(shards)
    with pytest.raises(FileExistsError, match="holds something else than these shards"):
        make_shards(folder, shards, **{"images_per_shard": 5, **options})
    assert files_of(shards) == before


def test_folder_with_other_files_is_refused(folder):
    before = files_of(folder)
    with pytest.raises(FileExistsError, match="holds something else"):
        make_shards(folder, folder)
    assert files_of(folder) == before


def test_images_per_shard_must_be_positive(folder, tmp_path):
    with pytest.raises(ValueError, match="images_per_shard=0"):
        make_shards(folder, tmp_path / "none", images_per_shard=0)


def test_classes_are_checked_before_anything_is_written(make_folder, tmp_path):
    root = make_folder({"train": {"a": 2, "b": 2}, "val": {"a": 2, "c": 1}})
    with pytest.raises(ValueError, match="'c'"):
        make_shards(root, tmp_path / "none")
    assert not list(tmp_path.glob("none*"))


# --- verification


def _flip(path):
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "train-000000.tar has another checksum": _flip,
    "train-000001.tar has .* bytes, not": lambda path: path.write_bytes(path.read_bytes()[:-512]),
    "train-000002.tar is missing": Path.unlink,
    "train.index.npy is missing or damaged": _flip,
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_damage_is_named_by_verification_and_before_training(shards, fault):
    """Training does not read everything first: a flipped bit is for `--verify`."""
    verify_shards(shards)
    DAMAGES[fault](shards / fault.split(" ")[0])
    with pytest.raises(ValueError, match=fault):
        verify_shards(shards)
    if "checksum" not in fault:
        with pytest.raises(ValueError, match=fault):
            module(shards)


def test_a_manifest_cannot_name_files_elsewhere(shards):
    path = shards / "_info.json"
    path.write_text(path.read_text().replace("train-000000.tar", "../train-000000.tar"))
    with pytest.raises(ValueError, match="leads elsewhere"):
        module(shards)


def test_a_folder_without_shards_is_refused(folder):
    with pytest.raises(ValueError, match=r"_info\.json' is not a manifest"):
        verify_shards(folder)


def test_command_line(folder, tmp_path, capsys):
    target = str(tmp_path / "out")
    main(["shards", str(folder), target, "--images_per_shard", "10"])
    assert "train: 23 images of 2 classes in 3 shards" in capsys.readouterr().out
    main(["shards", "--verify", target])
    assert "as written" in capsys.readouterr().out
    next(Path(target).glob("*.tar")).unlink()
    with pytest.raises(SystemExit, match="2"):
        main(["shards", "--verify", target])
    assert "is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["shards", target])
    assert "required: destination" in capsys.readouterr().err


# --- reading them for training


def test_batches_are_those_of_the_folder(folder, shards):
    """The same images and classes, whatever the storage; validation in the same order."""
    data = module(shards)
    assert data.class_names == ["cat", "dog"]
    pairs = zip(data.val_dataloader(), module(folder, dataset="").val_dataloader(), strict=True)
    for (images, targets), (expected, labels) in pairs:
        assert torch.equal(images, expected)
        assert torch.equal(targets, labels)
    train = Counter(t for _, batch in data.train_dataloader() for t in batch.tolist())
    assert sum(train.values()) == 22  # the last incomplete batch is left out


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards, workers):
    alone, several = module(shards), module(shards, num_workers=workers)
    for (images, targets), (expected, labels) in zip(
        several.train_dataloader(), alone.train_dataloader(), strict=True
    ):
        assert torch.equal(images, expected)
        assert torch.equal(targets, labels)


@pytest.mark.parametrize(("processes", "workers"), [(2, 0), (3, 2)])
def test_every_validation_image_once_over_ranks_and_workers(shards, processes, workers):
    targets = []
    for rank in range(processes):
        data = module(shards, rank, processes, num_workers=workers)
        targets += [t for _, batch in data.val_dataloader() for t in batch.tolist()]
    assert sorted(targets) == [0] * 4 + [1] * 3


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_epochs_are_equally_long_and_complete(processes):
    lengths = [5, 5, 5, 5, 3]
    for epoch in (0, 1):
        shares = []
        for rank in range(processes):
            sampler = ShardSampler(range(23), lengths, 7, processes, rank, window=6)
            sampler.set_epoch(epoch)
            shares.append(list(sampler))
            assert len(sampler) == len(shares[-1])
        assert len({len(share) for share in shares}) == 1
        keys = [key for share in shares for key in share]
        assert {key.position for key in keys} == set(range(23))
        assert len(keys) - 23 < processes  # padding only
        assert {key.epoch for key in keys} == {epoch}


def test_order_changes_with_the_epoch_and_can_be_resumed():
    sampler = ShardSampler(range(40), [8] * 5, 3, window=16)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert [k.position for k in first] != [k.position for k in second]
    sampler.start = 7
    assert list(sampler) == second[7:]
    assert second[0] == SampleKey(1, second[0].position)


def test_shards_are_read_in_turn_and_each_process_reads_its_own():
    """With a window of two shards no more than three are open, and none comes back later."""
    lengths = [10] * 20
    shards_of = []
    for rank in (0, 1):
        order = [k.position // 10 for k in ShardSampler(range(200), lengths, 0, 2, rank, window=20)]
        for start in range(0, 100, 20):
            assert len(set(order[start : start + 20])) <= 2
        assert len({tuple(order[i : i + 10]) for i in range(0, 100, 10)}) == 10  # mixed within
        shards_of.append(set(order))
    assert not shards_of[0] & shards_of[1]


def test_unknown_split_lists_those_there_are(shards):
    with pytest.raises(ValueError, match=r"no split 'extra'.*train, validation"):
        open_split("wds", shards, "extra", None)


def test_broken_image_in_a_shard_is_named(folder, tmp_path):
    (folder / "val/cat/2.png").write_bytes(b"no image")
    make_shards(folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"000000002 in .*validation-000000\.tar"):
        list(module(tmp_path / "out").val_dataloader())


def test_training_from_the_command_line(folder, shards, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = "--model.model test_byobnet --data.batch_size 4 --data.input_size 32"
    quick = "--trainer.fast_dev_run true --trainer.accelerator cpu --data.num_workers 0"
    source = ["--data.dataset", "wds", "--data.root", str(shards)]
    main(["fit", *source, *options.split(), *quick.split()])
    assert "2 classes" in capsys.readouterr().out


def test_uppercase_and_jpeg_suffixes_are_those_that_timm_looks_for(tmp_path):
    root = tmp_path / "photos"
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(root / split / "a" / "x.JPEG")
    make_shards(root, tmp_path / "out")
    (sample,) = by_library([str(tmp_path / "out/train-000000.tar")])
    assert "jpg" in sample
    shutil.rmtree(root)  # the shards need it no more
    assert open_shards(tmp_path / "out", "train")[0][0].size == (4, 4)
