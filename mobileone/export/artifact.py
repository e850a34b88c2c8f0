"""From a trained model to a published folder of fused files."""

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mobileone.export.formats.table import DEFAULT_FORMATS, FORMATS, check_formats
from mobileone.export.isolation import isolated
from mobileone.export.manifest import Manifest, TrainingState, describe_format
from mobileone.export.preprocess import normalize
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.parity import Parity, Reference, fixed_images
from mobileone.export.verify.structure import (
    count_kinds,
    fused_kinds,
    structure_problems,
    unfused_layers,
)
from mobileone.io.atomic import discard, publish_folder, staging
from mobileone.reparameterize import reparameterize

__all__ = ["REJECTED", "RejectedError", "export_model"]

REJECTED = ".rejected"  # what a folder that failed its checks is called, after its name


class RejectedError(RuntimeError):
    """An artifact failed its checks, so that it was not published under its name."""


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
) -> Manifest:
    """Fuse `model` and publish the folder `directory` with one file a format and a manifest.

    The folder appears complete and checked, or not at all. `model`, the random states and
    PyTorch's modes are left as they were.

    Args:
        model: classifier in any mode, dtype and device; (N, C, H, W) normalized -> (N, classes).
            Any model that timm can reparameterize, or that has nothing to fuse.
        spec: what the model expects and returns.
        directory: the artifact folder to create.
        formats: names from `FORMATS`.
        run: where in training the weights come from.
        metadata: author, license, description, version.
        images: 8-bit images (N, C, H, W) for the parity check, such as the model was trained on:
            a trained network may overflow half precision on others. None takes synthetic ones.
        overwrite: replace an existing `directory`.

    Returns:
        The manifest that was written, parity included.

    Raises:
        FileExistsError: `directory` exists and `overwrite` is false.
        RejectedError: a file answers otherwise than the model, beyond its format's tolerance, or
            has operations that the fused model has not. It lies in `<directory>.rejected`.
        ValueError: an unknown format, or a model whose output does not match `spec`.
    """
    directory, chosen = Path(directory), check_formats(formats)
    if os.path.lexists(directory) and not overwrite:
        raise FileExistsError(f"{directory} exists: choose another folder or allow overwriting")
    run = run or TrainingState()
    metadata = _complete(metadata or Metadata(), spec, run)
    given = images is not None
    images = fixed_images(spec) if images is None else images
    with isolated(), staging(directory.parent) as folder:
        reference = _inference_copy(model)
        logits = _logits(reference, spec, images)
        fused = reparameterize(reference)
        checked = Reference(fused, logits, images)
        expected = fused_kinds(fused, normalize(images[:1], spec))
        problems = unfused_layers(fused)
        staged = folder / "artifact"
        staged.mkdir()
        entries = {}
        for name in chosen:
            target, path = FORMATS[name], staged / FORMATS[name].filename
            interface = target.write(fused, spec, path, metadata)
            checks = target.check(path, spec, checked)
            written = target.operations(path)
            problems += _problems(name, checks, count_kinds(written), expected)
            entries[name] = describe_format(path, interface, written, checks)
        manifest = Manifest(
            spec=spec,
            training=run,
            metadata=metadata,
            parameters=sum(p.numel() for p in fused.parameters()),
            channel_order={1: "L", 3: "RGB"}.get(spec.input_size[0], "unspecified"),
            images="given" if given else "synthetic",
            problems=tuple(problems),
            formats=entries,
        )
        manifest.save(staged)
        rejected = directory.with_name(f"{directory.name}{REJECTED}")
        publish_folder(staged, rejected if problems else directory)
        if problems:
            raise RejectedError(
                f"{directory.name} is not published, its files are in {rejected}: "
                + "; ".join(problems)
            )
        discard(rejected)
    return manifest


def _problems(
    name: str,
    checks: Mapping[str, Parity],
    written: Mapping[str, int],
    expected: Mapping[str, int],
) -> list[str]:
    """Why a file must not ship."""
    measured = [
        f"{name}: {check.replace('_', ' ')}: {problem}"
        for check, parity in checks.items()
        if (problem := parity.problem())
    ]
    return measured + [f"{name}: {p}" for p in structure_problems(written, expected)]


def _inference_copy(model: nn.Module) -> nn.Module:
    """A float32 copy on the CPU in eval mode; `torch.compile`'s wrapper is taken off."""
    plain = getattr(model, "_orig_mod", model)
    copied = copy.deepcopy(plain).to(device="cpu", dtype=torch.float32)
    return copied.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def _logits(model: nn.Module, spec: ExportSpec, images: Tensor) -> Tensor:
    logits = model(normalize(images, spec))
    expected = (len(images), spec.num_classes)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the model returned {got} where its {spec.num_classes} class names and "
            f"{len(images)} images ask for {expected}: do `class_names` belong to this model?"
        )
    return logits


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
