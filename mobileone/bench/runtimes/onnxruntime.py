"""ONNX Runtime, on the processor: the file of the `onnx` format."""

from pathlib import Path
from typing import Any

from torch import Tensor

from mobileone.bench.inference.timing import Run

__all__ = ["load"]


def load(path: Path, x: Tensor, threads: int) -> Run:
    """Open a session with all optimizations of the graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # threads that spin after a run would take the processors from the next contender
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors: the rest is about the machine
    session = onnxruntime.InferenceSession(
        str(path.with_suffix(".onnx")), options, providers=["CPUExecutionProvider"]
    )
    feed = {"images": x.numpy()}

    def run() -> Any:
        return session.run(None, feed)[0]

    run()
    return run
