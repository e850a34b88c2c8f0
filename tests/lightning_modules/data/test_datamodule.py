"""Splits, classes, transforms and errors of the data module."""

import gc
import inspect
import io
import math
import multiprocessing
import os
import signal
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from docstring_parser import parse
from PIL import EpsImagePlugin, Image
from timm.data.readers.reader import Reader
from timm.data.readers.shared_count import SharedCount

from lightning_modules.data import splits as splits_module
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.data.image_io import IMAGE_SUFFIXES, read_image
from lightning_modules.data.protocol import check_data_module, in_chans, num_classes
from lightning_modules.data.samplers import SampleKey
from lightning_modules.data.shards.writer import make_shards
from lightning_modules.errors import UnreadableImageError
from tests.helpers.paths import PROGRAMS
from tests.helpers.processes import run_python, start_python


def module(root, **options):
    defaults = {"batch_size": 2, "input_size": 16, "num_workers": 0}
    return ImageDataModule(str(root), **{**defaults, **options})


def ready(root, stage="fit", **options):
    data = module(root, **options)
    data.setup(stage)
    return data


def as_shards(root):
    folder = root.with_name(f"{root.name}-shards")
    make_shards(root, folder)
    return {"root": folder, "dataset": "wds"}


# the same images in every way that they may be stored -> options
STORAGES = {
    "folder": lambda root: {"root": root},
    "function": lambda root: {"root": root, "dataset": "tests.helpers.user_data:make_paths"},
    "shards": as_shards,
}


# --- layout and classes


def test_folders(pets):
    data = ready(pets)
    assert check_data_module(data).class_names == ["cat", "dog"]
    assert (num_classes(data), in_chans(data)) == (2, 3)
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert len(data.train_dataloader()) == 5
    assert [t for _, batch in data.val_dataloader() for t in batch.tolist()] == [0, 0, 1, 1]


def test_classes_are_known_before_setup(pets):
    assert module(pets).class_names == ["cat", "dog"]


@pytest.mark.parametrize("name", ["val", "validation", "valid", "eval"])
def test_names_of_the_validation_folder(make_folder, name):
    root = make_folder({"train": {"a": 2}, name: {"a": 3}})
    assert len(ready(root).val_dataloader().dataset) == 3


@pytest.mark.parametrize("storage", STORAGES)
def test_test_images_are_used_if_there_are_any(make_folder, pets, storage):
    splits = {"train": {"a": 2, "b": 2}, "val": {"a": 1, "b": 1}, "test": {"b": 5}}
    for root, expected in ((pets, [0, 0, 1, 1]), (make_folder(splits, "three"), [1] * 5)):
        data = ready(stage="test", **STORAGES[storage](root))
        assert [t for _, batch in data.test_dataloader() for t in batch.tolist()] == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tar_files(pets):
    for split in ("train", "val"):
        with tarfile.open(pets / f"{split}.tar", "w") as tar:
            for path in (pets / split).rglob("*.png"):
                tar.add(path, path.relative_to(pets / split))
                path.unlink()
        for folder in (pets / split).iterdir():
            folder.rmdir()
        (pets / split).rmdir()
    data = ready(pets, dataset="tar")
    assert data.class_names == ["cat", "dog"]
    assert len(data.train_dataloader().dataset) == 10
    assert [t for _, batch in data.val_dataloader() for t in batch.tolist()] == [0, 0, 1, 1]
    del data
    gc.collect()  # timm's reader leaves the tars open: have that warned about here and now


def test_natural_order_with_ties_decided(make_folder):
    labels = ("10", "2", "1", "01")
    root = make_folder({split: dict.fromkeys(labels, 1) for split in ("train", "val")})
    data = ready(root)
    assert data.class_names == ["01", "1", "2", "10"]
    files = [path for path, _ in data.val_dataloader().dataset.source.reader.samples]
    targets = [t for _, batch in data.val_dataloader() for t in batch.tolist()]
    assert [data.class_names[t] for t in targets] == [Path(path).parent.name for path in files]


