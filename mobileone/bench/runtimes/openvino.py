"""OpenVINO, on the processor, in float32: the file of the `onnx` format."""

from pathlib import Path
from typing import Any

from torch import Tensor

from mobileone.bench.inference.timing import Run

__all__ = ["load"]


def load(path: Path, x: Tensor, threads: int) -> Run:
    """Compile for the shape of `x`, and for latency."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        "ENABLE_CPU_PINNING": False,  # threads are pinned for all contenders alike
    }
    core = openvino.Core()
    model = core.read_model(path.with_suffix(".onnx"))
    model.reshape(list(x.shape))
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

    def run() -> Any:
        request.infer()
        return request.get_output_tensor(0).data

    run()
    return run
