"""Core AI, Core ML's successor: an `.aimodel` folder, from pixels to probabilities, image by image.

Experimental: the format is in beta, and each converter fits one version of it. Needs the extra
`coreai`; its packages are imported by the functions that use them.
"""

import asyncio
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.export.preprocess import IMAGE, for_device, one_by_one
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.parity import Runner
from mobileone.io.noise import quiet
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
        OSError: the disk is full.
    """
    network, given, names, interface = for_device(model, spec, outputs)
    with quiet():
        converters = import_optional("coreai_torch", _USE, _INSTALL)
        runtime = import_optional("coreai.runtime", _USE, _INSTALL)
        program = torch.export.export(network, tuple(given.values()))
        converter = converters.TorchConverter().add_exported_program(
            program.run_decompositions(converters.get_decomp_table()),
            input_names=list(given),
            output_names=names,
            entrypoint_name=_FUNCTION,
        )
        described = runtime.AIModelAssetMetadata()
        described.author, described.license = metadata.author, metadata.license
        described.model_description = metadata.description or ""
        described.set_custom("version", metadata.version or "")
        described.set_custom("spec", spec.to_json())
        converted = converter.to_coreai()
        _require_space(converted, path)
        converted.save_asset(path, described)
    return {**interface, "function": _FUNCTION}


def _require_space(program: Any, path: Path) -> None:
    """Write as much, and remove it: where the disk is full, the converter ends the process."""
    contents = io.BytesIO()
    program._module._mlir_module.operation.write_bytecode(contents)  # with the lines of its source
    trial = path.with_name(f"trial-{path.name}")
    try:
        trial.write_bytes(contents.getbuffer())
    finally:
        trial.unlink(missing_ok=True)


def runner(path: Path, spec: ExportSpec) -> Runner:
    """The folder as a function: 8-bit images (N, C, H, W) -> its outputs, as (N, classes).

    Core AI itself on macOS, the interpreter of its package elsewhere.

    Raises:
        ImportError: the extra is not installed.
    """
    asset = _asset(path)

    def batch(images: Tensor) -> Any:
        with quiet(), ThreadPoolExecutor(1) as thread:  # a notebook's thread has a loop of its own
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
    """How often each operation occurs in the program's function.

    A call of another function counts by its name. `bias` are additions of constants, but for those
    to scaled values, which are the rest of a norm.
    """
    with quiet():
        module = _asset(path).program._module._mlir_module
    (main,) = (f for f in module.body if _text(f, "sym_name") == f'"{_FUNCTION}"')
    (body,) = main.regions[0].blocks
    names = Counter(_name(operation) for operation in body.operations)
    return Counter({n: count for n, count in names.items() if n not in ("constant", "output")})


def _name(operation: Any) -> str:
    if operation.name == "coreai.invoke":  # ...<@layer_norm_bsivnaya>...: with a random end
        (function,) = re.findall(r"@(\w+?)(?:_[a-z]{8})?\b", _text(operation, "callee"))
        return str(function)
    constant, others = _operands(operation)
    if (name := _plain(operation)) != "add" or not constant:
        return name
    scaled = any(_plain(o) in ("mul", "divide") and _operands(o)[0] for o in others)
    return "add" if scaled else "bias"


def _operands(operation: Any) -> tuple[bool, list[Any]]:
    """Whether one is a constant, and the operations that gave the others."""
    owners = [o.owner for o in operation.operands if hasattr(o.owner, "operands")]
    others = [owner for owner in owners if owner.name != "coreai.constant"]
    return len(others) < len(owners), others


def _plain(operation: Any) -> str:
    name: str = operation.name
    return name.removeprefix("coreai.").removeprefix("decomposable.broadcasting_")


def _text(operation: Any, attribute: str) -> str:
    return str(operation.attributes[attribute])


def _asset(path: Path) -> Any:
    with quiet():
        return import_optional("coreai.authoring.asset", _USE, _INSTALL).AIModelAsset.load(path)
