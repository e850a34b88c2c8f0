"""From a fused network of maps or boxes to a published folder of files, each compared with it."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.export.dense.coreml import LOGITS, DenseProgram, write_boxes, write_map
from mobileone.export.formats import onnx, torch_export, torchscript
from mobileone.export.formats.pt2_reader import load_program
from mobileone.export.formats.table import FLOAT16_TOLERANCE, FLOAT32_TOLERANCE, FORMATS
from mobileone.export.isolation import isolated
from mobileone.export.manifest import Manifest, TrainingState, describe_format
from mobileone.export.preprocess import normalize
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.parity import Parity, fixed_images
from mobileone.export.verify.structure import (
    count_kinds,
    fused_kinds,
    structure_problems,
    unfused_layers,
)
from mobileone.io.atomic import publish_folder, staging

__all__ = ["BOXES", "DENSE_FORMATS", "MAPS", "DenseKind", "export_dense"]

DENSE_FORMATS = ("torchscript", "torch_export", "onnx", "coreml")
"""Formats that these networks can be written in; their files are called as a classifier's."""

Answer = tuple[Tensor, ...]


@dataclass(frozen=True)
class DenseKind:
    """What a network returns, and how Core ML is told.

    Attributes:
        outputs: names of the outputs, in order.
        write_coreml: saves the package.
        answer: the outputs of a package for 8-bit images (N, 3, H, W), as the network has them.
    """

    outputs: tuple[str, ...]
    write_coreml: Callable[[nn.Module, ExportSpec, Path], None]
    answer: Callable[[DenseProgram, Tensor], Answer]


def _maps(program: DenseProgram, images: Tensor) -> Answer:
    return (torch.cat([program.map(image) for image in images]),)


def _boxes(program: DenseProgram, images: Tensor) -> Answer:
    """Corners, and probabilities with the background's."""
    rows = [program.candidates(image) for image in images]
    confidence = torch.stack([row.confidence for row in rows])
    middle, sides = torch.stack([row.coordinates for row in rows]).split(2, dim=-1)
    background = 1 - confidence.sum(dim=-1, keepdim=True)
    return (
        torch.cat([middle - sides / 2, middle + sides / 2], dim=-1),
        torch.cat([background, confidence], dim=-1),
    )


MAPS = DenseKind((LOGITS,), write_map, _maps)
"""Logits (N, classes, H, W)."""

BOXES = DenseKind(("boxes", "scores"), write_boxes, _boxes)
"""Boxes (N, A, 4) as corners in 0..1, and probabilities (N, A, classes), background first."""


def export_dense(
    network: nn.Module,
    spec: ExportSpec,
    directory: str | Path,
    kind: DenseKind,
    formats: Iterable[str] = ("torchscript", "coreml"),
    run: TrainingState | None = None,
    *,
    images: Tensor | None = None,
    more: Callable[[Path], Sequence[Path]] | None = None,
) -> Manifest:
    """Write a fused network in each format, compare, and publish the folder as a whole.

    Args:
        network: fused, in eval mode, float32, on the CPU; normalized images (N, 3, H, W) -> what
            ``kind`` says.
        spec: what it expects; background is the first class.
        directory: folder to make; may be there and empty.
        kind: `MAPS` or `BOXES`.
        formats: of `DENSE_FORMATS`.
        run: where in training the weights come from.
        images: 8-bit images (N, 3, H, W) to compare on; None takes synthetic ones.
        more: writes further files into the folder.

    Returns:
        The manifest, which lies beside the files.

    Raises:
        FileExistsError: the folder has something in it.
        ValueError: an unknown format, or a file that answers otherwise than the network, or has
            other operations.
    """
    directory, chosen = Path(directory).expanduser(), tuple(dict.fromkeys(formats))
    if not chosen or set(chosen) - set(DENSE_FORMATS):
        raise ValueError(f"formats={list(chosen)} must be of {', '.join(DENSE_FORMATS)}.")
    if os.path.lexists(directory) and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{str(directory)!r} exists and is not empty. Give a new folder.")
    if unfused := unfused_layers(network):
        raise ValueError("; ".join(unfused))
    compared = fixed_images(spec, 2) if images is None else images
    with isolated(), staging(directory.parent) as folder:
        staged = folder / "files"
        staged.mkdir()
        expected = _answers(network(normalize(compared, spec)))
        kinds = fused_kinds(network, normalize(compared[:1], spec))
        entries = {}
        for name in chosen:
            path = staged / FORMATS[name].filename
            interface = _write(name, network, spec, path, kind)
            found = _run(name, path, spec, kind, compared)
            parity = _compare(name, kind, found, expected)
            written = FORMATS[name].operations(path)
            if problems := structure_problems(count_kinds(written), kinds):
                raise ValueError(f"the {name} file is not the fused network: {'; '.join(problems)}")
            entries[name] = describe_format(path, interface, written, {"parity": parity})
        if more is not None:
            more(staged)
        manifest = Manifest(
            spec=spec,
            training=run or TrainingState(),
            metadata=Metadata(),
            parameters=sum(p.numel() for p in network.parameters()),
            channel_order="RGB",
            images="synthetic" if images is None else "given",
            formats=entries,
        )
        manifest.save(staged)
        publish_folder(staged, directory)
    return manifest


