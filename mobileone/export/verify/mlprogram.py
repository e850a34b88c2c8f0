"""Core ML's ML programs read back from a written `.mlpackage`, and run without Core ML.

The program is the protobuf of the package, the weights are those of its weight file: nothing is
taken from the network that was converted. Arithmetic is float32; with `rounding`, every value that
the program states as half precision is rounded to it, as a device that computes in float16 with
wide accumulators does.
"""

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobileone.export.verify.mlprogram_ops import KERNELS
from mobileone.export.verify.parity import NotVerifiedError
from mobileone.io.noise import quiet
from mobileone.io.optional_import import import_optional

__all__ = ["MLProgram", "Prediction"]

_READERS = {
    "FLOAT16": "read_fp16_data",
    "FLOAT32": "read_float_data",
    "INT4": "read_int4_data",
    "UINT1": "read_uint1_data",
    "UINT2": "read_uint2_data",
    "UINT3": "read_uint3_data",
    "UINT4": "read_uint4_data",
    "INT8": "read_int8_data",
    "UINT8": "read_uint8_data",
    "INT16": "read_int16_data",
    "UINT16": "read_uint16_data",
    "INT32": "read_int32_data",
}
_PACKED = {
    "FLOAT16": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
}


@dataclass(frozen=True)
class Prediction:
    """What the program returns for a batch of images.

    Attributes:
        classes: the label of each column of the tables.
        probabilities: (N, classes).
        logits: what the softmax was given, (N, classes).
    """

    classes: tuple[str, ...]
    probabilities: Tensor
    logits: Tensor


@dataclass(frozen=True)
class _Operation:
    type: str
    arguments: dict[str, Any]  # names of earlier outputs are `_Name`, all else is a value
    outputs: tuple[tuple[str, str], ...]  # name and type of each

    @property
    def constant(self) -> bool:
        """True for values that do not depend on the image: literals and packed weights."""
        return self.type == "const" or self.type.startswith("constexpr_")


class _Name(str):
    """The name of another operation's output."""

    __slots__ = ()


