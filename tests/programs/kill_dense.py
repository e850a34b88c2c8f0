"""Start `mobileone` with these words twice and kill it: at step 3, then at the end's checkpoints.

This process computes nothing, so that the forked children may use torch's threads.
"""

import os
import sys

from callbacks import checkpointing
from lightning_modules.cli.main import main
from lightning_modules.dense import models


def kill_before(owner, name, condition):
    """Kill this process at the first call of a function for which a condition holds."""
    real = getattr(owner, name)

    def mined(*args):
        if condition(*args):
            os.kill(os.getpid(), 9)
        return real(*args)

    setattr(owner, name, mined)


MINES = [
    (models._DenseModule, "on_train_batch_start", lambda module, *_: module.global_step == 3),
    # between the best checkpoint and the last one
    (
        checkpointing,
        "save_complete",
        lambda t, p, *_: p.name == "last.ckpt" and t.current_epoch == 2,
    ),
]
for mine in MINES:
    if (pid := os.fork()) == 0:
        kill_before(*mine)
        try:
            main(sys.argv[1:])
        finally:
            sys.stdout.flush()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
