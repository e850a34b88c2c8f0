"""Replace an artifact and be killed midway: kill_export.py FOLDER FORMAT POINT.

POINT: `writing` (its largest file is half there), `publishing` (all is written and checked) or
`replaced` (the new folder has its name, the older one is still to be removed).
"""

import dataclasses
import os
import signal
import sys

from mobileone.export import FORMATS, artifact, export_model
from mobileone.io import atomic
from tests.helpers.formats import network_for
from tests.helpers.tiny import tiny_spec

folder, name, point = sys.argv[1:]
row, swap = FORMATS[name], atomic._swap


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def write_half(model, spec, path, metadata):
    row.write(model, spec, path, metadata)
    files = [p for p in (path, *path.rglob("*")) if p.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    die()


if point == "writing":
    FORMATS[name] = dataclasses.replace(row, write=write_half)
elif point == "publishing":
    artifact.publish_folder = die
else:
    atomic._swap = lambda first, second: swap(first, second) and die()
export_model(network_for(name), tiny_spec(), folder, [name], overwrite=True)
