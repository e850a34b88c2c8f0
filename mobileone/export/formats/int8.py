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
from mobileone.export.verify.integers import INTEGER, LINEAR, Contents, Grid, four_channels, packed
from mobileone.export.verify.mlprogram import MLProgram
from mobileone.io.noise import quiet
from mobileone.io.optional_import import import_optional
from mobileone.quantization import Scheme, scheme_of
from mobileone.quantization.deployed import QuantizedConv2d, QuantizeDequantize, QuantizedLinear
from mobileone.quantization.rounding import FEW_BITS

__all__ = ["ROADS", "Road"]


class Road(NamedTuple):
    """How an integer file of a format is written, what it then has inside, and packages it needs.

    Among the operations are `conv.integer`, convolutions whose input and weights are integers, and
    `linear.integer`, linear layers whose weights are. Other convolutions do not count as such.
    """

    write: Callable[[nn.Module, ExportSpec, Path, Metadata], Mapping[str, Any]]
    read: Callable[[Path], Contents]
    needs_for_4_bits: tuple[str, ...] = ()


_Q = torch.ops.quantized_decomposed
_USE = "a file of integers"
_FLOAT = "float_conv"
_OPSET = 21  # of ONNX: the first with 4 bits


def _described(scheme: Scheme | None, packed: bool = True) -> dict[str, Any]:
    """What the manifest says of the weights."""
    return {"quantized": True, "weight_bits": 4 if packed and scheme in FEW_BITS else 8}


# -- ONNX ----------------------------------------------------------------------------------------


def _write_onnx(
    model: nn.Module, spec: ExportSpec, path: Path, metadata: Metadata
) -> dict[str, Any]:
    """Save the graph with QuantizeLinear and DequantizeLinear nodes; see `onnx.write`."""
    network, scheme = _with_four_channels(model), scheme_of(model)
    interface = onnx.write(network, spec, path, metadata)
    if scheme in FEW_BITS:
        interface["opset"] = _pack_onnx(path, tables=scheme == "palette4")
    return {**interface, **_described(scheme)}


def _with_four_channels(network: nn.Module) -> nn.Module:
    """A copy whose first convolution reads a multiple of four channels, the last ones zero.

    onnxruntime gathers integers channel by channel, a few bytes at once: with three channels, this
    layer alone took a quarter of the time.
    """
    copied = deepcopy(network)
    first = next(m for m in copied.modules() if isinstance(m, (QuantizedConv2d, QuantizedLinear)))
    missing = -first.weight.shape[1] % 4
    if isinstance(first, QuantizedConv2d) and first.groups == 1 and missing:
        weight, zeros = four_channels(first.weight.detach()), nn.ZeroPad3d((0, 0, 0, 0, 0, missing))
        first.weight = nn.Parameter(weight, requires_grad=False)
        first.input = nn.Sequential(zeros, first.input)  # type: ignore[assignment]
    return copied


def _pack_onnx(path: Path, tables: bool) -> int:
    """Store weights in 4 bits; the opset.

    onnxruntime unpacks them when it loads the file. It multiplies floats where a weight of 4 bits
    is dequantized at once, without the cast.
    """
    package = import_optional("onnx", _USE, onnx.EXTRA)
    node, kinds = package.helper.make_node, package.TensorProto
    contents = package.load(path)
    graph, unpacked = contents.graph, list[Any]()
    weights = [t for t in graph.initializer if t.data_type == kinds.INT8 and len(t.dims) > 1]
    for weight in weights:
        name, kind = weight.name, kinds.INT4
        codes = torch.from_numpy(package.numpy_helper.to_array(weight).copy())
        if tables:
            kind, (table, codes) = kinds.UINT4, codes.unique(return_inverse=True)
            graph.initializer.append(
                package.numpy_helper.from_array(table.numpy(), f"{name}.table")
            )
            unpacked.append(node("Cast", [name], [f"{name}.indices"], to=kinds.INT32))
            unpacked.append(node("Gather", [f"{name}.table", f"{name}.indices"], [f"{name}.codes"]))
        else:
            unpacked.append(node("Cast", [name], [f"{name}.codes"], to=kinds.INT8))
        raw = packed(codes, 4)
        weight.CopyFrom(package.helper.make_tensor(name, kind, weight.dims, raw, raw=True))
    names = {weight.name for weight in weights}
    for reader in graph.node:
        if reader.op_type == "DequantizeLinear" and reader.input[0] in names:
            reader.input[0] += ".codes"
    others = list(graph.node)
    del graph.node[:]
    graph.node.extend([*unpacked, *others])
    contents.opset_import[0].version = _OPSET
    package.checker.check_model(contents, full_check=True)
    package.save(contents, path)
    return _OPSET


