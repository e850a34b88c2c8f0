"""ONNX with 8-bit weights and activations, by onnxruntime's static quantization."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from mobileone.export.formats import onnx
from mobileone.export.spec import ExportSpec
from mobileone.io.optional_import import import_optional

__all__ = ["correct", "quantize"]

_USE = "ONNX int8"
_LAYERS = ("Conv", "Gemm")
Floats = np.ndarray[Any, Any]


def quantize(source: Path, path: Path, calibration: Tensor) -> None:
    """Activation ranges from the calibration images; one weight scale an output channel."""
    quantization = import_optional("onnxruntime.quantization", _USE, onnx.EXTRA)
    prepared = _prepared(source)
    quantization.quant_pre_process(str(source), str(prepared))
    quantization.quantize_static(
        str(prepared),
        str(path),
        _Reader(calibration),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )


def correct(
    compress: Callable[[Path, Path, Tensor], None],
    network: nn.Module,
    spec: ExportSpec,
    source: Path,
    path: Path,
    calibration: Tensor,
) -> None:
    """Correct the biases of a quantized file, by its own arithmetic: see `compress/coreml.py`."""
    proto = import_optional("onnx", _USE, onnx.EXTRA)
    quantized = proto.load(path)
    expected = _means(proto.load(_prepared(source)), calibration)
    for name, mean in expected.items():  # in order: each sees those before it corrected
        shift = mean - _means(quantized, calibration, only=name)[name]
        _add_to_bias(quantized.graph, name, shift)
    proto.save(quantized, path)


def _prepared(source: Path) -> Path:
    return source.with_name(f"prepared-{source.name}")


class _Reader:
    """Calibration images as onnxruntime asks for them, one by one."""

    def __init__(self, images: Tensor) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._images, None)
        return None if image is None else {"images": image[None].numpy()}


def _means(model: Any, images: Tensor, only: str | None = None) -> dict[str, Floats]:
    """The mean output of each layer by channel, in order of execution; of one layer if named."""
    proto = import_optional("onnx", _USE, onnx.EXTRA)
    watched = copy.deepcopy(model)
    graph, names, outputs = watched.graph, [], []
    for node in list(graph.node):
        if node.op_type not in _LAYERS or only not in (None, node.name):
            continue
        axes = [0, 2, 3] if node.op_type == "Conv" else [0]  # all but the channel
        mean, key = f"{node.output[0]}_mean", f"{node.output[0]}_axes"
        graph.initializer.append(proto.numpy_helper.from_array(np.array(axes), key))
        graph.node.append(
            proto.helper.make_node("ReduceMean", [node.output[0], key], [mean], keepdims=0)
        )
        names.append(node.name)
        outputs.append(proto.helper.make_tensor_value_info(mean, proto.TensorProto.FLOAT, None))
    del graph.output[:]
    graph.output.extend(outputs)
    run = onnx.session(watched.SerializeToString()).run
    found = [run(None, {"images": image[None].numpy()}) for image in images]
    layers = zip(names, zip(*found, strict=True), strict=True)
    return {name: np.mean(values, axis=0) for name, values in layers}


def _add_to_bias(graph: Any, layer: str, shift: Floats) -> None:
    """Biases are 32-bit integers with a scale, or numbers."""
    proto = import_optional("onnx", _USE, onnx.EXTRA)
    (node,) = [n for n in graph.node if n.name == layer]
    if len(node.input) < 3:
        raise ValueError(f"the layer {layer!r} has no bias to correct")
    stored = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: n for n in graph.node for name in n.output}
    name = node.input[2]
    if name in stored:
        tensor = stored[name]
        value = proto.numpy_helper.to_array(tensor) + shift.astype(np.float32)
    else:
        data, scale = producers[name].input[:2]
        tensor, step = stored[data], proto.numpy_helper.to_array(stored[scale])
        steps = np.round(shift.astype(np.float64) / step)
        limits = np.iinfo(np.int32)
        whole = proto.numpy_helper.to_array(tensor).astype(np.float64) + steps
        value = whole.clip(limits.min, limits.max).astype(np.int32)
    tensor.CopyFrom(proto.numpy_helper.from_array(value, tensor.name))
