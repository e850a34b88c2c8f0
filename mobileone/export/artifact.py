"""From a trained model to a published folder of fused files."""

import contextlib
import copy
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mobileone.export.formats.table import (
    DEFAULT_FORMATS,
    FORMATS,
    Format,
    check_formats,
    check_integers,
    check_packages,
)
from mobileone.export.isolation import isolated
from mobileone.export.manifest import Manifest, TrainingState, describe_format
from mobileone.export.preprocess import normalize
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.parity import Parity, Reference, as_tuple, fixed_images
from mobileone.export.verify.structure import (
    count_kinds,
    fused_kinds,
    structure_problems,
    unfused_layers,
)
from mobileone.io.atomic import discard, publish_folder, staging
from mobileone.quantization import conditions, scheme_of
from mobileone.reparameterize import reparameterize

__all__ = ["REJECTED", "RejectedError", "export_model"]

_UNDESCRIBED: Mapping[str, Any] = {"input": {}, "output": {}}
REJECTED = ".rejected"  # what a folder that failed its checks is called, after its name


class RejectedError(RuntimeError):
    """No file of an artifact could be published.

    Args:
        message: the reasons, in a line.
        final: whether all of them are checks that failed, as they would again.
    """

    def __init__(self, message: str, final: bool = True) -> None:
        super().__init__(message)
        self.final = final


class _File(NamedTuple):
    """One format of an artifact: written and checked, or the reason why not."""

    entry: dict[str, Any] | None
    problems: list[str]
    error: Exception | None = None


def export_model(
    model: nn.Module,
    spec: ExportSpec,
    directory: str | Path,
    formats: Iterable[str] = DEFAULT_FORMATS,
    run: TrainingState | None = None,
    metadata: Metadata | None = None,
    *,
    images: Tensor | None = None,
    overwrite: bool = False,
    outputs: Mapping[str, Sequence[int]] | None = None,
    table: Mapping[str, Format] | None = None,
    synthetic: int = 8,
) -> Manifest:
    """Fuse `model` and publish the folder `directory` with one file a format and a manifest.

    The folder appears complete and checked, or not at all. A format whose file could not be
    written, or failed a check, is left out: the manifest's `rejected` says why, and the file is in
    `<directory>.rejected`. `model`, the random states and PyTorch's modes are left as they were.

    Args:
        model: network in any mode, dtype and device; (N, C, H, W) normalized -> (N, classes).
            Any model that timm can reparameterize, or that has nothing to fuse.
        spec: what the model expects and returns.
        directory: the artifact folder to create; may be there and empty.
        formats: names from `table`.
        run: where in training the weights come from.
        metadata: author, license, description, version.
        images: 8-bit images (N, C, H, W) for the parity check, such as the model was trained on:
            a trained network may overflow half precision on others. None takes synthetic ones.
        overwrite: replace an existing `directory`.
        outputs: what the model returns, in order: by name the shape without the batch's size; None
            for a classifier's logits.
        table: the formats that can be written; None for `FORMATS`, those of classifiers.
        synthetic: number of synthetic images.

    Returns:
        The manifest that was written, with how far each file is from the model, and `rejected`.

    Raises:
        FileExistsError: `directory` exists and `overwrite` is false.
        RejectedError: no file could be published: each computes something else than the model,
            beyond its format's tolerance, has operations that the fused model has not, or could not
            be written.
        ImportError: a format needs a package that is not installed.
        ValueError: an unknown format, one for floats where the network is quantized or the reverse,
            or a model whose outputs do not have the shapes of `outputs`.
    """
    directory, chosen = Path(directory).expanduser(), check_formats(formats, table)
    rows = FORMATS if table is None else table
    check_packages(chosen, table, scheme_of(model))
    if os.path.lexists(directory) and not (overwrite or _is_empty(directory)):
        raise FileExistsError(
            f"{directory} exists: choose another folder, or give `overwrite` (--overwrite true)"
        )
    run = run or TrainingState()
    metadata = _complete(metadata or Metadata(), spec, run)
    given = images is not None
    if images is None:
        images = fixed_images(spec, synthetic)
    with isolated(), staging(directory.parent) as folder:
        reference = _inference_copy(model)
        expected_outputs = _outputs(reference, spec, images, outputs)
        fused = reparameterize(reference)
        check_integers(chosen, scheme_of(fused) is not None, rows)
        checked = Reference(fused, expected_outputs, images)
        expected = fused_kinds(fused, normalize(images[:1], spec))
        unfused = unfused_layers(fused)
        good, bad = folder / "artifact", folder / "rejected"
        good.mkdir()
        bad.mkdir()
        files: dict[str, _File] = {}
        for name in chosen:
            place = folder / name  # a writer that fails leaves nothing among the others
            place.mkdir()
            path = place / rows[name].filename
            files[name] = _write(name, rows[name], path, spec, metadata, checked, expected)
            if files[name].entry is not None:
                path.rename((bad if unfused or files[name].problems else good) / path.name)
            shutil.rmtree(place)
        manifest = Manifest(
            spec=spec,
            training=run,
            metadata=metadata,
            parameters=sum(p.numel() for p in fused.parameters()),
            channel_order={1: "L", 3: "RGB"}.get(spec.input_size[0], "unspecified"),
            images="given" if given else "synthetic",
            condition=max(conditions(fused).values(), default=None),
            formats={n: f.entry for n, f in files.items() if f.entry and not f.problems},
            rejected={n: "; ".join(f.problems) for n, f in files.items() if f.problems},
        )
        problems = [*unfused, *(f"{n}: {p}" for n, f in files.items() for p in f.problems)]
        if manifest.formats and not unfused:
            manifest.save(good)
            publish_folder(good, directory)
        rejected = directory.with_name(f"{directory.name}{REJECTED}")
        entries = {n: f.entry for n, f in files.items() if f.entry and (f.problems or unfused)}
        where = ""
        with contextlib.suppress(OSError):  # for a look: a full disk must not take the others
            discard(rejected)  # an older one must not be taken for this one
            if entries:
                replace(manifest, formats=entries, problems=tuple(problems)).save(bad)
                publish_folder(bad, rejected)
                where = f", its files are in {rejected}"
    if not manifest.formats or unfused:
        errors = [file.error for file in files.values() if file.error]
        raise RejectedError(
            f"{directory.name} is not published{where}: {'; '.join(problems)}", final=not errors
        ) from next(iter(errors), None)
    return manifest


