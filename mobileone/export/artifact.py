"""From a trained model to a published folder of fused files."""

import copy
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mobileone.deploy import reparameterize
from mobileone.export import torchscript
from mobileone.export.formats import DEFAULT_FORMATS, FORMATS, check_formats
from mobileone.export.isolation import isolated
from mobileone.export.manifest import Manifest, TrainingState, describe_files
from mobileone.export.metadata import Metadata
from mobileone.export.parity import fixed_images, measure
from mobileone.export.preprocess import normalise
from mobileone.export.publish import publish_folder, staging
from mobileone.export.spec import ExportSpec

__all__ = ["export_model", "load_torchscript_artifact"]


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

    The folder appears complete or not at all. `model`, the random states and PyTorch's modes are
    left as they were.

    Args:
        model: classifier in any mode, dtype and device; (N, C, H, W) normalised -> (N, classes).
            Any model that timm can reparameterize, or that has nothing to fuse.
        spec: what the model expects and returns.
        directory: the artifact folder to create.
        formats: names from `FORMATS`.
        run: where in training the weights come from.
        metadata: author, licence, description, version.
        images: 8-bit images (N, C, H, W) for the parity check; None takes synthetic ones.
        overwrite: replace an existing `directory`.

    Returns:
        The manifest that was written, parity included.

    Raises:
        FileExistsError: `directory` exists and `overwrite` is false.
        ValueError: an unknown format, or a model whose output does not match `spec`.
    """
    directory, chosen = Path(directory), check_formats(formats)
    if os.path.lexists(directory) and not overwrite:
        raise FileExistsError(f"{directory} exists: choose another folder or allow overwriting")
    run = run or TrainingState()
    metadata = _complete(metadata or Metadata(), spec, run)
    images = fixed_images(spec) if images is None else images
    with isolated(), staging(directory.parent) as folder:
        reference = _inference_copy(model)
        logits = _logits(reference, spec, images)
        fused = reparameterize(reference)
        staged = folder / "artifact"
        staged.mkdir()
        entries = {}
        for name in chosen:
            target = FORMATS[name]
            path = staged / target.filename
            interface = target.write(fused, spec, path, metadata)
            files = describe_files(path)
            run_file = partial(target.predict, path, spec, images)
            entries[name] = {
                "path": target.filename,
                **interface,
                "bytes": sum(file["bytes"] for file in files.values()),
                "files": files,
                "parity": measure(logits, run_file, target.output).to_dict(),
            }
        manifest = Manifest(
            spec=spec,
            training=run,
            metadata=metadata,
            parameters=sum(p.numel() for p in fused.parameters()),
            channel_order={1: "L", 3: "RGB"}.get(spec.input_size[0], "unspecified"),
            formats=entries,
        )
        manifest.save(staged)
        publish_folder(staged, directory)
    return manifest


def load_torchscript_artifact(path: str | Path) -> tuple[nn.Module, Manifest]:
    """The TorchScript module of an artifact folder, its files verified, and the manifest.

    The module maps normalised float images (N, C, H, W) to logits (N, classes), on the CPU.

    Raises:
        FileNotFoundError: `path` is not an artifact folder, or holds no TorchScript file.
        ValueError: a file does not match the manifest.
    """
    path = Path(path)
    manifest = Manifest.load(path)
    if "torchscript" not in manifest.formats:
        raise FileNotFoundError(
            f"{path} holds {sorted(manifest.formats)} and no `torchscript`: export it again with "
            "`torchscript` among its formats"
        )
    manifest.verify(path)
    return torchscript.load(path / manifest.formats["torchscript"]["path"]), manifest


def _inference_copy(model: nn.Module) -> nn.Module:
    """A float32 copy on the CPU in eval mode; `torch.compile`'s wrapper is taken off."""
    plain = getattr(model, "_orig_mod", model)
    copied = copy.deepcopy(plain).to(device="cpu", dtype=torch.float32)
    return copied.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def _logits(model: nn.Module, spec: ExportSpec, images: Tensor) -> Tensor:
    logits = model(normalise(images, spec))
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
