"""ExecuTorch: a `.pte` program for XNNPACK, from pixels to probabilities, one image at a time.

Needs the extra `executorch`; its packages are imported by the functions that use them.
"""

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.export.formats.flatbuffer import Table
from mobileone.export.preprocess import for_device, one_by_one
from mobileone.export.spec import ExportSpec, Metadata
from mobileone.export.verify.parity import Runner
from mobileone.io.noise import quiet
from mobileone.io.optional_import import import_optional

__all__ = ["NEEDS", "graphs", "operations", "runner", "spec", "write"]

# the runtime is linked against one minor version of PyTorch
NEEDS = ("executorch>=1.5,<1.6", "torch>=2.14,<2.15")
_USE = "the `executorch` format"
_INSTALL = "mobileone-lightning[executorch]"
_SPEC = "spec"  # a method of the program that returns the spec, so that an app can ask for it


def write(
    model: nn.Module,
    spec: ExportSpec,
    path: Path,
    metadata: Metadata,
    outputs: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Convert `model` and save it to `path`; the method `spec` returns the spec as JSON.

    Args:
        model: fused network in eval mode, float32, on the CPU; (N, C, H, W) -> (N, classes).
        spec: what the model expects.
        path: file to write.
        metadata: not stored; the manifest keeps it.
        outputs: names of what the model returns; None for a classifier.

    Returns:
        Description of the input and the output for the manifest.

    Raises:
        ImportError: the extra is not installed.
    """
    network, given, _, interface = for_device(model, spec, outputs)
    with quiet():
        exir = import_optional("executorch.exir", _USE, _INSTALL)
        xnnpack = import_optional(
            "executorch.backends.xnnpack.partition.xnnpack_partitioner", _USE, _INSTALL
        )
        program = torch.export.export(network, tuple(given.values()))
        edge = exir.to_edge_transform_and_lower(
            program,
            partitioner=[xnnpack.XnnpackPartitioner()],
            constant_methods={_SPEC: spec.to_json()},
        )
        contents = edge.to_executorch().buffer
    path.write_bytes(contents)
    return {**interface, "backend": "xnnpack"}


def runner(path: Path, spec: ExportSpec) -> Runner:
    """The file as a function: 8-bit images (N, C, H, W) -> its outputs, as (N, classes).

    Raises:
        ImportError: the extra is not installed.
    """
    with quiet():
        runtime = import_optional("executorch.runtime", _USE, _INSTALL)
        program = runtime.Runtime.get().load_program(path)
        forward = program.load_method("forward")

    def run(image: Tensor) -> list[Tensor]:
        assert program  # the method reads its memory
        return [output.clone() for output in forward.execute([image.float()])]

    return one_by_one(run)


def spec(path: Path) -> ExportSpec:
    """The file's own metadata."""
    for plan in _program(path.read_bytes()).tables(1):
        if plan.content(0) == _SPEC.encode():
            texts = [v.table(1).content(0) for v in plan.tables(2) if v.number(0, "B") == _STRING]
            return ExportSpec.from_json(texts[0] if texts else "")
    return ExportSpec.from_json("")


def operations(path: Path) -> Counter[str]:
    """How often each operation occurs in the file: XNNPACK's, and calls of other kernels."""
    data = path.read_bytes()
    return Counter(_names(data, _program(data)))


def graphs(path: Path) -> list[Table]:
    """XNNPACK's graphs in the file, by the schema `XNNGraph`."""
    data = path.read_bytes()
    program = _program(data)
    return [
        _graph(data, program, delegate.table(1))
        for plan in program.tables(1)
        for delegate in plan.tables(7)
    ]


# -- The file, read by its schemas: `program.fbs`, and XNNPACK's `schema.fbs` --------------------

_STRING = 6  # of the union of a value's kinds
_KERNEL, _DELEGATE = 1, 2  # of an instruction's
_IN_SEGMENT = 1  # where a delegate's data may be


def _program(data: bytes) -> Table:
    if data[4:6] != b"ET":
        raise ValueError("not an ExecuTorch program")
    return Table(data)


def _names(data: bytes, program: Table) -> Iterator[str]:
    for plan in program.tables(1):
        kernels = [operator.content(0).decode() for operator in plan.tables(6)]
        graphs = [_graph(data, program, delegate.table(1)) for delegate in plan.tables(7)]
        for chain in plan.tables(5):
            for instruction in chain.tables(2):
                kind = instruction.number(0, "B")
                if kind == _KERNEL:
                    yield kernels[instruction.table(1).number(0)]
                elif kind == _DELEGATE:
                    nodes = graphs[instruction.table(1).number(0)].tables(1)
                    yield from (_xnnpack(node.number(0, "B")) for node in nodes)


def _graph(data: bytes, program: Table, reference: Table) -> Table:
    """XNNPACK's graph: a header of its own says where it is."""
    index = reference.number(1)
    if reference.number(0, "b") == _IN_SEGMENT:
        (base,) = struct.unpack_from("<Q", data, 24)  # of the extended header
        segment = program.tables(4)[index]
        start, size = base + segment.number(0, "Q"), segment.number(1, "Q")
        content = data[start : start + size]
    else:
        content = program.tables(3)[index].content(0)
    if content[4:8] != b"XH00":
        raise ValueError("a delegate that is not XNNPACK's")
    return Table(content[struct.unpack_from("<I", content, 10)[0] :])


def _xnnpack(kind: int) -> str:
    """The name of an operation by its number in the union `XNodeUnion`."""
    return _XNNPACK[kind - 1] if 0 < kind <= len(_XNNPACK) else f"operation {kind}"


_XNNPACK = """
    add fully_connected softmax sigmoid transpose clamp conv2d div resize_bilinear pad avg_pool
    minimum depthwise_conv2d max_pool multiply subtract floor convert global_avg_pool reshape
    argmax_pool sqrt ceiling hardswish leaky_relu maximum negate square elu abs prelu concatenate
    concatenate concatenate slice attention matmul concatenate conv_transpose2d rsqrt log gelu tanh
    exp sin copy cos
""".split()