def _read_onnx(path: Path) -> Contents:
    """What onnxruntime runs after it has fused the graph, and the file's own linear layers.

    It multiplies the integers of a linear layer as floats where the output is not rounded.
    """
    package = import_optional("onnx", _USE, onnx.EXTRA)
    with tempfile.TemporaryDirectory() as folder:
        fused = Path(folder) / "fused.onnx"
        onnx.session(str(path), optimized=fused)
        nodes = package.load(fused).graph.node
    names = {"QLinearConv": INTEGER, "Conv": _FLOAT, "FusedConv": _FLOAT}
    operations = Counter(names.get(node.op_type, node.op_type) for node in nodes)
    graph = package.load(path).graph
    made = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    values = {
        t.name: package.numpy_helper.to_array(t).item() for t in graph.initializer if not t.dims
    }
    grids: list[Grid] = []
    for node in graph.node:
        source = made.get(node.input[0]) if node.input else None
        if node.op_type == "DequantizeLinear" and source and source.op_type == "QuantizeLinear":
            own, given = ((values[n.input[1]], values[n.input[2]]) for n in (node, source))
            grids += [own] * readers[node.output[0]] if own == given else []
        elif node.op_type in ("Gemm", "MatMul"):
            weight = made.get(node.input[1])
            if weight is not None and weight.op_type == "Transpose":
                weight = made.get(weight.input[0])
            operations[LINEAR] += weight is not None and weight.op_type == "DequantizeLinear"
    return Contents(operations, grids)


# -- Core ML -------------------------------------------------------------------------------------


def _write_coreml(
    model: nn.Module, spec: ExportSpec, path: Path, metadata: Metadata
) -> dict[str, Any]:
    """Save a package for the first iOS that has its weights and activations; see `coreml.write`.

    Core ML turns integers of 4 bits into such itself.
    """
    scheme = scheme_of(model) or "int8"
    options = {"pass_pipeline": _tables()} if scheme == "palette4" else {}
    model, target = deepcopy(model), _TARGETS[scheme]
    interface = coreml.write(model, spec, path, metadata, target=target, **options)
    return {**interface, **_described(scheme)}


# tables with a scale a channel behind them are of iOS 18, but wrong before iOS 26
_TARGETS: dict[Scheme, str] = {"int8": "iOS17", "int4": "iOS18", "palette4": "iOS26"}


def _tables() -> Any:
    """Passes of coremltools that store weights as indices into a table of their values."""
    with quiet():
        ct = import_optional("coremltools", _USE, "coremltools")
        optimize = import_optional("coremltools.optimize.coreml", _USE, "coremltools")
    config = optimize.OpPalettizerConfig(mode="unique", weight_threshold=0)
    chosen = optimize.OptimizationConfig(global_config=config)
    passes, name = ct.PassPipeline.DEFAULT, "compression::palettize_weights"
    passes.append_pass(name)
    passes.set_options(name, {"config": chosen, "joint_compression": True})
    return passes


