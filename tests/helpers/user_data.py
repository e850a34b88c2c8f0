"""Datasets as a user would write them, named by `--data.dataset tests.helpers.user_data:NAME`."""

import gc
import multiprocessing
import sys
import threading
from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

not_callable = 3


class Paths:
    """The images of a split of a folder by path, with no other base class than object."""

    def __init__(self, root: Path, split: str) -> None:
        self.classes = sorted(path.name for path in (root / split).iterdir())
        self.samples = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((root / split / name).iterdir())
        ]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def make_paths(root, split):
    return Paths(root, split) if (root / split).exists() else None


def make_images(root, split):
    return ImageFolder(root / split) if (root / split).exists() else None


def make_without_split(root):
    return ImageFolder(root / "train")


def make_nothing(root, split):
    return None


def make_nameless(root, split):
    return [(path, 0) for path in (root / split).rglob("*.png")]


def make_tensors(root, split):
    data = make_paths(root, split)
    data.samples = [(pil_to_tensor(Image.open(path)), label) for path, label in data.samples]
    return data


def make_text_labels(root, split):
    data = make_paths(root, split)
    data.samples = [(path, data.classes[label]) for path, label in data.samples]
    return data


def make_gone(root, split):
    data = make_paths(root, split)
    data.samples = [(path.with_name("gone.png"), label) for path, label in data.samples]
    return data


class _Mistaken(Paths):
    def __getitem__(self, index):
        return super().__getitem__(index) if index == 0 else self.no_such_attribute


def make_mistake(root, split):
    return _Mistaken(root, split)


def make_late_error(root, split):
    data = make_paths(root, split)
    data.samples[-1] = (data.samples[-1][0], 2)
    return data


LOCK = threading.Lock()


class _Locked(Paths):
    def __getitem__(self, index):
        with LOCK:
            return super().__getitem__(index)


def make_locked(root, split):
    return _Locked(root, split)


def make_local(root, split):
    class Local(Paths):
        pass

    return Local(root, split)


class _OfImports(Paths):
    """Images that only a module that `--imports` names can read."""

    def __getitem__(self, index):
        assert "tests.helpers.apple" in sys.modules
        return super().__getitem__(index)


class _OfServer(Paths):
    """Images that only a worker that shares the fork server's memory reads."""

    def __getitem__(self, index):
        if multiprocessing.parent_process():
            assert gc.get_freeze_count() > 10_000
            assert "PIL.WebPImagePlugin" in sys.modules and "PIL.EpsImagePlugin" not in sys.modules
        return super().__getitem__(index)


def make_of_server(root, split):
    return _OfServer(root, split)


def make_of_imports(root, split):
    return _OfImports(root, split)
