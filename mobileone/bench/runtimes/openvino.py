"""OpenVINO, on the processor, in float32."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobileone.bench.inference.timing import Run

__all__ = ["convert", "load"]


def convert(model: nn.Module, x: Tensor, path: Path) -> None:
    """Convert for the shape of `x`; writes `path`, an XML file, and the weights beside it."""
    import openvino

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # shapes are fixed
        converted = openvino.convert_model(model, example_input=x.cpu(), input=list(x.shape))
    openvino.save_model(converted, path.with_suffix(".xml"), compress_to_fp16=False)


def load(path: Path, x: Tensor, threads: int) -> Run:
    """Compile for latency."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        "ENABLE_CPU_PINNING": False,  # threads are pinned for all contenders alike
    }
    compiled = openvino.Core().compile_model(path.with_suffix(".xml"), "CPU", settings)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

    def run() -> Any:
        request.infer()
        return request.get_output_tensor(0).data

    run()
    return run
