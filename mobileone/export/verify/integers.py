"""Is an integer file the quantized network? It is run in integers, and its weights are looked up.

Runtimes round ties, biases and multipliers in their own way, so that outputs differ by steps: what
must agree is the class. The weights are integers, so that these must be there to the last bit, and
so must the steps and the zero points between the layers.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobileone.export.spec import ExportSpec
from mobileone.export.verify.parity import Parity, Reference, Runner, compare, measure
from mobileone.quantization.deployed import QuantizedConv2d, QuantizeDequantize, QuantizedLinear
from mobileone.quantization.rounding import Scheme

__all__ = [
    "INTEGER",
    "LINEAR",
    "MIN_AGREEMENT",
    "Contents",
    "Grid",
    "check",
    "four_channels",
    "missing_grids",
    "missing_weights",
    "packed",
]

_Form = tuple[bytes, ...]  # what a file that keeps numbers in this way has, each somewhere
Grid = tuple[float, int]  # scale, and zero point as a code 0..255
INTEGER, LINEAR = "conv.integer", "linear.integer"  # layers of integers, among the operations


class Contents(NamedTuple):
    """What an integer file has inside: its operations, and a grid for each reading of integers."""

    operations: Counter[str]
    grids: list[Grid]


MIN_AGREEMENT = 0.99  # of the classes of the images
_TYPICAL = 0.1  # the median error: a wrong scale is a multiple of it, steps are a fraction


def check(
    path: Path,
    spec: ExportSpec,
    reference: Reference,
    *,
    runner: Callable[[Path, ExportSpec], Runner],
    returns: Callable[[ExportSpec], str],
    read: Callable[[Path], Contents],
) -> dict[str, Parity]:
    """Compare an integer file with the network that was validated.

    Args:
        path: the file or the folder.
        spec: what the network expects.
        reference: the quantized network, its logits, and the images.
        runner: of the format; runs in integers.
        returns: what the runner returns, `logits` or `probabilities`.
        read: what the file has inside.

    Returns:
        `parity`: at least 99 % of the images get the network's class.
        `typical_parity`: the error of the image in the middle.
        `weights_parity`: how many layers' weights, scales or grids are not in the file, and how
            many linear layers are not of integers.
    """
    output = returns(spec)
    expected = reference.logits.softmax(dim=1) if output == "probabilities" else reference.logits

    @cache
    def found() -> Tensor:
        outputs: Tensor = runner(path, spec)(reference.images)
        return outputs

    def classes() -> Parity:
        parity = compare(expected, found(), output)
        return replace(parity, min_agreement=MIN_AGREEMENT, max_clear_changed=None)

    def typical() -> Parity:
        pairs = zip(expected.split(1), found().split(1), strict=True)
        errors = [compare(own, other, output).max_relative_error for own, other in pairs]
        if None in errors:
            return compare(expected, found(), output)  # which says how many are not finite
        middle = float(torch.tensor(errors).median())
        return Parity("measured", None, f"median {output}", len(errors), middle, None, _TYPICAL)

    def weights() -> Parity:
        network, contents = reference.model, read(path)
        missing = [*missing_weights(path, network), *missing_grids(contents.grids, network)]
        linear = sum(isinstance(layer, QuantizedLinear) for layer in network.modules())
        if linear != contents.operations[LINEAR]:
            missing.append(f"{linear} linear layers of integers ({contents.operations[LINEAR]})")
        kind = f"weights and steps, of which these are not in the file: {missing[:5]}"
        return Parity("measured", kind=kind, max_relative_error=float(len(missing)), tolerance=0.0)

    checks = {"parity": classes, "typical_parity": typical, "weights_parity": weights}
    return {name: measure(run) for name, run in checks.items()}


def missing_weights(path: Path, network: nn.Module) -> list[str]:
    """The layers whose integers, scales or biases are not in a file or folder, byte by byte.

    Equal ones may be there once: files keep equal constants together.

    Args:
        path: the file or the folder.
        network: quantized.
    """
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    contents = [file.read_bytes() for file in files]

    def there(form: tuple[bytes, ...]) -> bool:
        return all(any(part in content for content in contents) for part in form)

    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, (QuantizedConv2d, QuantizedLinear))
        and not all(
            any(map(there, forms))
            for forms in (
                _integers(layer.weight.detach(), layer.scheme),
                _floats(layer.weight_scale),
                _biases(layer),
            )
        )
    ]


def missing_grids(found: Iterable[Grid], network: nn.Module) -> list[str]:
    """The roundings of a network whose step and zero point are not among those of a file.

    Args:
        found: of the file, each for one rounding; steps may have gone through half precision.
        network: quantized.
    """
    left, missing = list(found), []
    for name, grid in network.named_modules():
        if not isinstance(grid, QuantizeDequantize):
            continue
        distances = [
            (abs(scale / grid.scale - 1), index)
            for index, (scale, zero) in enumerate(left)
            if zero == grid.zero_point
        ]
        distance, index = min(distances, default=(torch.inf, 0))
        if distance <= 2**-11:
            del left[index]
        else:
            missing.append(name)
    return missing


def packed(codes: Tensor, bits: int) -> bytes:
    """The lowest bits of integers, one after the other, from the lowest bit of each byte on."""
    digits = codes.flatten()[:, None] >> torch.arange(bits) & 1
    return np.packbits(digits.byte().numpy(), bitorder="little").tobytes()


def four_channels(weight: Tensor) -> Tensor:
    """(O, I, H, W) with I a multiple of four; what is added reads zeros, and is in any table."""
    added = (0, 0, 0, 0, 0, -weight.shape[1] % 4)
    return F.pad(weight, added, value=int(weight.flatten()[0]))


def _integers(weight: Tensor, scheme: Scheme) -> Iterator[_Form]:
    """In the orders that formats keep: (O, I, H, W), (O, H, W, I), and of depthwise (H, W, O).

    Weights of 4 bits may have a byte each, too; indices have as many bits as their table needs.
    """
    orders = [weight]
    if weight.ndim == 4:
        orders += [weight.permute(0, 2, 3, 1), weight.permute(1, 2, 3, 0), four_channels(weight)]
    for codes in orders:
        yield (codes.contiguous().numpy().tobytes(),)
        if scheme == "int4":
            yield (packed(codes, 4),)
        elif scheme == "palette4":
            table, indices = codes.unique(return_inverse=True)
            for bits in range(1, 5):
                if len(table) <= 2**bits:
                    yield table.numpy().tobytes(), packed(indices, bits)


def _biases(layer: QuantizedConv2d | QuantizedLinear) -> Iterator[_Form]:
    """As numbers, or in steps of input times weight scale, counted in float64 or in float32.

    ExecuTorch counts in float32, which has the first 24 bits of a bias.
    """
    bias = layer.bias.detach()
    yield from _floats(bias)
    step = layer.input.scale * layer.weight_scale.double()
    yield ((bias.double() / step).round().to(torch.int32).numpy().tobytes(),)
    narrow = torch.tensor(layer.input.scale) * layer.weight_scale
    yield ((bias * narrow.reciprocal()).round().to(torch.int32).numpy().tobytes(),)


def _floats(values: Tensor) -> Iterator[_Form]:
    yield (values.numpy().tobytes(),)
    yield (values.half().numpy().tobytes(),)
