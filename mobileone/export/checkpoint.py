"""From a training checkpoint to an artifact, without the training code."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mobileone.export.artifact import export_model
from mobileone.export.formats.table import DEFAULT_FORMATS
from mobileone.export.manifest import Manifest, TrainingState
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.io.safe_pickle import explain_refusal

__all__ = ["IMAGES_KEY", "export_checkpoint", "load_model", "model_weights", "read_checkpoint"]

IMAGES_KEY = "export_images"  # in a checkpoint: validation images, 8-bit (N, C, H, W)
_COMPILED = "_orig_mod."  # what torch.compile puts before a module's names


def export_checkpoint(
    checkpoint: str | Path,
    directory: str | Path,
    formats: Iterable[str] = DEFAULT_FORMATS,
    metadata: Metadata | None = None,
    *,
    overwrite: bool = False,
) -> Manifest:
    """Publish the artifact `directory` from a checkpoint that `ImageClassifier` wrote.

    The files are compared with the network on the validation images that the checkpoint brings
    along, or on synthetic ones if it has none.

    Args:
        checkpoint: the `.ckpt` file; its `state_dict` (the averaged weights, if they were
            averaged) is what ships.
        directory: the artifact folder to create.
        formats: names from `FORMATS`.
        metadata: author, license, description, version.
        overwrite: replace an existing `directory`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        FileExistsError: `directory` exists and `overwrite` is false.
        ValueError: the file is damaged, or lacks what is needed to rebuild the model.
    """
    path = Path(checkpoint)
    contents = read_checkpoint(path)
    model, spec = load_model(contents, path)
    run = TrainingState(
        epoch=contents.get("epoch"), step=contents.get("global_step"), checkpoint=path.name
    )
    return export_model(
        model,
        spec,
        directory,
        formats,
        run,
        metadata,
        images=contents.get(IMAGES_KEY),
        overwrite=overwrite,
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a Lightning checkpoint without running code from it; tensors stay on the disk.

    Raises:
        FileNotFoundError: there is no such file.
        UnsafeFileError: it holds objects other than tensors and primitives.
        ValueError: it is damaged, or is not a Lightning checkpoint.
    """
    if not path.is_file():
        beside = path.with_name(f"{path.name}.ckpt")
        hint = f"; did you mean {beside}?" if beside.is_file() else ""
        raise FileNotFoundError(f"no checkpoint at {path}{hint}")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
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


def load_model(contents: Mapping[str, Any], path: Path) -> tuple[nn.Module, ExportSpec]:
    """Rebuild the network of a checkpoint and read its spec.

    Raises:
        ValueError: the checkpoint has no spec, or its weights do not fit the named model.
    """
    if "export_spec" not in contents:
        raise ValueError(
            f"{path} has no `export_spec` (class names, input size, normalization): it was not "
            "written by ImageClassifier; put `spec.to_dict()` there in `on_save_checkpoint`"
        )
    try:
        spec = ExportSpec.from_dict(contents["export_spec"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"the `export_spec` of {path} is not valid: {error}") from error
    hyper_parameters = contents.get("hyper_parameters", {})
    name = hyper_parameters.get("model") or spec.model_name
    arguments = {"in_chans": spec.input_size[0], **(hyper_parameters.get("model_kwargs") or {})}
    try:
        model = timm.create_model(name, num_classes=spec.num_classes, **arguments)
        model.load_state_dict(model_weights(contents["state_dict"]))
    except Exception as error:
        raise ValueError(
            f"the weights of {path} do not fit {name!r} with {arguments}: {error}"
        ) from error
    return model, spec
