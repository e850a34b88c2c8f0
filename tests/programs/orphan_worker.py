"""Start an export that takes long, and wait; prints the process ids of the worker and of a child.

orphan_worker.py FOLDER
"""

import os
import sys
import time
from pathlib import Path

from torch import nn

from mobileone.export import ExportJob
from mobileone.export.worker import ExportWorker

folder = Path(sys.argv[1])
job = ExportJob(folder / "a.ckpt", folder / "out", ("torchscript",), network=nn.Flatten())
worker = ExportWorker(job, folder, 100)
child = os.fork()  # as a loader's process, which keeps what it inherits
if child:
    print(worker.pid, child, flush=True)
time.sleep(1000)