def _write(
    name: str, network: nn.Module, spec: ExportSpec, path: Path, kind: DenseKind
) -> dict[str, Any]:
    """Save the file; what it takes and returns, for the manifest."""
    if name == "coreml":
        kind.write_coreml(network, spec, path)
        pixels = {"name": "image", "type": "image", "color_space": "RGB", "range": [0, 255]}
        return {"input": pixels, "output": {"names": list(kind.outputs)}}
    writers: dict[str, Callable[..., dict[str, Any]]] = {
        "torchscript": torchscript.write,
        "torch_export": torch_export.write,
        "onnx": partial(onnx.write, outputs=kind.outputs),
    }
    interface = writers[name](network, spec, path, Metadata())
    return {**interface, "output": {"type": "tensors", "names": list(kind.outputs)}}


@torch.no_grad()
def _run(name: str, path: Path, spec: ExportSpec, kind: DenseKind, images: Tensor) -> Answer:
    """What the file answers to 8-bit images."""
    if name == "coreml":
        return kind.answer(DenseProgram(path), images)
    inputs = normalize(images, spec)
    if name == "onnx":
        session = onnx.session(str(path))
        given = {session.get_inputs()[0].name: inputs.numpy()}
        return tuple(torch.from_numpy(value) for value in session.run(list(kind.outputs), given))
    if name == "torchscript":
        return _answers(torchscript.load(path)(inputs))
    program: Any = load_program(path)[0].module()
    return _answers(program(inputs))


def _answers(answer: Tensor | Sequence[Tensor]) -> Answer:
    return (answer,) if isinstance(answer, Tensor) else tuple(answer)


def _compare(name: str, kind: DenseKind, found: Answer, expected: Answer) -> Parity:
    """The largest error of an output, relative to its largest value.

    Raises:
        ValueError: it is above the tolerance, or a shape differs.
    """
    tolerance = FLOAT16_TOLERANCE if name == "coreml" else FLOAT32_TOLERANCE
    worst = 0.0
    for output, one, other in zip(kind.outputs, found, expected, strict=True):
        if one.shape != other.shape:
            raise ValueError(
                f"the {name} file returns {output} of {tuple(one.shape)}, not {tuple(other.shape)}"
            )
        error = float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))
        if not error <= tolerance:  # NaN is no match either
            raise ValueError(
                f"the {output} of the {name} file differ by {error:.1e} from the network's, which "
                f"is above {tolerance:g}"
            )
        worst = max(worst, error)
    return Parity(
        "measured",
        kind=", ".join(kind.outputs),
        images=len(expected[0]),
        max_relative_error=worst,
        tolerance=tolerance,
    )
