"""Is an integer file the quantized network? It is run in integers, and its weights are looked up.

Runtimes round ties, biases and multipliers in their own way, so that outputs differ by steps: what
must agree is the class. The weights are integers, so that these must be there to the last bit, and
so must the steps and the zero points between the layers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mobileone.export.spec import ExportSpec
from mobileone.export.verify.parity import Parity, Reference, Runner, compare, measure
from mobileone.quantization.deployed import QuantizedConv2d, QuantizeDequantize, QuantizedLinear

__all__ = ["MIN_AGREEMENT", "Grid", "check", "missing_grids", "missing_weights"]

Grid = tuple[float, int]  # scale, and zero point as a code 0..255

MIN_AGREEMENT = 0.99  # of the classes of the images
_TYPICAL = 0.1  # the median error: a wrong scale is a multiple of it, steps are a fraction


def check(
    path: Path,
    spec: ExportSpec,
    reference: Reference,
    *,
    runner: Callable[[Path, ExportSpec], Runner],
    returns: Callable[[ExportSpec], str],
    grids: Callable[[Path], Sequence[Grid]],
) -> dict[str, Parity]:
    """Compare an integer file with the network that was validated.

    Args:
        path: the file or the folder.
        spec: what the network expects.
        reference: the quantized network, its logits, and the images.
        runner: of the format; runs in integers.
        returns: what the runner returns, `logits` or `probabilities`.
        grids: reads the steps of the file's activations.

    Returns:
        `parity`: at least 99 % of the images get the network's class.
        `typical_parity`: the error of the image in the middle.
        `weights_parity`: how many layers' weights, scales or grids are not in the file.
    """
    output = returns(spec)
    expected = reference.logits.softmax(dim=1) if output == "probabilities" else reference.logits

    def classes() -> Parity:
        found = runner(path, spec)(reference.images)
        return replace(compare(expected, found, output), min_agreement=MIN_AGREEMENT)

    def typical() -> Parity:
        found = runner(path, spec)(reference.images)
        rows = [compare(expected[i : i + 1], found[i : i + 1], output) for i in range(len(found))]
        errors = torch.tensor([row.max_relative_error or 0.0 for row in rows])
        kind = f"median {output}"
        return Parity("measured", None, kind, len(rows), float(errors.median()), None, _TYPICAL)

    def weights() -> Parity:
        network = reference.model
        missing = [*missing_weights(path, network), *missing_grids(grids(path), network)]
        kind = f"weights and steps, of which these are not in the file: {missing[:5]}"
        return Parity("measured", kind=kind, max_relative_error=float(len(missing)), tolerance=0.0)

    checks = {"parity": classes, "typical_parity": typical, "weights_parity": weights}
    return {name: measure(run) for name, run in checks.items()}


def missing_weights(path: Path, network: nn.Module) -> list[str]:
    """The layers whose integers, scales or biases are not in a file or folder, byte by byte.

    Args:
        path: the file or the folder.
        network: quantized.
    """
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    contents = [file.read_bytes() for file in files]
    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, (QuantizedConv2d, QuantizedLinear))
        and not all(
            any(form in content for form in forms for content in contents)
            for forms in (
                _integers(layer.weight.detach()),
                _floats(layer.weight_scale),
                _biases(layer),
            )
        )
    ]


def missing_grids(found: Sequence[Grid], network: nn.Module) -> list[str]:
    """The roundings of a network whose step and zero point are not among those of a file.

    Args:
        found: of the file; steps may have gone through half precision.
        network: quantized.
    """
    return [
        name
        for name, grid in network.named_modules()
        if isinstance(grid, QuantizeDequantize)
        and not any(
            zero == grid.zero_point and abs(scale / grid.scale - 1) <= 2**-11
            for scale, zero in found
        )
    ]


def _integers(weight: Tensor) -> Iterator[bytes]:
    """In the orders that formats keep: (O, I, H, W), (O, H, W, I), and of depthwise (H, W, O)."""
    yield weight.numpy().tobytes()
    if weight.ndim == 4:
        yield weight.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
        yield weight.permute(1, 2, 3, 0).contiguous().numpy().tobytes()


def _biases(layer: QuantizedConv2d | QuantizedLinear) -> Iterator[bytes]:
    """As numbers, or in steps of input times weight scale."""
    bias = layer.bias.detach()
    yield from _floats(bias)
    step = layer.input.scale * layer.weight_scale.double()
    yield (bias.double() / step).round().to(torch.int32).numpy().tobytes()


def _floats(values: Tensor) -> Iterator[bytes]:
    yield values.numpy().tobytes()
    yield values.half().numpy().tobytes()
