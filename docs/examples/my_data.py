"""A dataset of your own; `mobileone fit --data.dataset my_data:make_split`."""

from torchvision.datasets import ImageFolder


def make_split(root, split):  # split is "train", "val" or "test"
    return ImageFolder(root / split) if split != "test" else None  # None: test on val
