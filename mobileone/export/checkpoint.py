"""From a training checkpoint to an artifact, without the training code."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mobileone.export.artifact import export_model
from mobileone.export.formats.table import DEFAULT_FORMATS, DEFAULT_INTEGER_FORMATS
from mobileone.export.isolation import isolated
from mobileone.export.manifest import Manifest, TrainingState
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.io.plain_arguments import plain_arguments, registered_name
from mobileone.io.safe_pickle import explain_refusal
from mobileone.quantization import quantize, scheme_of

__all__ = [
    "IMAGES_KEY",
    "ExportJob",
    "build_network",
    "export_checkpoint",
    "load_model",
    "model_weights",
    "read_checkpoint",
]

IMAGES_KEY = "export_images"  # in a checkpoint: validation images, 8-bit (N, C, H, W)
_SPEC_KEY = "export_spec"
_COMPILED = "_orig_mod."  # what torch.compile puts before a module's names


@dataclass(frozen=True)
class ExportJob:
    """A checkpoint whose artifact is wanted: the weights are read when the job runs.

    Attributes:
        checkpoint: the `.ckpt` file; its `state_dict` is what ships.
        directory: the artifact folder to create.
        formats: names from `FORMATS`; null: torchscript and coreml, or of a quantized network
            onnx_int8 and coreml_int8.
        metadata: author, license, description, version.
        overwrite: replace an existing `directory`.
        metrics: what the checkpoint's validation logged.
        spec: what the network expects; None takes the checkpoint's `export_spec`.
        images: 8-bit images (N, C, H, W) to compare on; None takes those that the checkpoint
            brings along, or synthetic ones.
        network: has the architecture if the checkpoint cannot rebuild it; copied, not changed.
        pixels: see `export_checkpoint`.
    """

    checkpoint: Path
    directory: Path
    formats: tuple[str, ...] | None = None
    metadata: Metadata | None = None
    overwrite: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    spec: ExportSpec | None = None
    images: Tensor | None = None
    network: nn.Module | None = None
    pixels: bool = False

    def run(self) -> Manifest:
        """Read the checkpoint and publish its artifact: see `export_checkpoint` for the errors."""
        with isolated():
            contents = read_checkpoint(self.checkpoint)
            if self.spec is not None:
                contents = {**contents, _SPEC_KEY: self.spec.to_dict()}
            model, spec = load_model(contents, self.checkpoint, self.network)
        training = TrainingState(
            contents.get("epoch"), contents.get("global_step"), self.metrics, self.checkpoint.name
        )
        images = contents.get(IMAGES_KEY) if self.images is None else self.images
        fitting = DEFAULT_INTEGER_FORMATS if scheme_of(model) else DEFAULT_FORMATS
        return export_model(
            model,
            replace(spec, pixels=self.pixels or spec.pixels),
            self.directory,
            fitting if self.formats is None else self.formats,
            training,
            self.metadata,
            images=images,
            overwrite=self.overwrite,
        )


def export_checkpoint(
    checkpoint: str | Path,
    directory: str | Path,
    formats: Iterable[str] | None = None,
    metadata: Metadata | None = None,
    *,
    overwrite: bool = False,
    pixels: bool = False,
) -> Manifest:
    """Publish the artifact `directory` from a checkpoint that `ImageClassifier` wrote.

    The files are compared with the network on the validation images that the checkpoint brings
    along, or on synthetic ones if it has none.

    Args:
        checkpoint: the `.ckpt` file; its `state_dict` (the averaged weights, if they were
            averaged) is what ships.
        directory: the artifact folder to create.
        formats: names from `FORMATS`; null: torchscript and coreml, or of a quantized network
            onnx_int8 and coreml_int8.
        metadata: author, license, description, version.
        overwrite: replace an existing `directory`.
        pixels: `torchscript`, `torch_export` and `onnx` take pixel values 0..255 and return
            probabilities, as the formats for devices do, instead of normalized images and logits.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        FileExistsError: `directory` exists and `overwrite` is false.
        ValueError: the file is damaged, or lacks what is needed to rebuild the model.
    """
    chosen = None if formats is None else tuple(formats)
    job = ExportJob(Path(checkpoint), Path(directory), chosen, metadata, overwrite, pixels=pixels)
    return job.run()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a Lightning checkpoint without running code from it.

    All of it: of a file that is mapped into memory and then cut short, a read kills the process.

    Raises:
        FileNotFoundError: there is no such file.
        UnsafeFileError: it holds objects other than tensors and primitives.
        ValueError: it is damaged, or is not a Lightning checkpoint.
    """
    if not path.is_file():
        likely = (path.with_name(f"{path.name}.ckpt"), path / "checkpoints/best.ckpt")  # of a run
        hint = next((f"; did you mean {file}?" for file in likely if file.is_file()), "")
        raise FileNotFoundError(f"no checkpoint at {path}{hint}")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise explain_refusal(path, str(path), error) from None
    if not isinstance(contents, dict) or not isinstance(contents.get("state_dict"), Mapping):
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no `state_dict`")
    return contents


