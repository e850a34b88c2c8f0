"""Sums of the images that each of two ranks trains on: images_of_two_ranks.py IMAGES FOLDER."""

import json
import sys
from pathlib import Path

from lightning_modules.data.datamodule import ImageDataModule
from tests.helpers.modules import Recorder
from tests.helpers.trainer import fit

if __name__ == "__main__":
    root, out = sys.argv[1:]
    data = ImageDataModule(root, batch_size=2, input_size=16, seed=3, num_workers=1)
    recorder = Recorder(lambda module, b: [module.current_epoch, *b[0].sum((1, 2, 3)).tolist()])
    ranks = {"devices": 2, "strategy": "ddp"}
    trainer = fit(out, recorder, data, max_epochs=2, limit_val_batches=0, **ranks)
    Path(out, f"{trainer.global_rank}.json").write_text(json.dumps(recorder.trained))