@pytest.mark.parametrize("storage", STORAGES)
def test_class_file_fixes_the_order_in_both_splits(pets, tmp_path, storage):
    file = tmp_path / "classes.txt"
    file.write_text("dog\ncat\n")
    options = {**STORAGES[storage](pets), "classes": str(file)}
    data = ready(**options)
    assert data.class_names == ["dog", "cat"]
    assert [t for _, batch in data.val_dataloader() for t in batch.tolist()] == [1, 1, 0, 0]
    file.write_text("dog\n")
    with pytest.raises(ValueError, match=r"train has classes.*'cat'"):
        ready(**options)


def test_evaluation_without_training_images(pets, make_folder):
    root = make_folder({"val": {"a": 1, "b": 1}}, "only_val")
    with pytest.warns(UserWarning, match="no training images"):
        assert ready(root, "validate").class_names == ["a", "b"]


def test_torchvision_dataset(tmp_path):
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("L", (9, 9), 80).save(tmp_path / split / label / "0.png")
    data = ready(tmp_path, dataset="torch/image_folder", train_split="train", val_split="val")
    assert next(iter(data.val_dataloader()))[0].shape == (2, 3, 16, 16)


# --- errors before anything long


def test_root_is_needed():
    with pytest.raises(ValueError, match=r"root is not set.*--data\.root.*--data\.dataset"):
        ImageDataModule()


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"images": {"cat": 1}, "labels": {"x": 1}}, r"no split 'train'.*found images/, labels/"),
        ({"train": {"cat": 1}}, r"no split 'validation'.*found train/"),
        ({"train": {"a": 0}, "val": {"a": 0}}, "Found 0 images"),
        ({"train": {"a": 1, "c": 1}, "val": {"a": 1, "b": 1, "c": 1}}, r"val has classes.*'b'"),
        ({"train": {"a": 1, "b": 1}, "val": {"b": 1}}, r"val has no images of 'a'"),
    ],
)
def test_splits_that_do_not_fit(make_folder, splits, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        ready(make_folder(splits))


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class(pets, split):
    (pets / split / "hamster").mkdir()
    with pytest.raises(ValueError, match=f"{split}: no images in 'hamster'"):
        ready(pets)


def test_class_missing_from_validation_when_it_is_the_test(make_folder):
    root = make_folder({"train": {"a": 2, "b": 2}, "val": {"b": 1}})
    with pytest.raises(ValueError, match=r"val has no images of 'a'"):
        ready(root, "test")
    with pytest.raises(ValueError, match=r"val has no images of 'a'"):
        ready(root, "test", val_split="validation", test_split="val")
    (root / "val").rename(root / "test")  # a test set of its own may lack classes
    assert len(ready(root, "test").test_dataloader().dataset) == 1


def test_class_file_must_match_the_folders(pets, tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("cat\n")
    with pytest.raises(ValueError, match=r"train has classes.*'dog'"):
        ready(pets, classes=str(file))
    file.write_text("cat\ndog\nfish\n")
    with pytest.raises(ValueError, match=r"train has no images of 'fish'"):
        ready(pets, classes=str(file))
    file.write_text("cat\ncat\n")
    with pytest.raises(ValueError, match="repeats 'cat'"):
        ready(pets, classes=str(file))
    with pytest.raises(FileNotFoundError, match="not a file"):
        ready(pets, classes=str(tmp_path / "none.txt"))


def test_images_outside_class_folders(pets):
    Image.new("RGB", (4, 4)).save(pets / "train" / "loose.png")
    with pytest.raises(ValueError, match=r"images in no folder of a class: .loose\.png"):
        ready(pets)


def test_hidden_folder_is_no_class(pets):
    (pets / "train" / ".ipynb_checkpoints").mkdir()
    ready(pets)
    Image.new("RGB", (4, 4)).save(pets / "train" / ".ipynb_checkpoints" / "0.png")
    with pytest.raises(ValueError, match=r"hidden folders.*ipynb_checkpoints"):
        ready(pets)


def test_batch_larger_than_the_data(pets):
    message = r"batch_size=11 is larger than the 10 training images.*--data\.batch_size"
    with pytest.raises(ValueError, match=message):
        ready(pets, batch_size=11)
    ready(pets, "validate", batch_size=11)
    assert len(ready(pets, batch_size=11, drop_last=False).train_dataloader()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "mobileone_s9"}, r"mobileone_s9.*mobileone_s"),
        ({"root": "nowhere"}, r"nowhere' does not exist.*train/<class>"),
        ({"dataset": "imagenett"}, "dataset='imagenett' is unknown"),
        ({"dataset": "torch/nothing"}, "Unknown torchvision dataset nothing"),
        ({"auto_augment": "rand-m9-q"}, "has the part 'q', which has no number"),
        ({"auto_augment": "original-m9"}, "Unknown AutoAugment config section"),
        ({"auto_augment": "nope"}, "{.*'auto_augment': 'nope'.*rand-m9"),
        ({"auto_augment": "v0", "input_size": (4, 8, 8), "mean": (0,), "std": (1,)}, "RGBA"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"input_size": (2, 8, 8)}, "in_chans=2"),
        ({"in_chans": 2}, "in_chans=2"),
        ({"in_chans": 1, "input_size": (3, 8, 8)}, "two numbers of channels"),
        ({"input_size": 0}, "input_size="),
        ({"input_size": (4, 8, 8)}, r"mean=.* 3 values for 4"),
        ({"mean": (0.5, 0.5)}, "2 values for 3"),
        ({"crop_pct": 1.5}, "crop_pct=1.5"),
        ({"interpolation": "cubic"}, "interpolation='cubic' must be one of nearest"),
        ({"crop_mode": "middle"}, "crop_mode='middle'"),
    ],
)
def test_bad_arguments(pets, options, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        ready(**{"root": pets, **options})


def test_package_of_the_reader_is_missing(monkeypatch):
    def unavailable(*args, **kwargs):
        raise ImportError("No module named 'datasets'")

    monkeypatch.setattr("lightning_modules.data.splits.create_dataset", unavailable)
    with pytest.raises(ImportError, match=r"dataset='hfds/mnist' needs a package.*`datasets`"):
        ImageDataModule(dataset="hfds/mnist").setup("fit")


# --- unreadable images


@pytest.fixture
def broken(pets):
    """Training images of which the first of each class is truncated."""
    for label in ("cat", "dog"):
        path = pets / "train" / label / "0.png"
        path.write_bytes(path.read_bytes()[:200])
    return pets


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(broken, workers):
    loader = ready(broken, num_workers=workers, batch_size=10).train_dataloader()
    before = set(multiprocessing.active_children())
    with pytest.raises(
        UnreadableImageError, match=r"train/(cat|dog)/0\.png.*--data\.skip_unreadable true"
    ):
        list(loader)
    assert set(multiprocessing.active_children()) <= before  # nothing is left to wait for


def test_a_signal_to_all_processes_does_not_end_the_workers(pets):
    """`timeout` and systemd send it to the process group: the run decides where it stops."""
    data = ready(pets, num_workers=1, batch_size=1)
    loader = data.train_dataloader()
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    server = Path(f"/proc/{worker.pid}/stat").read_text().split()[3]  # its parent
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(worker.pid, number)
        os.kill(int(server), number)
    assert len(list(batches)) == len(loader) - 1
    assert int(server) != os.getpid()
    assert list(data.val_dataloader())  # the server still starts workers


def test_processes_of_the_user_s_own_get_the_signals_and_no_import_of_ours(pets):
    """They come from the one fork server of `multiprocessing`, whichever is started first."""
    loader = ready(pets, num_workers=1, batch_size=1).train_dataloader()
    assert next(iter(loader))
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        mask = pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, []).result()
        names = pool.submit(eval, "list(__import__('sys').modules)").result()
    assert mask == signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert "lightning_modules.data.dataset" not in names


