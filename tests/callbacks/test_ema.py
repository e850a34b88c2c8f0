"""EMA against an average kept by hand, also where Lightning's WeightAveraging has a defect."""

import itertools

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from callbacks.ema import EMA
from tests.helpers import trainer as helpers
from tests.helpers.trainer import SaveEachEpoch, make_trainer

BATCHES, BATCH, DECAY = 5, 4, 0.8
COUNT = "norm.num_batches_tracked"


class Net(LightningModule):
    """A little of everything that a state dict can hold or leave out."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.linear = nn.Linear(3, 4)
        self.linear.weight = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.linear.bias = nn.Parameter(torch.zeros(4))
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("batches", torch.zeros(1), persistent=False)
        self.register_buffer("mask", torch.full((2,), -torch.inf), persistent=False)
        self.loss = MeanMetric()
        self.seen = MeanMetric()
        self.seen.persistent(True)
        self.validated = []

    def forward(self, x):
        return self.norm(self.linear(x)).sum(1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.batches += 1
        loss = F.mse_loss(self(x), y)
        self.seen.update(loss.detach())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.validated.append(self.linear.weight.detach().clone())
        self.loss.update(F.mse_loss(self(x), y))
        self.log("val/loss", self.loss)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Trace(Callback):
    """The raw state after each optimizer step."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not trainer.fit_loop._should_accumulate():
            self.states.append(copy(pl_module.state_dict()))


class Fail(Callback):
    """Raise in the n-th validation."""

    def __init__(self, error, validation=1):
        self.error, self.validation, self.count = error, validation, itertools.count()

    def on_validation_batch_end(self, *args):
        if next(self.count) == self.validation:
            raise self.error


def save_at(hook, path, **options):
    """Writes a checkpoint at each call of a hook."""
    return LambdaCallback(**{hook: lambda trainer, *_: trainer.save_checkpoint(path, **options)})


def ema(warmup=False, **options):
    """The callback, as a rule without warm-up, so that the arithmetic below stays short."""
    return EMA(DECAY, warmup=warmup, **options)


def copy(state):
    return {name: value.clone() for name, value in state.items()}


def loader():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(BATCHES * BATCH, 3, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1) * 3 + 1), BATCH)


def one_batch():
    return DataLoader(loader().dataset, BATCHES * BATCH)


def fit(folder, *callbacks, epochs=3, **options):
    """A fitted module, its trainer and the raw states after each step."""
    trace, net = Trace(), Net()
    data = loader(), one_batch()
    trainer = helpers.fit(folder, net, data, trace, *callbacks, max_epochs=epochs, **options)
    return net, trainer, trace.states


def averaged(states, decay=DECAY):
    """The average after the last of the raw states, in float64."""
    decays = itertools.repeat(decay) if isinstance(decay, float) else iter(decay)
    average = {name: value.double() for name, value in states[0].items()}
    for state in states[1:]:
        d = next(decays)
        for name, value in state.items():
            average[name] = d * average[name] + (1 - d) * value.double()
    for name, value in states[-1].items():
        if not value.is_floating_point() or name.startswith("seen."):
            average[name] = value
    return average


def assert_near(state, expected):
    assert state.keys() == expected.keys()
    for name, value in state.items():
        close = {"rtol": 1e-5, "atol": 1e-6, "msg": lambda m, n=name: n + m}
        torch.testing.assert_close(value.double(), expected[name].double(), **close)


def assert_averaged(weight, states):
    """That a weight of the linear layer is the average of the raw states."""
    assert_near({"weight": weight}, {"weight": averaged(states)["linear.weight"]})


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    different = [name for name, value in state.items() if not torch.equal(value, expected[name])]
    assert not different


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    return torch.equal(a["linear.weight"], b["linear.weight"])


