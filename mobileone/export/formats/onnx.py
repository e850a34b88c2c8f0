"""ONNX: a graph of normalized images to logits, or pixels to probabilities, run by onnxruntime.

Needs the extra `onnx`; its packages are imported by the functions that use them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.export.formats.torch_export import program_of
from mobileone.export.preprocess import (
    IMAGE,
    interfaced,
    output_names,
    tensor_interface,
    tensor_runner,
)
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.parity import Runner
from mobileone.io.optional_import import import_optional
from mobileone.io.safe_pickle import UnsafeFileError

__all__ = ["EXTRA", "NEEDS", "operations", "runner", "session", "spec", "write"]

EXTRA = "mobileone-lightning[onnx]"
NEEDS = ("onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.6")
_USE = "the `onnx` format"


def write(
    model: nn.Module,
    spec: ExportSpec,
    path: Path,
    metadata: Metadata,
    outputs: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Convert `model`, check the graph and save it to `path`; the batch size stays free.

    Args:
        model: fused network in eval mode, float32, on the CPU; (N, C, H, W) -> (N, classes).
        spec: what the model expects; stored in the file's metadata as JSON, key `spec`.
        path: file to write.
        metadata: stored in the file's metadata.
        outputs: names of what the model returns; None for logits.

    Returns:
        Description of the input and the output for the manifest.

    Raises:
        ImportError: the extra is not installed.
    """
    onnx = import_optional("onnx", _USE, EXTRA)
    import_optional("onnxscript", _USE, EXTRA)
    import_optional("onnxruntime", _USE, EXTRA)
    given, names = IMAGE if spec.pixels else "images", output_names(spec, outputs)
    program = torch.onnx.export(
        program_of(interfaced(model, spec, outputs), spec),
        input_names=[given],
        output_names=names,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]  # the converter's notes, a quarter of a small file
        part.doc_string = ""
    del proto.graph.value_info[:]
    properties = {
        "spec": spec.to_json(),
        "author": metadata.author,
        "license": metadata.license,
        "description": metadata.description or "",
        "version": metadata.version or "",
    }
    onnx.helper.set_model_props(proto, properties)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)
    interface = tensor_interface(spec, outputs)
    interface["input"]["name"] = given
    if outputs is None:
        interface["output"]["name"] = names[0]
    return {**interface, "opset": proto.opset_import[0].version}


def runner(path: Path, spec: ExportSpec) -> Runner:
    """The file as a function: 8-bit images (N, C, H, W) -> its outputs, as (N, classes).

    Raises:
        ImportError: the extra is not installed.
        UnsafeFileError: it takes weights from other files.
    """
    _graph(path)
    opened = session(str(path))
    name = opened.get_inputs()[0].name

    def run(inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = opened.run(None, {name: inputs.numpy()})
        tensors = tuple(torch.from_numpy(value) for value in found)
        return tensors[0] if len(tensors) == 1 else tensors

    return tensor_runner(run, spec)


def spec(path: Path) -> ExportSpec:
    """The file's own metadata."""
    properties = {p.key: p.value for p in _graph(path).metadata_props}
    return ExportSpec.from_json(properties.get("spec", ""))


def session(model: str | bytes, optimized: Path | None = None) -> Any:
    """An onnxruntime session on the CPU, of a file or of its contents.

    Args:
        model: path or contents.
        optimized: where to save the graph that is run, if at all, free of this machine's kernels.

    Raises:
        ImportError: the extra is not installed.
    """
    onnxruntime = import_optional("onnxruntime", _USE, EXTRA)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors: the rest is about the machine, not about the file
    if optimized is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def operations(path: Path) -> Counter[str]:
    """How often each operation occurs in the file."""
    return Counter(node.op_type for node in _graph(path).graph.node)


def _graph(path: Path) -> Any:
    """The file, which is all that is read.

    Raises:
        UnsafeFileError: it takes weights from other files.
    """
    onnx = import_optional("onnx", _USE, EXTRA)
    proto = onnx.load(path, load_external_data=False)
    for tensor in _tensors(proto, onnx.TensorProto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            named = {entry.key: entry.value for entry in tensor.external_data}
            raise UnsafeFileError(
                f"{path} takes the weights {tensor.name!r} from the file "
                f"{named.get('location')!r}: refused, for nothing but the file itself is read. "
                "Save it in one: onnx.save(onnx.load(FILE), FILE)"
            )
    return proto


def _tensors(message: Any, kind: type) -> Iterator[Any]:
    """All tensors, in whatever part of a message."""
    from google.protobuf.message import Message  # which onnx needs

    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if isinstance(value, Message) else value:
                yield from [inner] if isinstance(inner, kind) else _tensors(inner, kind)
