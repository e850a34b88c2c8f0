"""Core ML packages changed on purpose, and real images to compare them on."""

import copy

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

__all__ = [
    "declare_bgr",
    "digits",
    "edit",
    "operations_of",
    "permute_labels",
    "perturb_weight",
    "swap_channels",
]

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


def digits(count=6, size=(32, 48)):
    """Handwritten digits as 8-bit images (count, 3, *size), each channel its own digit."""
    scans = torch.from_numpy(load_digits().images[: 3 * count].copy()).float()
    scans = F.interpolate(scans.view(count, 3, 8, 8), size, mode="bilinear") * 255 / 16
    return scans.round().to(torch.uint8)


def edit(path, change):
    """Apply change(proto) to the program of a package."""
    from coremltools.proto import Model_pb2

    proto = Model_pb2.Model()
    proto.ParseFromString((path / MODEL).read_bytes())
    change(proto)
    (path / MODEL).write_bytes(proto.SerializeToString())


def operations_of(proto):
    (block,) = proto.mlProgram.functions["main"].block_specializations.values()
    return block.operations


def declare_bgr(proto):
    """Declare the image's channels in the wrong order."""
    image = proto.description.input[0].type.imageType
    image.colorSpace = image.ColorSpace.Value("BGR")


def permute_labels(proto):
    """Exchange the first two class names."""
    (classify,) = [op for op in operations_of(proto) if op.type == "classify"]
    labels = classify.inputs["classes"].arguments[0].value.immediateValue.list.values
    first, second = (copy.deepcopy(label) for label in labels[:2])
    labels[0].CopyFrom(second)
    labels[1].CopyFrom(first)


def swap_channels(network):
    """A copy of a network whose first convolution reads BGR."""
    wrong = copy.deepcopy(network)
    first = next(m for m in wrong.modules() if isinstance(m, nn.Conv2d))
    first.weight.data = first.weight.data[:, [2, 1, 0]]
    return wrong


def perturb_weight(path, tensor, which, factor):
    """Multiply one number of a tensor, as the package stores it in half precision.

    Args:
        which: The number's rank by magnitude, -1 for the largest.
    """
    stored = tensor.detach().half().numpy()
    changed = stored.copy()
    changed.flat[np.abs(stored).ravel().argsort()[which]] *= np.float16(factor)
    contents = (path / WEIGHTS).read_bytes()
    assert contents.count(stored.tobytes()) == 1
    (path / WEIGHTS).write_bytes(contents.replace(stored.tobytes(), changed.tobytes()))
