"""Export under a limit of file size; prints each format's error: export_with_a_limit.py FOLDER."""

import json
import resource
import sys

import coreai_torch  # noqa: F401  (before the limit: some write files of their own)
import coremltools  # noqa: F401
import executorch.exir  # noqa: F401
import litert_torch  # noqa: F401
import onnxruntime  # noqa: F401
from torch import nn

from mobileone.export import export_model
from tests.helpers.formats import OF_FLOATS
from tests.helpers.tiny import tiny_spec

wide = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 1024, 1), nn.ReLU()]
head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 3)]
model = nn.Sequential(*wide, *head).eval()
resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, 80_000))
said = {}
for name in OF_FLOATS:
    try:
        export_model(model, tiny_spec(), sys.argv[1], [name])
    except Exception as error:
        said[name] = str(error)
print(json.dumps(said))
