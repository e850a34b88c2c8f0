"""Train and test on two processes, which Lightning starts: metrics_on_two_ranks.py IMAGES FOLDER.

Writes end.ckpt, and result.json with the metrics and the count of the confusion matrix.
"""

import json
import sys
from pathlib import Path

import torch

from callbacks.ema import EMA
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.recipe.classifier import ImageClassifier
from tests.helpers.trainer import fit

if __name__ == "__main__":
    root, out = sys.argv[1:]
    torch.manual_seed(1)
    model = ImageClassifier("test_byobnet", num_classes=2, lr=0.01)
    data = ImageDataModule(root, batch_size=4, input_size=32, seed=3, num_workers=0)
    ranks = {"devices": 2, "strategy": "ddp", "max_epochs": 2, "val_check_interval": 2}
    trainer = fit(out, model, data, EMA(0.9), **ranks)
    result = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    trainer.save_checkpoint(f"{out}/end.ckpt")
    result.update(trainer.test(model, data, verbose=False)[0])
    if trainer.is_global_zero:
        result["confusion"] = int(model.test_confusion.sum())
        Path(out, "result.json").write_text(json.dumps(result))