# --- the average -----------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_average_is_the_one_kept_by_hand(tmp_path, accumulate):
    net, _, states = fit(tmp_path, ema(), accumulate_grad_batches=accumulate)
    assert len(states) == 3 * -(-BATCHES // accumulate)
    assert_near(net.state_dict(), averaged(states))
    assert not same(net.state_dict(), states[-1])


def test_default_decay_is_the_papers():
    assert EMA().decay_at(10**6) == EMA(warmup=False).decay_at(0) == 0.9995


def test_decay_warms_up(tmp_path):
    net, _, states = fit(tmp_path, EMA(DECAY, warmup=True))
    decays = [min(DECAY, (1 + n) / (10 + n)) for n in range(1, len(states))]
    assert decays[0] == 2 / 11
    assert_near(net.state_dict(), averaged(states, decays))


def test_integer_buffers_are_copied(tmp_path):
    net, _, states = fit(tmp_path, ema())
    assert net.norm.num_batches_tracked == states[-1][COUNT] == 15


def test_buffers_outside_the_state_dict_stay_the_modules(tmp_path):
    net, _, _ = fit(tmp_path, ema())
    assert net.batches == 3 * BATCHES
    assert torch.equal(net.mask, torch.full((2,), -torch.inf))  # no average with infinity


def test_metrics_do_not_notice(tmp_path):
    """The states of metrics are those of the module, in memory and in the checkpoint."""
    without, _, _ = fit(tmp_path)
    net, trainer, _ = fit(tmp_path, ema())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert net.seen.compute() == without.seen.compute()
    saved = load(tmp_path / "end.ckpt")
    for key in ("state_dict", "current_model_state"):
        assert torch.equal(saved[key]["seen.weight"], without.seen.weight)
        assert saved[key]["seen.weight"] == 15


def test_training_is_the_same_as_without(tmp_path):
    _, _, without = fit(tmp_path)
    _, _, states = fit(tmp_path, ema())
    for a, b in zip(without, states, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize(
    ("name", "value"), [("decay", 1.1), ("start_step", -1), ("validate", "both")]
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` \(={value!r}"):
        EMA(**{name: value})


# --- which weights are where -----------------------------------------------------------------


def test_validation_sees_the_average_and_training_goes_on_raw(tmp_path):
    net, _, states = fit(tmp_path, ema())
    for epoch, weight in enumerate(net.validated, start=1):
        assert_averaged(weight, states[: epoch * BATCHES])


def test_checkpoint_holds_both_sets_and_loads_safely(tmp_path):
    _, _, states = fit(tmp_path, ema(), save_at("on_validation_end", tmp_path / "now.ckpt"))
    saved = load(tmp_path / "now.ckpt")
    assert_near(saved["state_dict"], averaged(states))
    assert_equal(saved["current_model_state"], states[-1])
    plain = Net.load_from_checkpoint(tmp_path / "now.ckpt", weights_only=True)
    assert_equal(plain.state_dict(), saved["state_dict"])


def test_the_raw_weights_can_be_validated_and_shipped(tmp_path):
    """What is validated is what the state dict holds; the average is kept for resuming."""
    save = SaveEachEpoch(), ModelCheckpoint(tmp_path, save_weights_only=True, save_last=True)
    net, trainer, states = fit(tmp_path, ema(validate="raw"), *save)
    for epoch, weight in enumerate(net.validated, start=1):
        assert torch.equal(weight, states[epoch * BATCHES - 1]["linear.weight"])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = load(tmp_path / "end.ckpt")
    for state in (net.state_dict(), saved["state_dict"], saved["current_model_state"]):
        assert_equal(state, states[-1])
    assert_equal(load(tmp_path / "last.ckpt")["state_dict"], states[-1])
    assert_near(saved["averaging_state"]["weights"], averaged(states))


@pytest.mark.parametrize("before", ["raw", "average"])
@pytest.mark.parametrize("after", ["raw", "average"])
def test_either_role_resumes_the_other_bit_for_bit(tmp_path, before, after):
    whole, _, raw = fit(tmp_path, ema(validate=after))
    fit(tmp_path, ema(validate=before), SaveEachEpoch())
    resumed, _, raw_resumed = fit(tmp_path, ema(validate=after), ckpt_path=tmp_path / "0.ckpt")
    assert_equal(raw[-1], raw_resumed[-1])
    assert_equal(whole.state_dict(), resumed.state_dict())


def test_checkpoint_saved_during_validation_is_not_swapped(tmp_path):
    save = save_at("on_validation_batch_end", tmp_path / "now.ckpt")
    _, _, states = fit(tmp_path, ema(), save)
    saved = load(tmp_path / "now.ckpt")
    assert_near(saved["state_dict"], averaged(states))
    assert_equal(saved["current_model_state"], states[-1])


def test_a_test_with_a_checkpoint_after_fit_sees_the_average(tmp_path):
    net, trainer, _ = fit(tmp_path, ema(), SaveEachEpoch())
    net.validated.clear()
    trainer.test(net, one_batch(), ckpt_path=tmp_path / "1.ckpt", verbose=False)
    assert torch.equal(net.validated[0], load(tmp_path / "1.ckpt")["state_dict"]["linear.weight"])


def test_checkpoint_saved_after_a_test_holds_the_tested_weights(tmp_path):
    _, trainer, _ = fit(tmp_path, ema(), SaveEachEpoch())
    trainer.test(Net(), one_batch(), ckpt_path=tmp_path / "0.ckpt", verbose=False)
    trainer.save_checkpoint(tmp_path / "now.ckpt")
    assert_equal(load(tmp_path / "now.ckpt")["state_dict"], load(tmp_path / "0.ckpt")["state_dict"])


def test_a_test_without_a_checkpoint_after_fit_sees_the_average(tmp_path):
    net, trainer, states = fit(tmp_path, ema())
    net.validated.clear()
    trainer.test(net, one_batch(), verbose=False)
    trainer.validate(net, one_batch(), verbose=False)
    assert len(net.validated) == 2
    for weight in net.validated:
        assert_averaged(weight, states)


def test_another_module_is_validated_with_its_own_weights(tmp_path):
    _, trainer, _ = fit(tmp_path, ema())
    other = Net()
    trainer.validate(other, one_batch(), verbose=False)
    assert torch.equal(other.validated[0], Net().linear.weight)

    trainer, other = make_trainer(tmp_path, ema(), Fail(RuntimeError("stop")), max_epochs=3), Net()
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(Net(), loader(), one_batch())
    trainer.callbacks.pop(1)
    trainer.validate(other, one_batch(), verbose=False)
    assert torch.equal(other.validated[0], Net().linear.weight)


def test_before_the_start_the_raw_weights_count(tmp_path):
    net, _, states = fit(tmp_path, ema(start_step=1000), SaveEachEpoch())  # never begins
    assert torch.equal(net.validated[0], states[BATCHES - 1]["linear.weight"])
    assert_equal(load(tmp_path / "0.ckpt")["state_dict"], states[BATCHES - 1])
    assert_equal(net.state_dict(), states[-1])


def test_delayed_average_begins_with_the_weights_of_its_first_step(tmp_path):
    net, _, states = fit(tmp_path, ema(start_step=7))
    assert torch.equal(net.validated[0], states[BATCHES - 1]["linear.weight"])
    assert_near(net.state_dict(), averaged(states[7:]))


def test_weights_only_checkpoints_hold_the_average(tmp_path):
    save = ModelCheckpoint(tmp_path / "saved", save_weights_only=True)
    _, _, states = fit(tmp_path, ema(), save)
    saved = load(save.best_model_path)
    assert_near(saved["state_dict"], averaged(states))
    assert "current_model_state" not in saved


def test_weights_only_checkpoint_leaves_training_alone(tmp_path):
    save = save_at("on_train_batch_end", tmp_path / "weights.ckpt", weights_only=True)
    _, _, without = fit(tmp_path)
    _, trainer, states = fit(tmp_path, ema(), save)
    assert_equal(without[-1], states[-1])
    trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    assert_near(load(tmp_path / "after.ckpt")["state_dict"], averaged(states))


def test_weights_only_checkpoint_in_a_validation_leaves_the_average_there(tmp_path):
    save = save_at("on_validation_batch_start", tmp_path / "weights.ckpt", weights_only=True)
    net, _, states = fit(tmp_path, ema(), save)
    assert_averaged(net.validated[-1], states)


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_exception_in_validation_does_not_swap_the_sets(tmp_path, error):
    net, trace = Net(), Trace()
    save = ModelCheckpoint(tmp_path, filename="x", save_on_exception=True, every_n_epochs=9)
    trainer = make_trainer(tmp_path, ema(), trace, Fail(error), save, max_epochs=3)
    with pytest.raises((RuntimeError, SystemExit)):
        trainer.fit(net, loader(), one_batch())
    saved = load(tmp_path / "x.ckpt")
    assert len(trace.states) == 2 * BATCHES
    assert_near(saved["state_dict"], averaged(trace.states))
    assert_equal(saved["current_model_state"], trace.states[-1])
    assert_equal(net.state_dict(), trace.states[-1])


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_end"])
def test_interrupt_in_the_middle_of_an_exchange_loses_nothing(tmp_path, monkeypatch, hook):
    def half_copy(weights, module):
        monkeypatch.undo()
        with torch.no_grad():
            module.linear.weight.copy_(weights["linear.weight"])
        raise RuntimeError("stop")

    def break_copy(*args):
        monkeypatch.setattr("callbacks.ema._copy", half_copy)

    before_the_exchange = LambdaCallback(**{hook: break_copy})
    net, trace = Net(), Trace()
    trainer = make_trainer(tmp_path, before_the_exchange, ema(), trace, max_epochs=3)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(net, loader(), one_batch())
    trainer.save_checkpoint(tmp_path / "now.ckpt")
    saved = load(tmp_path / "now.ckpt")
    assert_equal(net.state_dict(), trace.states[-1])
    assert_equal(saved["current_model_state"], trace.states[-1])
    assert_near(saved["state_dict"], averaged(trace.states))


def test_checkpoint_saved_after_fit_keeps_the_raw_weights(tmp_path):
    _, trainer, states = fit(tmp_path, ema())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = load(tmp_path / "end.ckpt")
    assert_near(saved["state_dict"], averaged(states))
    assert_equal(saved["current_model_state"], states[-1])


# --- resuming and loading --------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("options", [{}, {"warmup": True}, {"start_step": 6}, {"device": "cpu"}])
def test_resuming_is_bit_identical(tmp_path, accumulate, options):
    settings = {"accumulate_grad_batches": accumulate}
    whole, trainer, raw = fit(tmp_path, ema(**options), SaveEachEpoch(), **settings)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")

    settings["ckpt_path"] = tmp_path / "0.ckpt"
    resumed, trainer, raw_resumed = fit(tmp_path, ema(**options), **settings)
    trainer.save_checkpoint(tmp_path / "resumed.ckpt")

    assert len(raw) * 2 == len(raw_resumed) * 3
    assert_equal(raw[-1], raw_resumed[-1])
    assert_equal(whole.state_dict(), resumed.state_dict())
    for a, b in zip(whole.validated[1:], resumed.validated, strict=True):
        assert torch.equal(a, b)
    a, b = load(tmp_path / "whole.ckpt"), load(tmp_path / "resumed.ckpt")
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert_equal(a[key], b[key])


def test_training_can_go_on_from_a_checkpoint_saved_after_fit(tmp_path):
    whole, _, raw = fit(tmp_path, ema(), epochs=4)
    _, trainer, _ = fit(tmp_path, ema(), epochs=2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    resumed, _, raw_resumed = fit(tmp_path, ema(), epochs=4, ckpt_path=tmp_path / "end.ckpt")
    assert_equal(raw[-1], raw_resumed[-1])
    assert_equal(whole.state_dict(), resumed.state_dict())


def test_resuming_from_a_checkpoint_without_ema_starts_the_average(tmp_path):
    fit(tmp_path, SaveEachEpoch())
    with pytest.warns(UserWarning, match="saved without EMA"):
        net, _, states = fit(tmp_path, ema(), ckpt_path=tmp_path / "0.ckpt")
    assert_near(net.state_dict(), averaged(states))


def test_validating_a_checkpoint_alone_is_quiet_and_sees_the_average(tmp_path):
    """Lightning's class warns that its state cannot be restored; warnings are errors here."""
    fit(tmp_path, ema(), SaveEachEpoch())
    for run in ("validate", "test"):
        net = Net()
        trainer = make_trainer(tmp_path, ema())
        getattr(trainer, run)(net, one_batch(), ckpt_path=tmp_path / "2.ckpt", verbose=False)
        average = load(tmp_path / "2.ckpt")["state_dict"]["linear.weight"]
        assert torch.equal(net.validated[0], average)


def test_a_callback_can_serve_a_second_trainer(tmp_path):
    callback = ema()
    fit(tmp_path, callback)
    net, _, states = fit(tmp_path, callback)
    assert_averaged(net.linear.weight.detach(), states)


@pytest.mark.parametrize(
    "precision, dtype", [("bf16-true", torch.bfloat16), ("16-true", torch.float16)]
)
def test_half_precision_training_is_averaged_in_single_precision(tmp_path, precision, dtype):
    _, trainer, states = fit(tmp_path, ema(), precision=precision)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    average = load(tmp_path / "end.ckpt")["state_dict"]
    assert states[-1]["linear.weight"].dtype == dtype
    assert average["linear.weight"].dtype == torch.float32
    assert_averaged(average["linear.weight"], states)
