"""Schedules against formulas and SGD written anew, alone and under Lightning."""

import math
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.recipe.schedules import Schedule, schedule_factor
from tests.helpers import trainer as helpers
from tests.helpers.trainer import SaveEachEpoch

BATCHES, BATCH, EPOCHS = 7, 4, 3
LR, WD, WD_END, MOMENTUM = 0.1, 1e-2, 1e-3, 0.9


def sgd(lr=LR, weight_decay=WD):
    return torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=lr, weight_decay=weight_decay)


def walk(schedule, key, steps):
    """Values before each of `steps` optimizer steps and after the last one."""
    values = []
    for _ in range(steps + 1):
        values.append([group[key] for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return values


def test_weight_decay_follows_the_papers_formula():
    steps = 40
    schedule = Schedule(sgd(weight_decay=1e-4), "weight_decay", steps, end=0.1)
    expected = [
        1e-5 + 0.5 * (1e-4 - 1e-5) * (1 + math.cos(math.pi * t / steps)) for t in range(steps + 1)
    ]
    values = [value for (value,) in walk(schedule, "weight_decay", steps)]
    assert values == pytest.approx(expected, rel=1e-12)
    assert values[0] == 1e-4
    assert values[20] == pytest.approx(5.5e-5)
    assert values[-1] == pytest.approx(1e-5)
    assert schedule.optimizer.param_groups[0]["lr"] == LR  # the other hyper-parameter is left alone


def test_learning_rate_warms_up_linearly_and_ends_at_zero():
    steps, warmup = 30, 10
    values = [v for (v,) in walk(Schedule(sgd(), "lr", steps, warmup_steps=warmup), "lr", steps)]
    differences = [b - a for a, b in pairwise(values[: warmup + 1])]
    assert values[0] == pytest.approx(LR / 11)
    assert differences == pytest.approx([LR / 11] * warmup)
    assert values[warmup] == LR
    assert values[20] == pytest.approx(LR / 2)  # half of the cosine
    assert values[-1] == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [1.0, 0.91, 0.82, 0.73, 0.64, 0.55, 0.46, 0.37, 0.28, 0.19, 0.1]),
        ("constant", [1.0] * 11),
    ],
)
def test_other_shapes_between_the_ends(shape, expected):
    values = walk(
        Schedule(sgd(weight_decay=1.0), "weight_decay", 10, shape, 0.1), "weight_decay", 10
    )
    assert [value for (value,) in values] == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [0, 7])
def test_steps_are_a_tenth_each_as_torchs_at_30_60_and_90_percent(warmup):
    """torch's MultiStepLR is the reference, after the warm-up."""
    schedule = Schedule(sgd(), "lr", 40 + warmup, "step", 1e-3, warmup_steps=warmup)
    values = [value for (value,) in walk(schedule, "lr", 40 + warmup)]
    torchs = torch.optim.lr_scheduler.MultiStepLR(sgd(), [12, 24, 36], gamma=0.1)
    assert values[:warmup] == pytest.approx([LR * (t + 1) / (warmup + 1) for t in range(warmup)])
    assert values[warmup:] == pytest.approx([value for (value,) in walk(torchs, "lr", 40)])


def test_an_unknown_shape_and_steps_to_zero_are_refused():
    with pytest.raises(ValueError, match=r"\(='cosin'\) must be one of .*; did you mean cosine"):
        Schedule(sgd(), "lr", 10, "cosin")
    with pytest.raises(ValueError, match=r"\(='step'\) cannot reach an end value of 0"):
        Schedule(sgd(), "lr", 10, "step")


def test_the_end_value_stays_after_the_last_step():
    assert schedule_factor(1000, 10, end=0.1) == pytest.approx(0.1)


def test_groups_scale_their_own_values_and_zero_stays_zero():
    groups = [
        {"params": [nn.Parameter(torch.ones(1))], "weight_decay": wd} for wd in (0.0, 1e-4, 2e-4)
    ]
    optimizer = torch.optim.SGD(groups, lr=LR)
    schedule = Schedule(optimizer, "weight_decay", total_steps=8, end=0.1)
    for t, values in enumerate(walk(schedule, "weight_decay", 8)):
        factor = 0.1 + 0.45 * (1 + math.cos(math.pi * t / 8))
        assert values == pytest.approx([0.0, 1e-4 * factor, 2e-4 * factor])
        assert values[0] == 0.0


@pytest.mark.parametrize(("warmup", "total"), [(10, 10), (-1, 10), (0, 0)])
def test_impossible_lengths_are_refused(warmup, total):
    with pytest.raises(ValueError, match=r"`warmup_steps` \(=-?\d+\).*`total_steps` \(=\d+\)"):
        Schedule(sgd(), "lr", total, warmup_steps=warmup)


def test_an_unknown_hyper_parameter_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'wd'.*SGD.*'weight_decay'"):
        Schedule(sgd(), "wd", 10)


def test_state_restores_position_and_values():
    first, second = Schedule(sgd(), "lr", 10), Schedule(sgd(), "lr", 10)
    for _ in range(4):
        first.optimizer.step()
        first.step()
    second.load_state_dict(first.state_dict())
    assert second.last_epoch == 4
    assert second.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"]


