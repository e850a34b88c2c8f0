"""What goes wrong in long runs: losses that are no numbers, hostile images, killed workers."""

import os
import signal

import pytest
import torch
from PIL import Image

from lightning_modules.data.dataloader import DataWorkerError
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.data.image_io import read_image
from lightning_modules.errors import WORKER_DIED, UnreadableImageError, message_for_user
from lightning_modules.recipe.classifier import ImageClassifier
from lightning_modules.recipe.nonfinite_guard import NonFiniteGuard, _finite
from tests.helpers.processes import run_on_two_ranks

LEFT_OUT = r"step \d+ \(epoch 0\) is left out: its (loss is|gradients are) not finite"


class Poisoned(ImageClassifier):
    """Its images are NaN in some batches of the first epoch."""

    bad = ()

    def training_step(self, batch, batch_idx):
        images, targets = batch
        if self.current_epoch == 0 and batch_idx in self.bad:
            images = images * torch.nan
        return super().training_step((images, targets), batch_idx)


@pytest.fixture
def fit(train, tmp_path):
    """Trains with bad batches: fit(bad=(1, 2), limit=2) -> checkpoint of the end."""

    def run(bad, limit, accumulate=1, kind=Poisoned):
        torch.manual_seed(1)
        model = kind("test_byobnet", num_classes=2, lr=0.05, skip_nonfinite=limit)
        model.bad = bad
        trainer = train(model, batch_size=2, epochs=2, accumulate_grad_batches=accumulate)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        return torch.load(tmp_path / "end.ckpt", weights_only=True)

    return run


def finite(state):
    return all(value.isfinite().all() for value in state.values())


class PoisonedGradient(ImageClassifier):
    """Its gradients are NaN in some steps of the first epoch, its losses are finite."""

    bad = ()

    def on_before_optimizer_step(self, optimizer):
        if self.current_epoch == 0 and self.global_step in self.bad:
            next(self.model.parameters()).grad[0] = torch.nan
        super().on_before_optimizer_step(optimizer)


@pytest.mark.parametrize(
    ("kind", "accumulate", "bad", "left_out"),
    [(Poisoned, 1, (1, 2, 4), 3), (Poisoned, 2, (1, 2), 2), (PoisonedGradient, 1, (1, 2, 4), 3)],
)
def test_bad_steps_are_left_out_and_everything_stays_clean(fit, kind, accumulate, bad, left_out):
    with pytest.warns(UserWarning, match=LEFT_OUT) as caught:
        saved = fit(bad, limit=2, accumulate=accumulate, kind=kind)
    assert sum("is left out" in str(w.message) for w in caught) == left_out  # two in a row, and one
    for part in ("state_dict", "current_model_state"):
        assert finite(saved[part])  # running statistics too
    momenta = saved["optimizer_states"][0]["state"].values()
    assert all(state["momentum_buffer"].isfinite().all() for state in momenta)


def test_a_step_that_is_left_out_moves_neither_weights_nor_statistics(fit):
    torch.manual_seed(1)
    before = ImageClassifier("test_byobnet", num_classes=2).state_dict()
    seen = {}

    class Look(Poisoned):
        def training_step(self, batch, batch_idx):
            seen.update({k: v.clone() for k, v in self.state_dict().items()})
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match=LEFT_OUT), pytest.raises(FloatingPointError):
        fit(bad=range(5), limit=3, kind=Look)
    assert all(torch.equal(seen[k], before[k]) for k in before)


def test_more_in_a_row_than_allowed_stop_the_run(fit):
    with (
        pytest.warns(UserWarning, match=LEFT_OUT),
        pytest.raises(FloatingPointError, match=r"loss is nan at step 3.*skip_nonfinite"),
    ):
        fit(bad=(1, 2, 3), limit=2)


def test_a_gradient_that_is_no_number_stops_before_it_reaches_the_weights(fit):
    with pytest.raises(FloatingPointError, match=r"loss is finite, but its gradients .* step 3"):
        fit(bad=(3,), limit=0, kind=PoisonedGradient)


def test_an_infinite_loss_spoils_its_gradients_for_the_other_ranks_to_see():
    guard = NonFiniteGuard(1)
    weight = torch.ones(1, requires_grad=True)
    guard.check_loss(weight.sum() + torch.inf).backward()
    assert weight.grad.isnan().all() and not guard.loss_is_finite


