"""Integer files of a quantized network: each runtime's dialect of the one program.

The float format writes the file; before that, the layers of integers are put in the words that its
converter understands. No scale is estimated: all are the network's.
"""

import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mobileone.export.formats import coreml, executorch, litert, onnx
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.integers import Grid
from mobileone.export.verify.mlprogram import MLProgram
from mobileone.io.optional_import import import_optional
from mobileone.quantization.deployed import QuantizedConv2d, QuantizeDequantize, QuantizedLinear

__all__ = ["INTEGER", "ROADS", "Road"]


class Road(NamedTuple):
    """How an integer file of a format is written, and what it then has inside."""

    write: Callable[[nn.Module, ExportSpec, Path, Metadata], Mapping[str, Any]]
    operations: Callable[[Path], Counter[str]]
    grids: Callable[[Path], list[Grid]]


_Q = torch.ops.quantized_decomposed
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
    others = found.pop("conv", 0) - integer
    return found + Counter({INTEGER: integer, _FLOAT: others})  # without zeros


def _coreml_grids(path: Path) -> list[Grid]:
    """Scale and zero point of each `quantize`, in the precision of the program."""
    return MLProgram(path).grids()


# -- ExecuTorch and LiteRT: activations from -128 ------------------------------------------------


def _signed(network: nn.Module) -> nn.Module:
    """A copy whose activations are int8: the same numbers, with other codes."""
    copied = deepcopy(network)
    for module in copied.modules():
        if isinstance(module, QuantizeDequantize):
            module.signed = True
    return copied


class _DynamicRounding(nn.Module):
    """Round each input to int8 by its own extremes.

    XNNPACK multiplies integers into floats, such as logits are, only after this: with a fixed step
    it would round its output as well.
    """

    def forward(self, x: Tensor) -> Tensor:
        limits = (-128, 127, torch.int8)
        scale, zero = _Q.choose_qparams.tensor(x, -128, 127, 1e-12, torch.int8)
        codes = _Q.quantize_per_tensor.tensor(x, scale, zero, *limits)
        return cast(Tensor, _Q.dequantize_per_tensor.tensor(codes, scale, zero, *limits))


def _write_executorch(
    model: nn.Module, spec: ExportSpec, path: Path, metadata: Metadata
) -> dict[str, Any]:
    """Save a program for XNNPACK's integer kernels; see `executorch.write`."""
    network = _signed(model)
    for layer in network.modules():
        if isinstance(layer, QuantizedLinear) and isinstance(layer.output, nn.Identity):
            layer.input = nn.Sequential(layer.input, _DynamicRounding())  # type: ignore[assignment]
    return {**executorch.write(network, spec, path, metadata), "quantized": True}


def _executorch_operations(path: Path) -> Counter[str]:
    """How often each operation occurs; `conv.integer` has integers for input and weights."""
    found = executorch.operations(path)
    kinds = found.pop("conv2d", 0) + found.pop("depthwise_conv2d", 0)
    integer = 0
    for graph in executorch.graphs(path):
        quantized = [value.number(0, "B") == 2 for value in graph.tables(2)]
        nodes = [node for node in graph.tables(1) if node.number(0, "B") in (7, 13)]
        parts = [[node.table(1).number(field) for field in (15, 16)] for node in nodes]
        integer += sum(all(quantized[part] for part in pair) for pair in parts)
    return found + Counter({INTEGER: integer, _FLOAT: kinds - integer})


def _executorch_grids(path: Path) -> list[Grid]:
    """Scale and zero point of each value of one step."""
    found = []
    for graph in executorch.graphs(path):
        for value in graph.tables(2):
            quantized = value.table(1)
            if value.number(0, "B") == 2 and quantized.number(1, "B") == 2:
                step = quantized.table(2)
                (scale,) = struct.unpack("<f", struct.pack("<I", step.number(0)))
                found.append((scale, step.number(1, "i") + 128))
    return found


