"""ONNX Runtime, on the processor."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.bench.inference.timing import Run

__all__ = ["convert", "load"]


def convert(model: nn.Module, x: Tensor, path: Path) -> None:
    """Export for the shape of `x`."""
    program = torch.onnx.export(
        model, (x.cpu(),), input_names=["images"], output_names=["logits"], dynamo=True,
        verbose=False,
    )  # fmt: skip
    assert program is not None
    program.save(path)


def load(path: Path, x: Tensor, threads: int) -> Run:
    """Open a session with all optimizations of the graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # threads that spin after a run would take the processors from the next contender
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors: the rest is about the machine
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"images": x.numpy()}

    def run() -> Any:
        return session.run(None, feed)[0]

    run()
    return run
