"""A file format; `mobileone export … --imports '[my_format]' --formats '[traced]'`."""

import torch

from mobileone.export import FORMATS, Format, normalize


def write(network, spec, path, metadata):  # the fused network, float32, on the CPU
    torch.jit.trace(network, torch.zeros(1, *spec.input_size)).save(path)


def load(path, spec):  # -> a function from 8-bit images (N, C, H, W) to logits
    module = torch.jit.load(path)
    return lambda images: module(normalize(images, spec))


FORMATS["traced"] = Format("model.traced.pt", write, load)
