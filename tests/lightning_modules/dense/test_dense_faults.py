"""A dense run that is killed, meets NaN or a full disk, or finds its folder taken."""

import errno
import sys
from pathlib import Path

import pytest
import torch
import wandb
from lightning.pytorch import Trainer

from lightning_modules.cli.main import main
from lightning_modules.dense import saving
from lightning_modules.dense.models import Detector, Segmenter
from mobileone.io.atomic import directory_lock
from tests.helpers.bitwise import differing
from tests.helpers.command import error_of
from tests.helpers.processes import run_program
from tests.helpers.variants import slow

pytest.importorskip("segmentation_models_pytorch", reason="needs the extra `dense`")
pytest.importorskip("pycocotools", reason="needs the extra `dense`")

pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint's schedule of `lr` has 2 steps")

# two steps an epoch on four images, which are augmented; the FPN has dropout
COMMON = """
--model.model test_byobnet --model.optimizer momentum --data.batch_size 2 --data.num_workers 0
--trainer.max_epochs 3 --trainer.accelerator cpu --trainer.enable_progress_bar false
--trainer.num_sanity_val_steps 0
--wandb.mode disabled --resume auto --checkpoint.monitor epoch
""".split()
OWN = {
    "segment": ["--data.dataset", "voc", "--data.size", "32", "--model.architecture", "fpn"],
    "detect": ["--data.dataset", "coco", "--model.size", "64"],
}
TASKS = [slow("segment", "voc", Segmenter), ("detect", "coco", Detector)]


def words(task, root, *more):
    return [task, "fit", *COMMON, *OWN[task], "--data.root", str(root), *more]


def fit(task, root, *more):
    """A run in this process; its folder of checkpoints."""
    try:
        main(words(task, root, *more))
    finally:
        wandb.finish()
    return Path(f"runs/{task}/latest/checkpoints")


def finite(checkpoint):
    weights = torch.load(checkpoint, weights_only=True)
    both = *weights["state_dict"].values(), *weights["current_model_state"].values()
    return all(bool(tensor.isfinite().all()) for tensor in both)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.parametrize(("task", "dataset", "kind"), TASKS)
def test_a_killed_run_ends_as_one_that_was_never_killed(task, dataset, kind, request, capsys):
    """Killed within an epoch, and again between the end's two checkpoints."""
    root = request.getfixturevalue(dataset)
    command = words(task, root, "--run.root", "killed")
    # as many threads as this process: sums in another order have other last bits
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = run_program("kill_dense.py", *command, variables=threads)
    assert "snapshots/step=00000003.ckpt" in killed.stdout
    folder = fit(task, root, "--run.root", "killed").parents[2] / f"../killed/{task}/latest"
    assert "resumes from" in capsys.readouterr().out
    expected = torch.load(fit(task, root) / "last.ckpt", weights_only=True)
    assert expected["global_step"] == 6
    for name in ("last", "best"):
        found = torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)
        assert not differing(found, expected)


def poisoned(kind, monkeypatch, step):
    """Let the images of one step be NaN."""
    real = kind.on_train_batch_start

    def poison(self, batch, batch_idx):
        real(self, batch, batch_idx)
        for image in batch[0] if self.global_step == step else ():
            image.fill_(torch.nan)

    monkeypatch.setattr(kind, "on_train_batch_start", poison)


@pytest.mark.parametrize(("task", "dataset", "kind"), TASKS)
def test_a_loss_of_nan_stops_the_run(task, dataset, kind, request, capsys, monkeypatch):
    poisoned(kind, monkeypatch, step=3)
    root = request.getfixturevalue(dataset)
    aside = pytest.warns(UserWarning, match=r"step=00000003.ckpt.diverged is set aside")
    with aside, pytest.raises(SystemExit, match="2"):
        fit(task, root)
    said = capsys.readouterr()
    assert "the loss is nan at step 3 (epoch 1, learning rate" in said.err
    assert f"to continue: mobileone {task} fit --ckpt_path" in said.out
    assert "to ship it" not in said.out
    files = list(Path(f"runs/{task}/latest").resolve().rglob("*.ckpt"))
    assert {"best.ckpt", "last.ckpt"} <= {path.name for path in files}
    assert all(map(finite, files))


@pytest.mark.slow
def test_such_a_step_may_be_left_out(voc, monkeypatch):
    poisoned(Segmenter, monkeypatch, step=3)
    with pytest.warns(UserWarning, match=r"step 3 \(epoch 1\) is left out: its loss is"):
        folder = fit("segment", voc, "--model.skip_nonfinite", "1", "--trainer.max_epochs", "2")
    assert finite(folder / "last.ckpt")


def test_a_second_run_in_the_same_folder_is_refused(coco, capsys, monkeypatch):
    monkeypatch.setattr(saving, "_PATIENCE", 0.1)
    folder = fit("detect", coco, "--trainer.max_epochs", "1").resolve()
    before = {path: path.read_bytes() for path in folder.parent.rglob("*.ckpt")}
    with directory_lock(folder):
        assert f"another run writes to {folder}" in error_of(capsys, *words("detect", coco))
    assert before == {path: path.read_bytes() for path in folder.parent.rglob("*.ckpt")}
    fit("detect", coco)  # the folder is free again, and was left so
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 2


@pytest.mark.parametrize("name", ["best.ckpt", slow("last.ckpt")])
def test_a_full_disk_leaves_the_checkpoints_before_it_whole(coco, name, capsys, monkeypatch):
    folder = fit("detect", coco, "--trainer.max_epochs", "1").resolve()
    real = Trainer.save_checkpoint

    def full(self, filepath, *args, **kwargs):
        if Path(filepath).name != name:
            return real(self, filepath, *args, **kwargs)
        Path(filepath).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Trainer, "save_checkpoint", full)
    said = error_of(capsys, *words("detect", coco))
    assert f"{name} could not be written (No space left on device)" in said
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt"}
    epochs = {p.stem: torch.load(p, weights_only=True)["epoch"] for p in folder.iterdir()}
    assert epochs == {"best": 0 if name == "best.ckpt" else 1, "last": 0}