def model_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of the network `pl_module.model`, under the network's own names.

    Raises:
        ValueError: there are none.
    """
    plain = {name.replace(_COMPILED, ""): value for name, value in state_dict.items()}
    prefix = "model."
    weights = {n.removeprefix(prefix): v for n, v in plain.items() if n.startswith(prefix)}
    if not weights:
        raise ValueError(
            f"no weights named `{prefix}*` in the checkpoint, only {sorted(plain)[:3]}...: the "
            "LightningModule must keep its network in `self.model`"
        )
    return weights


def load_model(
    contents: Mapping[str, Any], path: Path, network: nn.Module | None = None
) -> tuple[nn.Module, ExportSpec]:
    """Rebuild the network of a checkpoint and read its spec.

    Args:
        contents: of the checkpoint.
        path: its file, for errors.
        network: has the architecture; a copy on the CPU gets the weights. None builds it.

    Raises:
        ValueError: the checkpoint has no spec, timm does not know the model's name, or the weights
            do not fit the model.
    """
    if _SPEC_KEY not in contents:
        raise ValueError(
            f"{path} has no `export_spec` (class names, input size, normalization): it was not "
            "written by ImageClassifier; put `spec.to_dict()` there in `on_save_checkpoint`"
        )
    try:
        spec = ExportSpec.from_dict(contents[_SPEC_KEY])
    except (ValueError, TypeError) as error:
        raise ValueError(f"the `export_spec` of {path} is not valid: {error}") from error
    options = contents.get("hyper_parameters", {})
    built = build_network(spec, options) if network is None else copy.deepcopy(network).cpu()
    try:
        built.load_state_dict(model_weights(contents["state_dict"]))
    except Exception as error:
        raise ValueError(
            f"the weights of {path} do not fit {options.get('model') or spec.model_name!r} with "
            f"{options.get('model_kwargs') or {}}: {error}"
        ) from error
    return built, spec


def build_network(spec: ExportSpec, hyper_parameters: Mapping[str, Any]) -> nn.Module:
    """The network that a checkpoint's hyper-parameters name, with fresh weights; fetches nothing.

    Args:
        spec: number of classes and of input channels.
        hyper_parameters: `model` (timm's name; the spec's if there is none), `model_kwargs`, and
            `quantize` and `quantize_kwargs` of a network that was trained as integers.

    Raises:
        UnsafeFileError: `model_kwargs` has values that are not plain.
        ValueError: timm does not know the name, or cannot build the model.
    """
    name = registered_name(str(hyper_parameters.get("model") or spec.model_name))
    given = plain_arguments(hyper_parameters.get("model_kwargs"))
    arguments = {"in_chans": spec.input_size[0], **given, "pretrained": False}
    if not timm.is_model(name):
        raise ValueError(
            f"timm knows no model {name!r}: if your own module registers it, import that module "
            "with --imports '[my_networks]' (a checkpoint never names modules to import)"
        )
    try:
        model = timm.create_model(name, num_classes=spec.num_classes, **arguments)
    except Exception as error:
        raise ValueError(f"timm cannot build {name!r} with {arguments}: {error}") from error
    scheme = hyper_parameters.get("quantize")
    options = hyper_parameters.get("quantize_kwargs") or {}
    return model if scheme is None else quantize(model, scheme, **options)
