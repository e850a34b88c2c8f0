"""A module of a user's own, which registers a runtime: the ONNX file, run by its own session."""

import onnxruntime

from mobileone.bench.runtimes import RUNTIMES, Runtime, shipped


def load(path, x, threads):
    session = onnxruntime.InferenceSession(path.with_suffix(".onnx"))
    return lambda: session.run(None, {"images": x.numpy()})[0]


RUNTIMES["mine"] = Runtime(shipped("onnx"), load, packages=("onnxruntime",))