class PoisonedImage(ImageClassifier):
    """One image of a validation, or of the training, holds a NaN."""

    def __init__(self, *args, split, **options):
        super().__init__(*args, **options)

    def validation_step(self, batch, batch_idx):
        return super().validation_step(self._poisoned(batch, batch_idx, "val"), batch_idx)

    def training_step(self, batch, batch_idx):
        return super().training_step(self._poisoned(batch, batch_idx, "train"), batch_idx)

    def _poisoned(self, batch, batch_idx, split):
        if split == self.hparams["split"] and batch_idx == 1:
            batch[0][1, 0, 3, 3] = torch.nan
        return batch


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("val", r"validation's loss is nan.*images hold NaN.*\(the first: image 1 of batch 1,"),
        ("train", r"loss is nan at step 1 .*images hold NaN.*neither weights nor learning rate"),
    ],
)
def test_an_image_that_is_no_number_is_not_blamed_on_the_weights(train, split, said):
    model = PoisonedImage("test_byobnet", num_classes=2, lr=0.01, split=split)
    with pytest.raises(FloatingPointError, match=said):
        train(model, batch_size=2, epochs=1, num_sanity_val_steps=0)


@pytest.mark.slow
def test_of_two_processes_both_leave_a_step_out_or_both_stop(make_folder, tmp_path):
    """One has the bad batch; the other's loss is finite."""
    images = make_folder({"train": {"cat": 6, "dog": 4}, "val": {"cat": 4, "dog": 4}})
    run_on_two_ranks("nan_on_one_rank.py", images, tmp_path)
    ends = {p.stem: torch.load(p, weights_only=False) for p in tmp_path.glob("*.pt")}
    for part in ("weights", "average"):
        assert finite(ends["2-0"][part]) and len(ends["2-0"][part])
    assert all(torch.equal(v, ends["2-1"]["weights"][k]) for k, v in ends["2-0"]["weights"].items())
    assert [ends[end]["step"] for end in ("2-0", "2-1", "0-0", "0-1")] == [4, 4, 0, 0]
    assert "loss of another rank is not finite at step 0" in ends["0-0"]["said"]
    assert "loss is nan at step 0" in ends["0-1"]["said"]
    for rank in (0, 1):  # who reads one of them knows where to look
        said = ends[f"val-{rank}"]["said"]
        assert "images hold NaN" in said and "(the first: image 1 of batch 1 of rank 1, " in said


def test_without_bad_steps_the_option_changes_nothing(fit):
    ends = [fit(bad=(), limit=limit)["state_dict"] for limit in (0, 3)]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


@pytest.mark.filterwarnings("ignore")  # not the tests' own rule should stop it
def test_a_decompression_bomb_is_refused_before_it_is_decoded(pets, monkeypatch):
    """Pillow's limit, lowered: between once and twice the limit Pillow itself only warns."""
    for factor in (1.5, 3.0):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(24 * 20 / factor))
        data = ImageDataModule(str(pets), batch_size=2, input_size=16, num_workers=0)
        data.setup("fit")
        with pytest.raises(
            UnreadableImageError, match=r"more than \d+ pixels, .*decompression bombs.*skip_unread"
        ):
            next(iter(data.val_dataloader()))


def test_a_real_bomb_of_a_few_kilobytes(tmp_path):
    """A gigapixel PNG would take 1 GB once decoded."""
    import zlib

    def chunk(kind, data):
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    header = (32768).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with (
        (tmp_path / "bomb.png").open("rb") as file,
        pytest.raises((Image.DecompressionBombError, Image.DecompressionBombWarning)),
    ):
        read_image(file, "RGB")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_picture_counts(tmp_path, suffix):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    first, *others = [Image.new("RGB", (9, 9), color) for color in colors]
    lossless = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others, **lossless)
    with (tmp_path / f"a.{suffix}").open("rb") as file:
        assert read_image(file, "RGB").getpixel((4, 4)) == (255, 0, 0)


class KillsItself(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, key):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_data_worker_is_explained(pets):
    """As the system's out-of-memory killer does it."""
    data = ImageDataModule(str(pets), batch_size=2, input_size=16, num_workers=1)
    data.setup("fit")
    loader = data.train_dataloader()

    object.__setattr__(loader, "dataset", KillsItself())
    with pytest.raises(DataWorkerError, match=r"worker has died.*memory.*--data\.num_workers"):
        next(iter(loader))


def test_a_killed_worker_ends_in_one_line_wherever_the_run_is():
    """PyTorch raises from a signal handler, in whatever the main thread does just then."""
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert message_for_user(error) == WORKER_DIED
    assert message_for_user(RuntimeError("anything else")) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_every_precision_are_looked_at(dtype):
    parameters = [torch.nn.Parameter(torch.zeros(300, dtype=dtype)) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, torch.finfo(dtype).max)  # squares overflow
    assert _finite(optimizer)
    for value in (torch.nan, torch.inf):
        parameters[1].grad[7] = value
        assert not _finite(optimizer)
