"""Mixup and cutmix in a training, against the loss written anew."""

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks.ema import EMA
from lightning_modules.recipe.classifier import ImageClassifier
from tests.helpers.bitwise import differing
from tests.helpers.trainer import SaveEachEpoch, fit

CLASSES, SMOOTHING = 5, 0.1


class Images(LightningDataModule):
    """Images whose value is their number, so that a mixed one says of which it was made."""

    def __init__(self, n=11, batch_size=4, classes=CLASSES):
        super().__init__()
        self.batch_size, self.targets = batch_size, torch.arange(n) % classes
        self.images = torch.arange(1.0, n + 1).view(-1, 1, 1, 1).expand(n, 3, 32, 32).clone()

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.images, self.targets), self.batch_size)

    val_dataloader = train_dataloader


class Seen(nn.Module):
    """A network's stand-in that keeps its inputs and outputs in training and evaluation."""

    def __init__(self, model):
        super().__init__()
        self.model, self.steps, self.evaluated = model, [], []

    def forward(self, images):
        logits = self.model(images)
        kept = self.steps if self.training else self.evaluated
        kept.append((images.clone(), logits.detach().clone()))
        return logits


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def classifier(classes=CLASSES, **options):
    torch.manual_seed(3)
    options = {"model": "test_byobnet", "lr": 0.01, "label_smoothing": SMOOTHING, **options}
    return ImageClassifier(num_classes=classes, **options)


def share_of_first(images, mixed):
    """Share of each image in its mixture with the one before it in the batch, from the pixels."""
    before = images.roll(1, 0)
    shares = (mixed - before).mean((1, 2, 3)) / (images - before).mean((1, 2, 3))
    return shares[0].item()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_and_loss_are_those_of_the_mixture(tmp_path, kind):
    model, data, losses = classifier(**{kind: 1.0}), Images(), Losses()
    model.model = seen = Seen(model.model)
    fit(tmp_path, model, data, losses)
    assert [len(images) for images, _ in seen.steps] == [4, 4, 3]
    shares = []
    for step, (mixed, logits) in enumerate(seen.steps):
        images, targets = (x[4 * step : 4 * step + 4] for x in (data.images, data.targets))
        share = share_of_first(images, mixed)
        shares.append(share)
        if kind == "mixup":
            expected = share * images + (1 - share) * images.roll(1, 0)
            torch.testing.assert_close(mixed, expected)
        else:  # each pixel is of one of the two
            assert ((mixed == images) | (mixed == images.roll(1, 0))).all()
        log_p = logits.log_softmax(1)
        hard = [-log_p.gather(1, t[:, None])[:, 0] for t in (targets, targets.roll(1, 0))]
        of_labels = share * hard[0] + (1 - share) * hard[1]
        loss = ((1 - SMOOTHING) * of_labels - SMOOTHING * log_p.mean(1)).mean()
        assert losses.values[step] == pytest.approx(loss.item(), rel=1e-4)
    assert len(set(shares)) == 3
    assert any(0.02 < share < 0.98 for share in shares)
    evaluated = torch.cat([images for images, _ in seen.evaluated])
    assert torch.equal(evaluated, data.images)  # nothing is mixed in validation


def test_each_batch_gets_one_of_both(tmp_path):
    model, data = classifier(mixup=1.0, cutmix=1.0), Images(n=48)
    model.model = seen = Seen(model.model)
    fit(tmp_path, model, data)
    constant = [bool((x == x[:, :1, :1, :1]).all()) for x, _ in seen.steps]  # mixup's are
    assert 0 < sum(constant) < 12


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_is_bit_identical(tmp_path, accumulate):
    options = {"mixup": 0.4, "cutmix": 1.0, "model_kwargs": {"drop_rate": 0.5}}
    steps = {"accumulate_grad_batches": accumulate, "max_epochs": 3}
    whole, resumed = classifier(**options), classifier(**options)
    fit(tmp_path, whole, Images(), EMA(0.9), SaveEachEpoch(), **steps).save_checkpoint(
        tmp_path / "whole.ckpt"
    )
    torch.manual_seed(99)
    fit(
        tmp_path, resumed, Images(), EMA(0.9), ckpt_path=tmp_path / "0.ckpt", **steps
    ).save_checkpoint(tmp_path / "resumed.ckpt")
    a, b = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("whole", "resumed"))
    assert not differing(a, b)
    plain = classifier(**{**options, "mixup": 0.0, "cutmix": 0.0})
    fit(tmp_path, plain, Images(), **steps)
    assert not torch.equal(plain.model.head.fc.weight, whole.model.head.fc.weight)


def test_the_teacher_sees_the_mixed_images(tmp_path):
    model, data = classifier(mixup=1.0), Images()
    model.model = seen = Seen(model.model)

    taught = []

    class Teacher:
        def mix(self, losses, logits, images):
            taught.append(images.clone())
            return losses

    model._teacher = Teacher()
    fit(tmp_path, model, data)
    for (mixed, _), images in zip(seen.steps, taught, strict=True):
        assert torch.equal(mixed, images)


@pytest.mark.parametrize("data", [Images(n=5, batch_size=1), Images(n=5, classes=1)])
def test_one_image_a_batch_and_one_class(tmp_path, data):
    options = {"mixup": 1.0, "cutmix": 1.0, "freeze_bn": True}  # one image has no statistics
    model = classifier(int(data.targets.max()) + 1, **options)
    trainer = fit(tmp_path, model, data)
    assert trainer.callback_metrics["train/loss_epoch"].isfinite()


def test_a_step_of_nan_is_left_out(tmp_path):
    model, data = classifier(mixup=0.4, skip_nonfinite=1), Images()
    data.images[5] = torch.nan
    with pytest.warns(UserWarning, match="step 1 .* is left out"):
        fit(tmp_path, model, data, limit_val_batches=0)
    assert all(p.isfinite().all() for p in model.parameters())
