"""Integer files of a quantized network: each runtime's dialect of the one program.

The float format writes the file; before that, the layers of integers are put in the words that its
converter understands. No scale is estimated: all are the network's.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from mobileone.export.formats import coreml, onnx
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.int8 import Grid
from mobileone.export.verify.mlprogram import MLProgram
from mobileone.io.optional_import import import_optional

__all__ = ["INTEGER", "ROADS", "Road"]


class Road(NamedTuple):
    """How an integer file of a format is written, and what it then has inside."""

    write: Callable[[nn.Module, ExportSpec, Path, Metadata], Mapping[str, Any]]
    operations: Callable[[Path], Counter[str]]
    grids: Callable[[Path], list[Grid]]


INTEGER = "conv.integer"  # a convolution of integers, among a file's operations
_FLOAT = "float_conv"  # one that is none: it does not count as a convolution

# -- ONNX ----------------------------------------------------------------------------------------


def _write_onnx(
    model: nn.Module, spec: ExportSpec, path: Path, metadata: Metadata
) -> dict[str, Any]:
    """Save the graph with QuantizeLinear and DequantizeLinear nodes; see `onnx.write`.

    What the converter notes at each node would be a quarter of so small a file: it is dropped.
    """
    interface = onnx.write(model, spec, path, metadata)
    package = import_optional("onnx", "the `onnx_int8` format", onnx.EXTRA)
    proto = package.load(path)
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    del proto.graph.value_info[:]
    package.save(proto, path)
    return {**interface, "quantized": True}


def _onnx_operations(path: Path) -> Counter[str]:
    """What onnxruntime runs after it has fused the graph: `conv.integer` are QLinearConv nodes."""
    package = import_optional("onnx", "the `onnx_int8` format", onnx.EXTRA)
    with tempfile.TemporaryDirectory() as folder:
        fused = Path(folder) / "fused.onnx"
        onnx.session(str(path), optimized=fused)
        nodes = package.load(fused).graph.node
    names = {"QLinearConv": INTEGER, "Conv": _FLOAT, "FusedConv": _FLOAT}
    return Counter(names.get(node.op_type, node.op_type) for node in nodes)


def _onnx_grids(path: Path) -> list[Grid]:
    """Scale and zero point of each QuantizeLinear node."""
    package = import_optional("onnx", "the `onnx_int8` format", onnx.EXTRA)
    graph = package.load(path).graph
    values = {
        t.name: package.numpy_helper.to_array(t).item() for t in graph.initializer if not t.dims
    }
    nodes = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    return [(values[node.input[1]], values[node.input[2]]) for node in nodes]


# -- Core ML -------------------------------------------------------------------------------------


def _write_coreml(
    model: nn.Module, spec: ExportSpec, path: Path, metadata: Metadata
) -> dict[str, Any]:
    """Save a package for iOS 17, which has 8-bit activations; see `coreml.write`."""
    interface = coreml.write(deepcopy(model), spec, path, metadata, target="iOS17")
    return {**interface, "quantized": True}


def _coreml_operations(path: Path) -> Counter[str]:
    """How often each operation occurs; `conv.integer` is between dequantized integers."""
    program = MLProgram(path)
    found = program.operations()
    integer = program.integer_layers("conv")
    return (
        found
        - Counter(conv=found["conv"])
        + Counter({INTEGER: integer, _FLOAT: found["conv"] - integer})
    )


def _coreml_grids(path: Path) -> list[Grid]:
    """Scale and zero point of each `quantize`, in the precision of the program."""
    return MLProgram(path).grids()


ROADS = {
    "onnx": Road(_write_onnx, _onnx_operations, _onnx_grids),
    "coreml": Road(_write_coreml, _coreml_operations, _coreml_grids),
}
