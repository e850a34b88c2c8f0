"""Core AI, Core ML's successor: an `.aimodel` folder, from pixels to probabilities, image by image.

Experimental: the format is in beta, and each converter fits one version of it. Needs the extra
`coreai`; its packages are imported by the functions that use them.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.export.preprocess import (
    IMAGE,
    interfaced,
    one_by_one,
    output_names,
    tensor_interface,
)
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.parity import Runner
from mobileone.io.noise import without_noise
from mobileone.io.optional_import import import_optional

__all__ = ["NEEDS", "operations", "runner", "spec", "write"]

NEEDS = ("coreai-torch>=0.4.3,<0.5; python_version >= '3.11'",)
_USE = "the `coreai` format"
_INSTALL = "mobileone-lightning[coreai]"
_FUNCTION = "main"


def write(
    model: nn.Module,
    spec: ExportSpec,
    path: Path,
    metadata: Metadata,
    outputs: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Convert `model` and save the folder `path`, with the spec in its metadata.

    Args:
        model: fused network in eval mode, float32, on the CPU; (N, C, H, W) -> (N, classes).
        spec: what the model expects.
        path: folder to write.
        metadata: shown by Xcode.
        outputs: names of what the model returns; None for a classifier.

    Returns:
        Description of the input and the output for the manifest.

    Raises:
        ImportError: the extra is not installed.
    """
    pixels = replace(spec, pixels=True)
    network = interfaced(model, pixels, outputs)
    with _quiet():
        converters = import_optional("coreai_torch", _USE, _INSTALL)
        runtime = import_optional("coreai.runtime", _USE, _INSTALL)
        program = torch.export.export(network, (torch.zeros(1, *spec.input_size),))
        converter = converters.TorchConverter().add_exported_program(
            program.run_decompositions(converters.get_decomp_table()),
            input_names=[IMAGE],
            output_names=output_names(pixels, outputs),
            entrypoint_name=_FUNCTION,
        )
        described = runtime.AIModelAssetMetadata()
        described.author, described.license = metadata.author, metadata.license
        described.model_description = metadata.description or ""
        described.set_custom("version", metadata.version or "")
        described.set_custom("spec", spec.to_json())
        converter.to_coreai().save_asset(path, described)
    interface = tensor_interface(pixels, outputs, batch=1)
    interface["input"]["name"] = IMAGE
    return {**interface, "function": _FUNCTION}


def runner(path: Path, spec: ExportSpec) -> Runner:
    """The folder as a function: 8-bit images (N, C, H, W) -> its outputs, as (N, classes).

    Core AI itself on macOS, the interpreter of its package elsewhere.

    Raises:
        ImportError: the extra is not installed.
    """
    asset = _asset(path)

    def batch(images: Tensor) -> Any:
        with _quiet(), ThreadPoolExecutor(1) as thread:  # a notebook's thread has a loop of its own
            return thread.submit(asyncio.run, _run(asset, images)).result()

    return batch


async def _run(asset: Any, images: Tensor) -> Any:
    array = import_optional("coreai.runtime", _USE, _INSTALL).NDArray
    async with asset.executable() as model:
        function = model.load_function(_FUNCTION)
        rows = []
        for image in images:
            found = await function({IMAGE: array(image[None].float().numpy())})
            rows.append([torch.tensor(found[name].numpy()) for name in function.desc.output_names])
    answers = iter(rows)
    return one_by_one(lambda image: next(answers))(images)


def spec(path: Path) -> ExportSpec:
    """The folder's own metadata."""
    described = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
    return ExportSpec.from_json(described.get("creatorDefinedMetadata", {}).get("spec", ""))


def operations(path: Path) -> Counter[str]:
    """How often each operation occurs in the program; additions of constants are `bias`."""
    with _quiet():
        module = _asset(path).program._module._mlir_module
    return Counter(_names(module.operation))


def _names(operation: Any) -> Iterator[str]:
    inner = [o for region in operation.regions for block in region.blocks for o in block.operations]
    for other in inner:
        yield from _names(other.operation)
    name = operation.name.removeprefix("coreai.").removeprefix("decomposable.broadcasting_")
    if inner or name in ("constant", "output"):
        return
    owners = (getattr(operand.owner, "name", "") for operand in operation.operands)
    yield "bias" if name == "add" and "coreai.constant" in owners else name


def _asset(path: Path) -> Any:
    with _quiet():
        return import_optional("coreai.authoring.asset", _USE, _INSTALL).AIModelAsset.load(path)


def _quiet() -> AbstractContextManager[None]:
    return without_noise(
        r"coreai-torch [\d.]+: converting|ODIE \[default\]: Loading",
        "coreai-torch has only been validated with",
    )
