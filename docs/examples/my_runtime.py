"""A benchmark runtime; `mobileone benchmark latency … --imports '[my_runtime]'`."""

import torch

from mobileone.bench.runtimes import RUNTIMES, Runtime, shipped


def load(path, x, threads):  # -> a function that returns the logits
    torch.set_num_threads(threads)
    module = torch.jit.optimize_for_inference(torch.jit.load(path.with_suffix(".pt")).eval())
    return lambda: module(x)


RUNTIMES["optimized"] = Runtime(convert=shipped("torchscript"), load=load)
