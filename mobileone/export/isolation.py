"""Work next to a training run without leaving a trace in it."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["isolated"]


@contextmanager
def isolated() -> Iterator[None]:
    """Restore on exit every random state and mode that a CPU export could touch.

    Covers the generators of torch (CPU), numpy and `random`, the warning filters, gradient and
    inference mode, autocast and cuDNN's flags. Inside, all of these modes are off: an export
    does the same at the end of a validation as by itself.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cudnn = torch.backends.cudnn
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic),
            warnings.catch_warnings(),
        ):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