def _write(
    name: str,
    row: Format,
    path: Path,
    spec: ExportSpec,
    metadata: Metadata,
    checked: Reference,
    expected: Mapping[str, int],
) -> _File:
    """Write one format and check it; whatever its writer or its reader raises is a reason."""
    try:
        interface = row.write(checked.model, spec, path, metadata) or _UNDESCRIBED
        checks = row.compare(path, spec, checked)
        written = row.count_operations(path)
        problems = [f"the network has {said}" for said in row.contradictions(path, spec)]
        problems += _problems(row, checks)
        if row.operations is not None:
            problems += structure_problems(count_kinds(written), expected)
        return _File(describe_format(path, interface, written, checks), problems)
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        return _File(None, [f"{type(error).__name__}: {said}"], error)


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not any(directory.iterdir())


def _problems(row: Format, checks: Mapping[str, Parity]) -> list[str]:
    """Why a file must not ship, and what helps."""
    return [
        f"{check.replace('_', ' ')}: {problem}"
        + (f" ({row.advice})" if row.advice and check == "parity" else "")
        for check, parity in checks.items()
        if (problem := parity.problem())
    ]


def _inference_copy(model: nn.Module) -> nn.Module:
    """A float32 copy on the CPU in eval mode; `torch.compile`'s wrapper is taken off."""
    plain = getattr(model, "_orig_mod", model)
    copied = copy.deepcopy(plain).to(device="cpu", dtype=torch.float32)
    return copied.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def _outputs(
    model: nn.Module,
    spec: ExportSpec,
    images: Tensor,
    outputs: Mapping[str, Sequence[int]] | None,
) -> dict[str, Tensor]:
    """What the trained network returns, by name."""
    shapes = {"logits": (spec.num_classes,)} if outputs is None else outputs
    expected = [(len(images), *shape) for shape in shapes.values()]
    found = model(normalize(images, spec))
    tensors = as_tuple(found) if isinstance(found, (Tensor, list, tuple)) else ()
    if [tuple(tensor.shape) for tensor in tensors] != expected:
        got = [tuple(tensor.shape) for tensor in tensors] or type(found).__name__
        raise ValueError(
            f"the model returned {got} where {', '.join(shapes)} of {len(images)} images and "
            f"{spec.num_classes} class names ask for {expected}: do `class_names` belong to this "
            "model?"
        )
    return dict(zip(shapes, tensors, strict=True))


def _complete(metadata: Metadata, spec: ExportSpec, run: TrainingState) -> Metadata:
    """Fill in the description and the version that were left open."""
    description = (
        f"{spec.model_name}, image classifier with {spec.num_classes} classes, "
        "reparameterized for inference"
    )
    version = "untracked" if run.step is None else f"epoch {run.epoch}, step {run.step}"
    return replace(
        metadata,
        description=metadata.description or description,
        version=metadata.version or version,
    )
