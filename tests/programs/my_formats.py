"""A format of a user's own: folded weights as a NumPy archive, run by a reader of a few lines.

`--imports '[my_formats]' --checkpoint.formats '[weights]'`. It can hold networks of plain
convolutions in a row, such as a folded `my_repvgg`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mobileone.export import FORMATS, Format, normalize


def write(network, spec, path, metadata):
    arrays = {}
    for index, layer in enumerate(m for m in network.modules() if isinstance(m, nn.Conv2d)):
        arrays[f"weight{index}"], arrays[f"bias{index}"] = layer.weight, layer.bias
        arrays[f"stride{index}"] = torch.tensor(layer.stride)
    (linear,) = (m for m in network.modules() if isinstance(m, nn.Linear))
    np.savez(path, head=linear.weight, offset=linear.bias, **arrays)


def runner(path, spec):
    with np.load(path) as archive:
        arrays = {name: torch.from_numpy(archive[name]) for name in archive.files}

    def run(images):
        x, index = normalize(images, spec), 0
        while f"weight{index}" in arrays:
            stride = arrays[f"stride{index}"].tolist()
            x = F.conv2d(x, arrays[f"weight{index}"], arrays[f"bias{index}"], stride, padding=1)
            x, index = x.relu(), index + 1
        return x.mean((2, 3)) @ arrays["head"].T + arrays["offset"]

    return run


FORMATS["weights"] = Format("model.npz", write, runner)