class _RoundedWeight(nn.Module):
    """Numbers that become integers: LiteRT's converter takes no integers for weights."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("number", weight)

    def forward(self, _: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        grid = (scale, zero, 0, -128, 127, torch.int8)
        codes = _Q.quantize_per_channel(self.number, *grid)
        return cast(Tensor, _Q.dequantize_per_channel(codes, *grid))


def _write_litert(
    model: nn.Module, spec: ExportSpec, path: Path, metadata: Metadata
) -> dict[str, Any]:
    """Save a model of integers; see `litert.write`.

    The converter leaves a linear layer in floats whose output is not rounded: it gets its integers
    back, and the runtime rounds its input by its own extremes.
    """
    network = _signed(model)
    for layer in network.modules():
        if isinstance(layer, (QuantizedConv2d, QuantizedLinear)):
            weight = _RoundedWeight(layer.dequantized_weight().detach())
            layer.dequantize = weight  # type: ignore[assignment]
    interface = litert.write(network, spec, path, metadata, quantized=True)
    schema, written = _litert_model(path)
    linear = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    for graph in written.subgraphs:
        for tensor in graph.tensors:
            _restore(schema, tensor, written.buffers[tensor.buffer], linear)
    builder = _builder()
    builder.Finish(written.Pack(builder), b"TFL3")
    path.write_bytes(litert.finished(bytes(builder.Output()), spec))
    return {**interface, "quantized": True}


def _restore(schema: Any, tensor: Any, buffer: Any, layers: Sequence[QuantizedLinear]) -> None:
    """Put a layer's integers in the place of its weights in floats."""
    for layer in layers:
        floats = layer.dequantized_weight().detach().numpy()
        if buffer.data is not None and bytes(buffer.data) == floats.tobytes():
            buffer.data = layer.weight.detach().flatten().view(torch.uint8).numpy()
            tensor.type, step = schema.TensorType.INT8, schema.QuantizationParametersT()
            step.scale, step.zeroPoint = layer.weight_scale.numpy(), layer.weight_zero.numpy()
            tensor.quantization = step


def _builder() -> Any:
    """A writer that keeps equal vectors once: zero points are a tenth of so small a file."""
    flatbuffers = import_optional("flatbuffers", "the `litert_int8` format", "flatbuffers")

    class Builder(flatbuffers.Builder):  # type: ignore[name-defined]
        kept: dict[tuple[str, bytes], int]

        def CreateNumpyVector(self, values: Any) -> Any:
            key = (values.dtype.str, values.tobytes())
            if key not in self.kept:
                self.kept[key] = super().CreateNumpyVector(values)
            return self.kept[key]

    builder = Builder(1024)
    builder.kept = {}
    return builder


def _litert_model(path: Path) -> tuple[Any, Any]:
    schema = import_optional(
        "ai_edge_litert.schema_py_generated", "the `litert_int8` format", "litert"
    )
    return schema, schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)


def _litert_operations(path: Path) -> Counter[str]:
    """How often each operation occurs; `conv.integer` has integers for input and weights."""
    schema, model = _litert_model(path)
    found = litert.operations(path)
    total = found.pop("conv_2d", 0) + found.pop("depthwise_conv_2d", 0)
    kinds = {schema.BuiltinOperator.CONV_2D, schema.BuiltinOperator.DEPTHWISE_CONV_2D}
    integer = sum(
        all(graph.tensors[i].type == schema.TensorType.INT8 for i in operator.inputs[:2])
        for graph in model.subgraphs
        for operator in graph.operators
        if model.operatorCodes[operator.opcodeIndex].builtinCode in kinds
    )
    return found + Counter({INTEGER: integer, _FLOAT: total - integer})


def _litert_grids(path: Path) -> list[Grid]:
    """Scale and zero point of each tensor of one step."""
    _, model = _litert_model(path)
    steps = [tensor.quantization for graph in model.subgraphs for tensor in graph.tensors]
    return [
        (float(step.scale[0]), int(step.zeroPoint[0]) + 128)
        for step in steps
        if step is not None and step.scale is not None and len(step.scale) == 1
    ]


ROADS = {
    "onnx": Road(_write_onnx, _onnx_operations, _onnx_grids),
    "coreml": Road(_write_coreml, _coreml_operations, _coreml_grids),
    "executorch": Road(_write_executorch, _executorch_operations, _executorch_grids),
    "litert": Road(_write_litert, _litert_operations, _litert_grids),
}