class MLProgram:
    """A classifier in an `.mlpackage`.

    Args:
        path: the package.

    Raises:
        NotVerifiedError: it holds something that this evaluator does not know.
        ImportError: coremltools is not installed.
    """

    def __init__(self, path: Path) -> None:
        with quiet():
            import_optional("coremltools", "an .mlpackage", "coremltools")
            from coremltools.libmilstoragepython import _BlobStorageReader
            from coremltools.models.utils import load_spec

            spec = load_spec(str(path))
        if spec.WhichOneof("Type") == "pipeline":
            spec = spec.pipeline.models[0]  # the network; a suppression follows
        if spec.WhichOneof("Type") != "mlProgram" or len(spec.description.input) != 1:
            raise NotVerifiedError(f"{path} is not an ML program with one input")
        (self._input,) = spec.description.input
        (block,) = spec.mlProgram.functions["main"].block_specializations.values()
        self._weights = path / "Data" / "com.apple.CoreML" / "weights"
        self._open: dict[str, Any] = {}
        self._reader = _BlobStorageReader
        self._operations = [self._read(operation) for operation in block.operations]

    def operations(self) -> Counter[str]:
        """How often each operation occurs in the program; constants do not count."""
        return Counter(op.type for op in self._operations if op.type != "const")

    def layers(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of its convolutions and linear layers, in order of execution."""
        fixed = self._constants(rounding=True)
        return [
            (fixed[op.arguments["weight"]], _resolve(op.arguments.get("bias"), fixed))
            for op in self._operations
            if op.type in ("conv", "linear") and op.arguments["weight"] in fixed
        ]

    def integer_layers(self, kind: str) -> int:
        """How many layers of a type have integers for weights and for their input."""
        made_by = {name: op for op in self._operations for name, _ in op.outputs}
        types = {op.outputs[0][0]: op.outputs[0][1] for op in self._operations}

        def of_integers(op: _Operation) -> bool:
            given, weight = (made_by.get(op.arguments[name]) for name in ("x", "weight"))
            if given is None or given.type != "dequantize" or weight is None:
                return False
            if weight.type != "constexpr_blockwise_shift_scale":  # of iOS 18
                return weight.type == "constexpr_affine_dequantize"
            data = weight.arguments["data"]
            if isinstance(data, _Name):  # a table's
                return types[data] == "INT8"
            return not data.is_floating_point()

        return sum(of_integers(op) for op in self._operations if op.type == kind)

    def grids(self) -> list[tuple[float, int]]:
        """Scale and zero point, as a code 0..255, of each reading of a `dequantize`.

        One that states others than the `quantize` before it does not count.
        """
        fixed, found = self._constants(rounding=False), list[tuple[float, int]]()
        made_by = {name: op for op in self._operations for name, _ in op.outputs}
        readers = Counter(str(value) for op in self._operations for value in op.arguments.values())
        for op in self._operations:
            source = made_by.get(str(op.arguments.get("input")))
            if op.type != "dequantize" or source is None or source.type != "quantize":
                continue
            shift = 128 if _resolve(source.arguments["output_dtype"], fixed) == "int8" else 0
            own, given = (
                (
                    float(_resolve(each.arguments["scale"], fixed)),
                    int(_resolve(each.arguments.get("zero_point"), fixed) or 0) + shift,
                )
                for each in (op, source)
            )
            found += [own] * readers[op.outputs[0][0]] if own == given else []
        return found

    @torch.no_grad()
    def predict(self, images: Tensor, *, rounding: bool = True) -> Prediction:
        """Run the program on 8-bit images (N, C, H, W), RGB or gray, one by one.

        Raises:
            NotVerifiedError: an operation or an argument is unknown.
            ValueError: the images are not of the program's size.
        """
        made_by = {op.outputs[0][0]: op for op in self._operations}
        last = self._operations[-1]
        if last.type != "classify":
            raise NotVerifiedError("a program without `classify`")
        named = last.arguments["probabilities"]
        source = made_by[named]
        while source.type == "cast":
            source = made_by[source.arguments["x"]]
        if source.type != "softmax":
            raise NotVerifiedError("probabilities that are not those of a softmax")
        classes = tuple(_resolve(last.arguments["classes"], self._constants(rounding)))
        found = self.outputs(images, (named, source.arguments["x"]), rounding=rounding)
        probabilities, logits = (table.flatten(0, 1) for table in found)
        return Prediction(classes, probabilities, logits)

    @torch.no_grad()
    def outputs(
        self, images: Tensor, names: Sequence[str], *, rounding: bool = True
    ) -> tuple[Tensor, ...]:
        """Values that the program computes for 8-bit images (N, C, H, W), each (N, ...).

        Raises:
            NotVerifiedError: an operation, an argument or a name is unknown.
            ValueError: the images are not of the program's size.
        """
        fixed, rows = self._constants(rounding), []
        for image in images:
            values: dict[str, Any] = {**fixed, self._input.name: self._pixels(image)}
            for operation in self._operations:
                if not operation.constant and operation.type != "classify":
                    self._execute(operation, values, rounding)
            if missing := [name for name in names if name not in values]:
                raise NotVerifiedError(f"a program without the outputs {missing}")
            rows.append([values[name] for name in names])
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def _constants(self, rounding: bool) -> dict[str, Any]:
        """The values that do not depend on the image."""
        fixed: dict[str, Any] = {}
        for operation in self._operations:
            if operation.constant:
                self._execute(operation, fixed, rounding)
        return fixed

    def _pixels(self, image: Tensor) -> Tensor:
        """(C, H, W) of 0..255 as the program is given them: (1, C, H, W) in its color order."""
        if self._input.type.WhichOneof("Type") == "multiArrayType":
            shape = tuple(self._input.type.multiArrayType.shape)[1:]
            order = "as it is"
        else:
            described = self._input.type.imageType
            order = described.ColorSpace.Name(described.colorSpace)
            if order not in ("RGB", "BGR", "GRAYSCALE"):
                raise NotVerifiedError(f"images of color space {order}")
            channels = 1 if order == "GRAYSCALE" else 3
            shape = (channels, described.height, described.width)
        if tuple(image.shape) != shape:
            raise ValueError(f"the program takes images of {shape}, not {tuple(image.shape)}")
        return (image.flip(0) if order == "BGR" else image)[None].float()

    @staticmethod
    def _execute(operation: _Operation, values: dict[str, Any], rounding: bool) -> None:
        """Put the output of an operation among the values."""
        given = {k: _resolve(v, values) for k, v in operation.arguments.items()}
        ((name, kind),) = operation.outputs
        value = given["val"] if operation.type == "const" else _call(operation.type, given)
        if rounding and kind == "FLOAT16":
            value = torch.as_tensor(value).half().float()
        values[name] = value

    # -- Reading ------------------------------------------------------------------------------

    def _read(self, operation: Any) -> _Operation:
        arguments: dict[str, Any] = {
            name: self._value(value) for name, value in operation.attributes.items()
        }
        arguments.pop("name", None)
        for name, argument in operation.inputs.items():
            bound = [
                _Name(a.name) if a.WhichOneof("binding") == "name" else self._value(a.value)
                for a in argument.arguments
            ]
            arguments[name] = bound[0] if len(bound) == 1 else bound
        outputs = tuple((o.name, _type_name(o.type)) for o in operation.outputs)
        return _Operation(operation.type, arguments, outputs)

    def _value(self, value: Any) -> Any:
        """A scalar, a string, a list of integers or strings, or a float tensor."""
        if value.type.WhichOneof("type") == "listType":
            return [self._value(v) for v in value.immediateValue.list.values]
        kind = _type_name(value.type)
        shape = [d.constant.size for d in value.type.tensorType.dimensions]
        if value.WhichOneof("value") == "blobFileValue":
            numbers = self._blob(value.blobFileValue, kind)
        else:
            tensor = value.immediateValue.tensor
            stored = getattr(tensor, tensor.WhichOneof("value")).values
            if kind == "STRING":
                return stored[0] if not shape else list(stored)
            packed = isinstance(stored, bytes)
            numbers = np.frombuffer(stored, _dtype(kind)) if packed else np.array(list(stored))
        if kind in ("FLOAT16", "FLOAT32"):
            floats = torch.from_numpy(numbers.astype(np.float32))
            return floats.reshape(shape) if shape else float(floats)
        if kind in _READERS and shape and kind != "INT32":
            return torch.from_numpy(numbers.astype(np.int32)).reshape(shape)
        return numbers.tolist() if shape else numbers.item()

    def _blob(self, value: Any, kind: str) -> np.ndarray[Any, Any]:
        if kind not in _READERS:
            raise NotVerifiedError(f"weights of type {kind}")
        file = self._weights / Path(value.fileName).name
        reader = self._open.setdefault(str(file), self._reader(str(file)))
        data = np.asarray(getattr(reader, _READERS[kind])(value.offset))
        return data.view(np.float16) if kind == "FLOAT16" else data


def _resolve(argument: Any, values: Mapping[str, Any]) -> Any:
    """The value of a name, of each name in a list, or what is a value already."""
    if isinstance(argument, list):
        return [_resolve(part, values) for part in argument]
    return values[argument] if isinstance(argument, _Name) else argument


def _call(kind: str, arguments: Mapping[str, Any]) -> Tensor:
    if kind not in KERNELS:
        raise NotVerifiedError(f"the reference evaluator does not know the operation `{kind}`")
    try:
        inspect.signature(KERNELS[kind]).bind(**arguments)
    except TypeError as error:
        raise NotVerifiedError(f"`{kind}` with {sorted(arguments)}: {error}") from error
    try:
        return KERNELS[kind](**arguments)
    except NotImplementedError as error:
        raise NotVerifiedError(f"`{kind}` with {error}") from error


def _type_name(kind: Any) -> str:
    if kind.WhichOneof("type") != "tensorType":
        return str(kind.WhichOneof("type"))
    return str(
        kind.tensorType.DESCRIPTOR.fields_by_name["dataType"]
        .enum_type.values_by_number[kind.tensorType.dataType]
        .name
    )


def _dtype(kind: str) -> Any:
    if kind not in _PACKED:
        raise NotVerifiedError(f"packed values of type {kind}")
    return _PACKED[kind]
