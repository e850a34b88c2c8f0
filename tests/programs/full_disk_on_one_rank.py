"""Train on two ranks while the disk of one is full at step 4: full_disk_on_one_rank.py FOLDER."""

import sys

from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import TorchCheckpointIO

from callbacks.snapshots import Snapshots
from tests.helpers.trainer import fit


class Full(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if "00000004" in str(path):
            raise OSError(28, "No space left on device")
        super().save_checkpoint(checkpoint, path, storage_options)


if __name__ == "__main__":
    snapshots = Snapshots(every_n_steps=2, every_minutes=0, keep=9)
    ranks = {"devices": 2, "strategy": "ddp", "plugins": [Full()]}
    limits = {"max_epochs": None, "max_steps": 8, "limit_val_batches": 0}
    options = {**ranks, **limits, "enable_checkpointing": True}
    trainer = fit(sys.argv[1], BoringModel(), None, snapshots, **options)
    line = f"done {trainer.global_rank} {trainer.global_step}"
    print(line + "\n", end="", flush=True)  # at once: the ranks share a pipe