def test_a_changed_length_takes_effect_and_is_said():
    saved = Schedule(sgd(), "weight_decay", 10, end=0.1)
    saved.step(5)
    resumed = Schedule(sgd(), "weight_decay", 20, end=0.1)
    with pytest.warns(UserWarning, match="`weight_decay` has 10 steps, this run's has 20"):
        resumed.load_state_dict(saved.state_dict())
    expected = WD * (0.1 + 0.45 * (1 + math.cos(math.pi * 5 / 20)))
    assert resumed.optimizer.param_groups[0]["weight_decay"] == pytest.approx(expected)


class Regression(LightningModule):
    """Least squares with both schedules; its gradient is known in closed form."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        x, y = batch
        group = self.trainer.optimizers[0].param_groups[0]
        self.log("lr", group["lr"])
        self.log("weight_decay", group["weight_decay"])
        return ((x @ self.weight - y) ** 2).mean()

    def configure_optimizers(self):
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.SGD([self.weight], lr=LR, momentum=MOMENTUM, weight_decay=WD)
        schedules = [
            Schedule(optimizer, "lr", steps, warmup_steps=2),
            Schedule(optimizer, "weight_decay", steps, end=WD_END / WD),
        ]
        return [optimizer], [{"scheduler": s, "interval": "step", "name": "lr"} for s in schedules]


class Trace(Callback):
    """The hyper-parameters of each optimizer step and the weights before it."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        (group,) = optimizer.param_groups
        weight = pl_module.weight.detach().clone()
        self.steps.append((group["lr"], group["weight_decay"], weight))


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCHES * BATCH, 3, dtype=torch.float64, generator=generator)
    return x, x @ torch.tensor([0.3, 0.2, -1.0], dtype=torch.float64) + 0.1


def fit(folder, accumulate, *callbacks, **options):
    model, loader = Regression(), DataLoader(TensorDataset(*data()), BATCH)
    options = {"max_epochs": EPOCHS, "accumulate_grad_batches": accumulate, **options}
    return model, helpers.fit(folder, model, loader, *callbacks, **options)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_trains_as_sgd_by_hand(tmp_path, accumulate):
    trace = Trace()
    model, _ = fit(tmp_path, accumulate, trace)

    x, y = data()
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    total = EPOCHS * math.ceil(BATCHES / accumulate)
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    velocity, step, expected = torch.zeros_like(weight), 0, []
    for _ in range(EPOCHS):
        for start in range(0, BATCHES, accumulate):
            group = batches[start : start + accumulate]
            gradient = torch.zeros_like(weight)
            for bx, by in group:
                gradient += 2 * bx.T @ (bx @ weight - by) / BATCH / accumulate
            if step < 2:
                lr = LR * (step + 1) / 3
            else:
                lr = LR * 0.5 * (1 + math.cos(math.pi * (step - 2) / (total - 2)))
            wd = WD_END + 0.5 * (WD - WD_END) * (1 + math.cos(math.pi * step / total))
            expected.append((lr, wd, weight))
            velocity = MOMENTUM * velocity + gradient + wd * weight
            weight = weight - lr * velocity
            step += 1

    assert len(trace.steps) == total
    for (lr, wd, before), (lr_, wd_, before_) in zip(trace.steps, expected, strict=True):
        assert lr == pytest.approx(lr_, rel=1e-12)
        assert wd == pytest.approx(wd_, rel=1e-12)
        torch.testing.assert_close(before, before_, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_resuming_is_bit_identical(tmp_path, accumulate):
    whole, rest = Trace(), Trace()
    uninterrupted, _ = fit(tmp_path, accumulate, whole, SaveEachEpoch())
    steps = math.ceil(BATCHES / accumulate)

    resumed, _ = fit(tmp_path, accumulate, rest, ckpt_path=tmp_path / "0.ckpt")

    for (lr, wd, weight), (lr_, wd_, weight_) in zip(whole.steps[steps:], rest.steps, strict=True):
        assert (lr, wd) == (lr_, wd_)
        assert torch.equal(weight, weight_)
    assert torch.equal(uninterrupted.weight, resumed.weight)


def test_lightning_saves_both_schedules_as_plain_data(tmp_path):
    _, trainer = fit(tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    steps = EPOCHS * BATCHES
    assert checkpoint["lr_schedulers"] == [{"last_epoch": steps, "total_steps": steps}] * 2


def test_learning_rate_monitor_labels_both_rightly(tmp_path):
    trace, monitor = Trace(), LearningRateMonitor(log_weight_decay=True)
    logger = CSVLogger(tmp_path)
    logged = []
    logger.log_metrics = lambda metrics, step=None: logged.append(dict(metrics))
    fit(tmp_path, 1, trace, monitor, logger=logger)
    from_monitor = [row for row in logged if "lr-weight_decay" in row]
    assert [row["lr"] for row in from_monitor] == [lr for lr, _, _ in trace.steps]
    assert [row["lr-weight_decay"] for row in from_monitor] == [wd for _, wd, _ in trace.steps]