PLAIN = """
from torch.utils.data import DataLoader
from lightning_modules.data.workers import worker_options
print("numbers:", len(list(DataLoader(range(3), **worker_options(1)))))
"""
OWN_CLASS = """
from torch.utils.data import DataLoader, Dataset
from lightning_modules.data.workers import worker_options

class Numbers(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return index

if __name__ == "__main__":
    print("numbers:", len(list(DataLoader(Numbers(), **worker_options(1)))))
"""


@pytest.mark.parametrize("text", [PLAIN, OWN_CLASS], ids=["no_guard", "own_class"])
def test_a_program_runs_once_and_may_bring_a_class(text, tmp_path):
    (tmp_path / "program.py").write_text(text)
    assert run_python(tmp_path / "program.py").stdout == "numbers: 3\n"


@pytest.mark.parametrize("dataset", ["", "tests.helpers.user_data:make_paths"])
def test_a_named_pipe_among_the_images_is_not_waited_for(pets, dataset):
    path = pets / "train/cat/1.png"
    path.unlink()
    os.mkfifo(path)
    loader = ready(pets, batch_size=10, dataset=dataset).train_dataloader()
    with pytest.raises(UnreadableImageError, match=r"cat/1\.png.*it is a named pipe"):
        list(loader)


def test_a_picture_that_is_a_program_is_not_run(pets, monkeypatch):
    """PostScript under a picture's name: Pillow would start Ghostscript."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a))
    path = pets / "train/cat/0.png"
    Image.new("RGB", (8, 8)).save(path, format="EPS")
    loader = ready(pets, batch_size=10).train_dataloader()
    with pytest.raises(UnreadableImageError, match=r"cat/0\.png.* not an image of a known format"):
        list(loader)
    assert not started


def test_every_format_that_is_named_is_read(tmp_path):
    kinds = dict(
        zip(IMAGE_SUFFIXES, "PNG JPEG JPEG WEBP BMP TIFF TIFF GIF PPM PPM".split(), strict=True)
    )
    for suffix, kind in kinds.items():
        file = io.BytesIO()
        Image.new("L" if suffix == ".pgm" else "RGB", (4, 4)).save(file, format=kind)
        assert read_image(file, "RGB").size == (4, 4), suffix


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_and_reported_once_a_pass(broken, workers):
    loader = ready(broken, num_workers=workers, skip_unreadable=True).train_dataloader()
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"2 unreadable.*cat/0\.png.*dog/0\.png") as caught:
            batches = list(loader)
        assert len(caught) == 1
        assert sum(len(targets) for _, targets in batches) == 10


def test_report_comes_with_the_last_batch(broken):
    """A consumer that counts batches, as Lightning does, never asks for one more."""
    loader = ready(broken, skip_unreadable=True).train_dataloader()
    with pytest.warns(UserWarning, match="2 unreadable"):
        iterator = iter(loader)
        for _ in range(len(loader)):
            next(iterator)


def test_report_comes_when_a_pass_is_cut_short(broken):
    loader = ready(broken, skip_unreadable=True, batch_size=4).train_dataloader()
    assert len(loader) == 2
    with pytest.warns(UserWarning, match="unreadable images were replaced") as caught:
        for seed in range(20):  # one of these orders begins with a broken image
            loader.sampler.set_epoch(seed)
            iterator = iter(loader)
            next(iterator)
            iterator.close()
    assert len(caught) > 1


def test_stand_in_is_the_next_readable_image(broken):
    still = {"hflip": 0, "scale": (1, 1), "ratio": (1, 1)}
    samples = ready(broken, skip_unreadable=True, **still).train_dataloader().dataset
    sample = samples[SampleKey(0, 0)]
    assert [file.name for file in sample.skipped] == [str(broken / "train/cat/0.png")]
    assert sample.target == 0
    assert torch.equal(sample.image, samples[SampleKey(0, 1)].image)
    assert not torch.equal(sample.image, samples[SampleKey(0, 2)].image)
    assert samples[SampleKey(0, 1)].skipped == []


def test_nothing_readable(pets):
    for path in (pets / "val").rglob("*.png"):
        path.write_bytes(b"not an image")
    loader = ready(pets, skip_unreadable=True).val_dataloader()
    with pytest.raises(UnreadableImageError, match="none of the 4 images"):
        list(loader)


# --- color modes


def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    with (tmp_path / "deep.png").open("rb") as file:
        assert np.asarray(read_image(file, "L")).tolist() == [[0, 100, 255]]
    with (tmp_path / "deep.png").open("rb") as file:
        assert np.asarray(read_image(file, "RGB")).tolist() == [[[0] * 3, [100] * 3, [255] * 3]]


def test_floating_point_images_are_refused(make_folder):
    root = make_folder({"train": {"a": 1}, "val": {"a": 1}}, size=(3, 1))
    Image.fromarray(np.array([[0, 0.4, 1]], dtype=np.float32)).save(root / "train/a/x.tiff")
    data = ready(root, batch_size=2, num_workers=0)
    with pytest.raises(UnreadableImageError, match=r"x\.tiff \(its values are floating-point"):
        list(data.train_dataloader())


AUGMENTATIONS = {
    "pixel": {"re_mode": "pixel", "re_count": 2},
    "gray": {"grayscale_prob": 0.5},
    "blur": {"gaussian_blur_prob": 0.5},
    "crop": {"train_crop_mode": "rkrc"},
    "jitter": {"color_jitter_prob": 0.5},
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_any_augmentation_of_timm_acts_and_is_the_same_in_every_process(pets, name):
    """A sample is a function of (seed, epoch, index), whatever was drawn before it."""
    options = {"re_prob": 0.9, "color_jitter": 0.4, "input_size": 12, "seed": 3}
    plain, changed, workers = (
        ready(pets, augmentation_kwargs=kwargs, num_workers=count, **options)
        for kwargs, count in ((None, 0), (AUGMENTATIONS[name], 0), (AUGMENTATIONS[name], 2))
    )
    without, images, again = (
        torch.cat([images for images, _ in data.train_dataloader()])
        for data in (plain, changed, workers)
    )
    assert torch.equal(images, again)
    assert not torch.equal(images, without)
    torch.rand(3)
    samples = changed.train_dataloader().dataset
    assert torch.equal(samples[SampleKey(1, 4)].image, samples[SampleKey(1, 4)].image)


def test_a_curriculum_keeps_the_augmentation(pets):
    data = ready(pets, augmentation_kwargs={"grayscale_prob": 1.0}, std=(1.0,), mean=(0.0,))
    data.set_curriculum([(0, 8, 0.5), (1, 16, 1.0)])
    for epoch, size in ((0, 8), (1, 16)):
        image = data.train_dataloader().dataset[SampleKey(epoch, 0)].image
        assert image.shape == (3, size, size)
        assert torch.equal(image[0], image[1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gray_prob": 1}, r"has 'gray_prob', which .*Valid names: .*grayscale_prob, gaussian_"),
        ({"normalize": False}, "has 'normalize', which timm"),
        ({"hflip": 0.1}, r"set --data\.hflip in its place"),
        ({"mean": (0.0,)}, r"set --data\.mean in its place"),
        ({"re_mode": "pixel"}, r"does nothing without --data\.re_prob"),
        ({"train_crop_mode": "corner"}, "cannot build.*'train_crop_mode': 'corner'"),
    ],
)
def test_an_augmentation_that_timm_does_not_take_is_refused(pets, kwargs, message):
    with pytest.raises(ValueError, match=message):
        module(pets, augmentation_kwargs=kwargs)


def test_a_label_that_is_no_class_is_named(pets, monkeypatch):
    """In any batch, and whether or not unreadable images are skipped."""
    data = ready(pets, batch_size=2, num_workers=0, skip_unreadable=True)
    samples = data._splits.source("train").reader.samples
    samples[7] = (samples[7][0], 5)
    with pytest.raises(
        UnreadableImageError, match=r"dog/.*\.png has the label 5, and the 2 classes"
    ):
        list(data.train_dataloader())


def _cmyk(path):
    Image.new("CMYK", (5, 5), (0, 255, 255, 0)).save(path, "TIFF")


def _palette(path):
    image = Image.new("P", (5, 5), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.info["transparency"] = bytes([0, 128])
    image.save(path, "PNG")


def _rgba(path):
    Image.new("RGBA", (5, 5), (255, 0, 0, 10)).save(path, "PNG")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("write", [_cmyk, _palette, _rgba])
def test_color_modes_become_rgb(tmp_path, write):
    write(tmp_path / "image")
    with (tmp_path / "image").open("rb") as file:
        image = read_image(file, "RGB")
    assert image.mode == "RGB"
    assert image.getpixel((2, 2)) == (255, 0, 0)


def test_one_pixel_and_other_suffixes(make_folder):
    root = make_folder({"train": {"a": 1}, "val": {"a": 1}}, size=(1, 1))
    for suffix in ("webp", "bmp", "tiff", "JPG"):
        Image.new("L", (1, 1), 9).save(root / "val" / "a" / f"x.{suffix}")
    images = torch.cat([batch for batch, _ in ready(root, "validate").val_dataloader()])
    assert images.shape == (5, 3, 16, 16)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels(pets, channels):
    extra = {"mean": (0.5,), "std": (0.5,)} if channels == 4 else {}
    data = ready(pets, input_size=(channels, 12, 16), **extra)
    same = module(pets, input_size=12, in_chans=channels, **extra)
    assert same.data_config == {**data.data_config, "input_size": (channels, 12, 12)}
    whole = module(pets, input_size=None, in_chans=channels, **extra).data_config
    assert whole["input_size"] == (channels, 224, 224)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))[0].shape == (2, channels, 12, 16)
    assert len(data.data_config["mean"]) == channels


# --- transforms


def test_every_argument_has_its_own_documentation():
    """docstring-parser, and so `mobileone fit --help`, knows one name an entry only."""
    documented = {entry.arg_name for entry in parse(ImageDataModule.__doc__).params}
    arguments = set(inspect.signature(ImageDataModule.__init__).parameters) - {"self"}
    assert arguments <= documented


def test_a_network_without_a_configuration_gets_timms_default(pets, monkeypatch):
    # as `register_model` leaves one of a user's own
    monkeypatch.setattr("timm.get_pretrained_cfg", lambda name: None)
    data = ImageDataModule(str(pets), input_size=32)
    assert data.data_config == timm.data.resolve_data_config({"input_size": (3, 32, 32)})


def test_configuration_comes_from_the_model(pets):
    config = ImageDataModule(str(pets), model="mobileone_s1").data_config
    assert config["input_size"] == (3, 224, 224)
    assert config["crop_pct"] == 0.9
    assert config["interpolation"] == "bilinear"
    assert config["mean"] == (0.485, 0.456, 0.406)
    changed = ImageDataModule(str(pets), input_size=64, mean=(0.5,), crop_pct=1.0).data_config
    assert changed["input_size"] == (3, 64, 64)
    assert changed["mean"] == (0.5, 0.5, 0.5)
    assert changed["crop_pct"] == 1.0
    assert changed["std"] == (0.229, 0.224, 0.225)


def test_validation_transform_against_pillow_and_numpy(make_folder):
    root = make_folder({"train": {"a": 2}, "val": {"a": 1}}, size=(50, 37))
    data = ready(root, input_size=24, crop_pct=0.8, interpolation="bicubic")
    (batch, _), *_ = data.val_dataloader()

    image = Image.open(root / "val" / "a" / "0.png")
    short = math.floor(24 / 0.8)  # 30: the short side after the resize
    image = image.resize((int(50 * short / 37), short), Image.Resampling.BICUBIC)
    left, top = round((image.width - 24) / 2), round((image.height - 24) / 2)
    pixels = np.asarray(image, dtype=np.float64)[top : top + 24, left : left + 24] / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(batch[0].numpy(), expected.transpose(2, 0, 1), atol=1e-6)


def test_without_augmentation_options_training_only_crops_and_flips(pets):
    transform = ready(pets).train_dataloader().dataset.transform.at(0)
    names = [type(t).__name__ for t in transform.transforms]
    assert names == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "MaybeToTensor",
        "Normalize",
    ]
    bare = ready(pets, hflip=0).train_dataloader().dataset.transform.at(0).transforms
    assert "RandomHorizontalFlip" not in [type(t).__name__ for t in bare]


def test_auto_augment_and_erasing_are_passed_on(pets):
    data = ready(pets, auto_augment="original-mstd0.5", re_prob=0.5, color_jitter=0.4, vflip=0.1)
    names = [type(t).__name__ for t in data.train_dataloader().dataset.transform.at(0).transforms]
    assert {"AutoAugment", "RandomErasing", "RandomVerticalFlip"} <= set(names)


# --- streams


class _Numbers(Reader):
    """A streaming reader of ten images whose brightness is the epoch."""

    class_to_idx = {"even": 0, "odd": 1}  # noqa: RUF012

    def __init__(self, labels=2):
        super().__init__()
        self.labels = labels
        self.epoch = SharedCount()  # as timm's have it

    def set_epoch(self, epoch):
        self.epoch.value = epoch

    def __iter__(self):
        for number in range(10):
            yield Image.new("RGB", (20, 20), (self.epoch.value, 0, 0)), number % self.labels

    def __len__(self):
        return 10


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, True)])
def test_stream_hears_of_the_epoch(monkeypatch, workers, persistent):
    from lightning.fabric.utilities.data import _set_sampler_epoch
    from timm.data import IterableImageDataset

    def open_split(*args, **kwargs):
        return IterableImageDataset(None, reader=_Numbers())

    monkeypatch.setattr(splits_module, "open_split", open_split)
    data = ImageDataModule(
        dataset="wds/numbers",
        input_size=8,
        batch_size=5,
        mean=(0.0,),
        std=(1.0,),
        num_workers=workers,
        persistent_workers=persistent,
    )
    data.setup("fit")
    assert data.class_names == ["even", "odd"]
    loader = data.train_dataloader()
    assert len(loader) == 2
    for epoch in (0, 3):
        iterator = iter(loader)
        _set_sampler_epoch(loader, epoch)  # Lightning's own way, and after iter(), as it does
        images = torch.cat([images for images, _ in iterator])
        assert images.shape == (10, 3, 8, 8)
        assert (images[:, 0] * 255).round().unique().tolist() == [epoch]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_label_in_a_stream_is_refused_before_it_is_a_batch(monkeypatch, workers):
    from timm.data import IterableImageDataset

    stream = IterableImageDataset(None, reader=_Numbers(labels=3))
    monkeypatch.setattr(splits_module, "open_split", lambda *_, **__: stream)
    data = ImageDataModule(dataset="wds/numbers", input_size=8, num_workers=workers, batch_size=9)
    data.setup("fit")
    with pytest.raises(UnreadableImageError, match="image 2 of worker 0 has the label 2"):
        next(iter(data.train_dataloader()))


@pytest.mark.slow  # starts two processes
def test_processes_that_start_together_download_once(tmp_path):
    """The command asks for the classes in every process, before there is a Trainer."""
    started = [
        start_python(PROGRAMS / "download_together.py", tmp_path, rank, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in started:
        assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
    assert (tmp_path / "downloads").read_text() == "train\n"