def _read_coreml(path: Path) -> Contents:
    """Layers of integers are between dequantized ones; grids are in the program's precision."""
    program = MLProgram(path)
    found = program.operations()
    conv, linear = (program.integer_layers(kind) for kind in ("conv", "linear"))
    found += Counter({INTEGER: conv, _FLOAT: found.pop("conv", 0) - conv, LINEAR: linear})
    found["linear"] -= linear
    return Contents(+found, program.grids())


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
    """Save a program for XNNPACK's integer kernels; see `executorch.write`.

    Weights keep a byte: XNNPACK has no convolution of 4 bits.
    """
    network = _signed(model)
    for layer in network.modules():
        if isinstance(layer, QuantizedLinear) and isinstance(layer.output, nn.Identity):
            layer.input = nn.Sequential(layer.input, _DynamicRounding())  # type: ignore[assignment]
    interface = executorch.write(network, spec, path, metadata)
    return {**interface, **_described(scheme_of(model), packed=False)}


# of XNNPACK's nodes, by their number in `XNodeUnion`: the fields of input and weights
_CONVS, _LINEARS, _CONVERTS = {7: (15, 16), 13: (15, 16)}, {2: (0, 1)}, {18: (0,)}


def _read_executorch(path: Path) -> Contents:
    """Grids are those of the values that layers, and conversions to floats, read."""
    found, grids = executorch.operations(path), list[Grid]()
    others = found.pop("conv2d", 0) + found.pop("depthwise_conv2d", 0)
    for graph in executorch.graphs(path):
        values = graph.tables(2)
        for node in graph.tables(1):
            kind = node.number(0, "B")
            fields = (_CONVS | _LINEARS | _CONVERTS).get(kind, ())
            given = [values[node.table(1).number(field)] for field in fields]
            integer = [value.number(0, "B") == 2 for value in given]
            found[INTEGER] += kind in _CONVS and all(integer)
            found[LINEAR] += kind in _LINEARS and integer[1]
            if given and integer[0] and given[0].table(1).number(1, "B") == 2:  # of one step
                step = given[0].table(1).table(2)
                (scale,) = struct.unpack("<f", struct.pack("<I", step.number(0)))
                grids.append((scale, step.number(1, "i") + 128))
    found[_FLOAT] += others - found[INTEGER]
    found["fully_connected"] -= found[LINEAR]
    return Contents(+found, grids)


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
    back, and the runtime rounds its input by its own extremes. Weights keep a byte: the runtime
    reads 4 bits, but its fast kernels do not.
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
    return {**interface, **_described(scheme_of(model), packed=False)}


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
    flatbuffers = import_optional("flatbuffers", _USE, litert.EXTRA)

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
    schema = import_optional("ai_edge_litert.schema_py_generated", _USE, litert.EXTRA)
    return schema, schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)


def _read_litert(path: Path) -> Contents:
    """Grids are those of the tensors that operations read, not only move."""
    schema, model = _litert_model(path)
    names = {number: name.lower() for name, number in vars(schema.BuiltinOperator).items()}
    found, grids = Counter[str](), list[Grid]()
    for graph in model.subgraphs:
        for operator in graph.operators:
            name = names[model.operatorCodes[operator.opcodeIndex].builtinCode]
            given = [graph.tensors[i] for i in operator.inputs[:2]]
            integer = [tensor.type == schema.TensorType.INT8 for tensor in given]
            if name in ("conv_2d", "depthwise_conv_2d"):
                name = INTEGER if all(integer) else _FLOAT
            elif name in ("fully_connected", "batch_matmul") and integer[1]:
                name = LINEAR
            found[name] += 1
            written = _litert_grid(graph.tensors[operator.outputs[0]])
            read = [_litert_grid(tensor) for tensor in given]
            grids += [grid for grid in read if grid is not None and grid != written]
    return Contents(found, grids)


def _litert_grid(tensor: Any) -> Grid | None:
    """Scale and zero point of a tensor of one step."""
    step = tensor.quantization
    if step is None or step.scale is None or len(step.scale) != 1:
        return None
    return float(step.scale[0]), int(step.zeroPoint[0]) + 128


ROADS = {
    "onnx": Road(_write_onnx, _read_onnx, ("onnxruntime>=1.23",)),
    "coreml": Road(_write_coreml, _read_coreml),
    "executorch": Road(_write_executorch, _read_executorch),
    "litert": Road(_write_litert, _read_litert),
}
