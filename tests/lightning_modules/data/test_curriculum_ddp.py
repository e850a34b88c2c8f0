"""Progressive learning on two processes: every switch comes on the same step on all ranks."""

import json

import pytest

# The operation is replaced by one that paints an image in the angle by which it would be turned:
# what is recorded is the magnitude that the workers' transform really used.
SCRIPT = """
import json, os, sys
import timm.data.auto_augment as augment, torch
from PIL import Image
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from callbacks.curriculum import Curriculum
from lightning_modules.data.datamodule import ImageDataModule

root, out = sys.argv[1:]


def paint(image, degrees, **options):
    return Image.new("RGB", image.size, (round(9 * abs(degrees)),) * 3)


augment._RAND_TRANSFORMS[:] = ["Rotate"]
augment.NAME_TO_OP["Rotate"] = paint


class Records(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], set()

    def training_step(self, batch, batch_idx):
        degrees = batch[0] * 255 / 9
        assert degrees.min() == degrees.max(), "all images of a batch have one magnitude"
        magnitude = float(degrees.max()) / 3  # timm turns by 30 degrees at magnitude 10
        self.seen.append([self.global_step, batch[0].shape[-2], round(magnitude, 1)])
        return self.weight * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        self.validated.add(batch[0].shape[-2])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train(name, workers, ckpt_path=None):
    data = ImageDataModule(root, input_size=32, batch_size=4, num_workers=workers, seed=3,
                           persistent_workers=workers > 0, mean=(0.0,), std=(1.0,), hflip=0.0,
                           auto_augment="rand-m9-n1-p1.0")
    module = Records()
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=6, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
        callbacks=[Curriculum([(0, 16, 0.3), (100, 24, 0.7), (200, 32, 1.0)]),
                   ModelCheckpoint(f"{out}/{name}", filename="{step}", save_top_k=-1,
                                   every_n_train_steps=1)],
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    assert trainer.world_size == 2 and module.validated == {32}
    with open(f"{out}/{name}-{trainer.global_rank}.json", "w") as file:
        json.dump(module.seen, file)


if __name__ == "__main__":
    train("alone", 0)
    train("persistent", 2)
    for step in (6, 7, 10):
        train(f"from-{step}", 1, f"{out}/persistent/step={step}.ckpt")
"""
# three steps an epoch; sizes and 9 times the strengths of the phases from epochs 0, 2 and 4
SCHEDULE = [
    [step, *phase]
    for start, phase in ((0, (16, 2.7)), (6, (24, 6.3)), (12, (32, 9.0)))
    for step in range(start, start + 6)
]


@pytest.mark.slow
def test_all_ranks_switch_size_and_strength_on_the_same_step(make_folder, tmp_path, two_processes):
    """Without workers, with persistent ones, and resumed: at a switch, after it, in a phase."""
    root = make_folder({"train": {"a": 12, "b": 12}, "val": {"a": 2, "b": 2}})
    two_processes(SCRIPT, tmp_path, root, tmp_path)
    starts = {"alone": 0, "persistent": 0, "from-6": 6, "from-7": 7, "from-10": 10}
    for name, start in starts.items():
        ranks = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        assert ranks == [SCHEDULE[start:]] * 2, name
