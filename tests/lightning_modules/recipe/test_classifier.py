"""The classifier: recipe, exact metrics, resuming, checkpoints, and errors that help."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from callbacks.ema import EMA
from lightning_modules.recipe.classifier import ImageClassifier
from lightning_modules.recipe.optimizers import build_optimizer
from mobileone.export.spec import ExportSpec
from tests.helpers import trainer as helpers
from tests.helpers.bitwise import differing
from tests.helpers.trainer import SaveEachEpoch

TINY = "test_byobnet"
CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "interpolation": "bilinear",
    "crop_pct": 0.875,
    "crop_mode": "center",
}


class Images(LightningDataModule):
    """Random images whose brightness follows the class; the last batch is smaller."""

    def __init__(self, classes=CLASSES, n=22, batch_size=4, labels=None):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.class_names, self.data_config = list(classes), CONFIG
        self.batch_size = batch_size
        self.targets = torch.arange(n) % len(classes) if labels is None else torch.tensor(labels)
        noise = torch.randn(len(self.targets), 3, 32, 32, generator=generator)
        self.images = noise + self.targets.view(-1, 1, 1, 1) / 2

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.images, self.targets), self.batch_size)

    val_dataloader = test_dataloader = train_dataloader

    def predict_dataloader(self):
        return DataLoader(self.images, batch_size=self.batch_size)


class Log:
    """Keeps what a logger would write."""

    def __init__(self, folder):
        self.logger, self.rows = CSVLogger(folder), []
        self.logger.log_metrics = lambda metrics, step=None: self.rows.append(dict(metrics))

    def __getitem__(self, key):
        return [row[key] for row in self.rows if key in row]


def classifier(**kwargs):
    return ImageClassifier(**{"model": TINY, "num_classes": len(CLASSES), "lr": 0.01} | kwargs)


def make_trainer(folder, *callbacks, epochs=2, **options):
    return helpers.make_trainer(folder, *callbacks, max_epochs=epochs, **options)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@torch.no_grad()
def reference(model, data):
    """Logits of the whole data set at once."""
    return model.eval()(data.images)


# --- recipe ----------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    h = ImageClassifier(model=TINY, num_classes=2).hparams
    assert (h.lr, h.momentum, h.label_smoothing) == (0.1, 0.9, 0.1)
    assert (h.weight_decay, h.weight_decay_end) == (1e-4, 1e-5)
    assert (h.no_decay_norm_bias, h.warmup_epochs, h.lr_reference_batch) == (False, 0, None)


def test_default_optimizer_is_sgd_with_plain_momentum():
    h = ImageClassifier(model=TINY, num_classes=2).hparams
    optimizer = build_optimizer(nn.Linear(2, 2), h.optimizer, lr=0.1, weight_decay=1e-4)
    assert type(optimizer) is torch.optim.SGD
    assert [(g["momentum"], g["nesterov"]) for g in optimizer.param_groups] == [(0.9, False)]


@pytest.mark.parametrize("exempt", [False, True])
def test_norms_and_biases_decay_unless_exempt(exempt):
    model = timm.create_model(TINY)
    optimizer = build_optimizer(
        model, "momentum", lr=0.1, weight_decay=1e-4, no_decay_norm_bias=exempt
    )
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    for _, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0 if exempt and parameter.ndim == 1 else 1e-4)


def test_training_logs_both_schedules_and_both_losses(tmp_path):
    log, data = Log(tmp_path), Images()
    make_trainer(tmp_path, logger=log.logger).fit(
        classifier(warmup_epochs=0.5, no_decay_norm_bias=True), data
    )
    steps, warmup = 12, 3  # 2 epochs of 6 batches
    lr = [
        0.01 * (t + 1) / 4
        if t < warmup
        else 0.005 * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup)))
        for t in range(steps)
    ]
    wd = [1e-5 + 4.5e-5 * (1 + math.cos(math.pi * t / steps)) for t in range(steps)]
    assert log["lr"] == pytest.approx(lr, rel=1e-6)
    assert log["weight_decay"] == pytest.approx(wd, rel=1e-6)
    loss, sizes = log["train/loss"], [4, 4, 4, 4, 4, 2]
    for epoch, mean in enumerate(log["train/loss_epoch"]):
        part = loss[6 * epoch : 6 * epoch + 6]
        expected = sum(x * n for x, n in zip(part, sizes, strict=True)) / 22
        assert mean == pytest.approx(expected, rel=1e-5)


def test_training_loss_is_smoothed(tmp_path):
    log, data = Log(tmp_path), Images()
    model = classifier(lr=0.0, label_smoothing=0.1)
    model.train()
    logits = model(data.images[:4])
    target = torch.full((4, 7), 0.1 / 7)
    target[range(4), data.targets[:4]] += 0.9
    expected = -(target * logits.log_softmax(1)).sum(1).mean().item()
    make_trainer(tmp_path, logger=log.logger, epochs=1, limit_train_batches=1).fit(model, data)
    assert log["train/loss"] == pytest.approx([expected], rel=1e-5)


def test_learning_rate_monitor_labels_nothing_wrongly(tmp_path):
    monitor = LearningRateMonitor(log_weight_decay=True)
    trainer = make_trainer(tmp_path, monitor, logger=Log(tmp_path).logger, epochs=1)
    trainer.fit(classifier(), Images())
    assert monitor.lrs.keys() == {"lr"}  # it takes each schedule's name for a learning rate
    assert monitor.last_weight_decay_values.keys() == {"lr-weight_decay"}


def test_other_schedules_of_both_and_their_resume(tmp_path):
    """By formulas written anew; from the second epoch's checkpoint all continues bit for bit."""
    log, settings = Log(tmp_path), {"schedule": "step", "weight_decay_schedule": "linear"}
    whole, resumed = classifier(**settings), classifier(**settings)
    make_trainer(tmp_path, SaveEachEpoch(), logger=log.logger, epochs=3).fit(whole, Images())
    lr = [0.01 * 0.1 ** sum(t / 18 >= m for m in (0.3, 0.6, 0.9)) for t in range(18)]
    assert log["lr"] == pytest.approx(lr, rel=1e-6)
    wd = [1e-4 - 9e-5 * t / 18 for t in range(18)]
    assert log["weight_decay"] == pytest.approx(wd, rel=1e-6)
    make_trainer(tmp_path, epochs=3).fit(resumed, Images(), ckpt_path=tmp_path / "1.ckpt")
    assert_equal(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_learning_rate_scales_with_the_effective_batch(tmp_path, accumulate):
    log = Log(tmp_path)
    trainer = make_trainer(tmp_path, logger=log.logger, accumulate_grad_batches=accumulate)
    trainer.fit(classifier(lr=0.1, lr_reference_batch=256), Images())
    assert log["lr"][0] == pytest.approx(0.1 * 4 * accumulate / 256)


def test_constant_and_absent_weight_decay(tmp_path):
    for settings in ((1e-4, 1e-4), (0.0, 0.0)):
        log = Log(tmp_path)
        model = classifier(weight_decay=settings[0], weight_decay_end=settings[1])
        make_trainer(tmp_path, logger=log.logger, epochs=1).fit(model, Images())
        assert log["weight_decay"] == pytest.approx([settings[0]] * 6)


def test_frozen_parameters_stay(tmp_path):
    model = classifier()
    model.model.stem.requires_grad_(False)
    before = [p.clone() for p in model.model.stem.parameters()]
    make_trainer(tmp_path, epochs=1).fit(model, Images())
    for a, b in zip(before, model.model.stem.parameters(), strict=True):
        assert torch.equal(a, b)


# --- metrics ---------------------------------------------------------------------------------


def test_metrics_are_exact_for_an_uneven_last_batch(tmp_path):
    data, model = Images(), classifier()
    trainer = make_trainer(tmp_path)
    trainer.fit(model, data)
    (results,) = trainer.validate(model, data, verbose=False)
    (tested,) = trainer.test(model, data, verbose=False)

    logits = reference(model.model, data)
    order = logits.argsort(1, descending=True)
    expected = {
        "loss": F.cross_entropy(logits, data.targets).item(),
        "acc1": (order[:, 0] == data.targets).float().mean().item(),
        "acc5": (order[:, :5] == data.targets[:, None]).any(1).float().mean().item(),
    }
    assert expected["acc1"] < expected["acc5"] < 1
    assert results == pytest.approx({f"val/{k}": v for k, v in expected.items()}, rel=1e-5)
    assert tested == pytest.approx({f"test/{k}": v for k, v in expected.items()}, rel=1e-5)


def test_acc5_differs_from_acc1_though_they_agree_on_the_first_batch(tmp_path):
    class Ranks(nn.Module):
        def forward(self, images):  # first batch: top-1 right; later: only among the top five
            return images.flatten(1)[:, :7]

    data, model = Images(n=8), classifier()
    model.model = Ranks()
    data.images = torch.zeros(8, 3, 32, 32)
    for i, label in enumerate(data.targets):
        data.images[i, 0, 0, :7] = torch.linspace(0, 1, 7)
        data.images[i, 0, 0, label] = 2.0 if i < 4 else 0.9
    (results,) = make_trainer(tmp_path).validate(model, data, verbose=False)
    assert results["val/acc1"] == 0.5 + 1 / 8  # the seventh image's label is the last class
    assert results["val/acc5"] == 1


def test_five_classes_have_no_acc5(tmp_path):
    data = Images(classes=CLASSES[:5])
    (results,) = make_trainer(tmp_path).validate(classifier(num_classes=5), data, verbose=False)
    assert results.keys() == {"val/loss", "val/acc1"}


def test_confusion_matrix_and_accuracy_of_each_class(tmp_path):
    data = Images(labels=[0, 0, 0, 1, 2, 2, 3, 5, 5])  # no 4 and no 6
    model, trainer = classifier(), make_trainer(tmp_path)
    assert model.test_confusion is None
    for _ in range(2):  # a second test starts anew
        trainer.test(model, data, verbose=False)
        expected = torch.zeros(7, 7, dtype=torch.long)
        for target, guess in zip(data.targets, reference(model.model, data).argmax(1), strict=True):
            expected[target, guess] += 1
        assert torch.equal(model.test_confusion, expected)
        for c in range(7):
            if c in data.targets:
                share = expected[c, c] / (data.targets == c).sum()
                assert model.test_per_class[c] == share
            else:
                assert model.test_per_class[c].isnan()


class Report(Callback):
    """Writes what a test leaves, from each process."""

    def on_test_end(self, trainer, pl_module):
        report = {k: float(v) for k, v in trainer.callback_metrics.items()}
        report["confusion"] = pl_module.test_confusion.tolist()
        path = Path(trainer.default_root_dir) / f"{trainer.global_rank}.json"
        path.write_text(json.dumps(report))


class Shares(Images):
    """The first process gets more images than the second, in other batches."""

    def test_dataloader(self):
        rank = self.trainer.global_rank
        part = slice(0, 13) if rank == 0 else slice(13, 22)
        return DataLoader(TensorDataset(self.images[part], self.targets[part]), batch_size=4)


@pytest.mark.slow  # starts two processes
def test_metrics_are_exact_over_two_processes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    model = classifier()
    for folder, kwargs, data in (
        (one, {}, Images()),
        (two, {"devices": 2, "strategy": "ddp_spawn", "use_distributed_sampler": False}, Shares()),
    ):
        folder.mkdir()
        make_trainer(folder, Report(), **kwargs).test(model, data, verbose=False)
    expected = json.loads((one / "0.json").read_text())
    for rank in range(2):
        report = json.loads((two / f"{rank}.json").read_text())
        assert report.pop("confusion") == expected["confusion"]
        assert report == pytest.approx({k: v for k, v in expected.items() if k != "confusion"})


def test_predictions_are_probabilities(tmp_path):
    data, model = Images(), classifier()
    batches = make_trainer(tmp_path).predict(model, data)
    expected = reference(model.model, data).softmax(1)
    torch.testing.assert_close(torch.cat(batches), expected)
    torch.testing.assert_close(torch.cat(batches).sum(1), torch.ones(22))
    both = model.predict_step((data.images, data.targets), 0)
    torch.testing.assert_close(both, expected)


# --- resuming --------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 4])
def test_resuming_is_bit_identical(tmp_path, accumulate):
    """With dropout, both schedules and EMA, and another state of the random numbers."""
    kwargs = {"model_kwargs": {"drop_rate": 0.5}, "lr": 0.05}
    settings = {"accumulate_grad_batches": accumulate, "epochs": 3}

    whole = classifier(**kwargs)
    trainer = make_trainer(tmp_path, EMA(0.9), SaveEachEpoch(), **settings)
    trainer.fit(whole, Images())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")

    torch.manual_seed(99)
    resumed = classifier(**kwargs)
    trainer = make_trainer(tmp_path, EMA(0.9), **settings)
    trainer.fit(resumed, Images(), ckpt_path=tmp_path / "0.ckpt")
    trainer.save_checkpoint(tmp_path / "resumed.ckpt")

    a, b = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("whole", "resumed"))
    assert not differing(a, b)
    for x, y in zip(a["optimizer_states"], b["optimizer_states"], strict=True):
        assert x["param_groups"] == y["param_groups"]
    assert_equal(whole.state_dict(), resumed.state_dict())


def test_dropout_depends_on_seed_epoch_and_batch_only(tmp_path):
    class Draw(Callback):
        def __init__(self):
            self.numbers = []

        def on_before_zero_grad(self, *args):
            self.numbers.append(torch.rand(()).item())

    def numbers(start, **kwargs):
        draw = Draw()
        torch.manual_seed(start)
        make_trainer(tmp_path, draw).fit(classifier(**kwargs), Images())
        return draw.numbers

    first = numbers(1, seed=7)
    assert len(set(first)) == 12
    assert first == numbers(2, seed=7)
    assert first != numbers(1, seed=8)


def test_seed_is_the_runs_and_the_checkpoints(tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert classifier().seed == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # to be undone after the test
    seed_everything(12, verbose=False)
    model, trainer = classifier(), make_trainer(tmp_path, epochs=1)
    trainer.fit(model, Images())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    seed_everything(13, verbose=False)
    assert ImageClassifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True).seed == 12
    assert classifier(seed=3).seed == 3


# --- checkpoints -----------------------------------------------------------------------------


def test_checkpoint_alone_is_enough(tmp_path):
    data, model = Images(), classifier(model_kwargs={"drop_rate": 0.1})
    trainer = make_trainer(tmp_path, EMA(0.9), epochs=1)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert_equal(loaded.state_dict(), model.state_dict())
    assert loaded.export_spec == ExportSpec(TINY, tuple(CLASSES), **CONFIG)
    assert loaded.hparams.model_kwargs == {"drop_rate": 0.1}
    torch.testing.assert_close(reference(loaded.model, data), reference(model.model, data))


def test_loading_a_checkpoint_does_not_fetch_pretrained_weights(tmp_path, monkeypatch):
    create, fetched = timm.create_model, []

    def offline(name, pretrained=False, **kwargs):
        fetched.append(pretrained)
        return create(name, **kwargs)

    monkeypatch.setattr("timm.create_model", offline)
    model, trainer = classifier(pretrained=True), make_trainer(tmp_path, epochs=1)
    trainer.fit(model, Images())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    ImageClassifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert fetched == [True, False]
    assert model.hparams.pretrained is True  # what loggers record


def test_weights_only_checkpoint_has_the_spec_too(tmp_path):
    trainer = make_trainer(tmp_path, epochs=1)
    trainer.fit(classifier(), Images())
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert loaded.export_spec.class_names == tuple(CLASSES)


def test_unknown_export_spec_says_where_it_would_come_from():
    with pytest.raises(ValueError, match=r"ImageDataModule.*checkpoint"):
        _ = classifier().export_spec


def test_plain_loaders_train_without_an_export_spec(tmp_path):
    model, trainer = classifier(), make_trainer(tmp_path, epochs=1)
    trainer.fit(model, Images().train_dataloader(), Images().val_dataloader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert "export_spec" not in torch.load(tmp_path / "x.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (
            (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1])),
            r"torch\.uint8 \(2,",
        ),
        ((torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]), ["a", "b"]), "class 'list'"),
        (torch.zeros(2, 3, 32, 32), r"torch\.float32 \(2,"),
    ],
)
def test_a_batch_that_is_not_a_pair_of_images_and_labels_is_named(batch, found):
    with pytest.raises(ValueError, match=f"a batch must be a pair .* has .*{found}"):
        classifier().training_step(batch, 0)


def test_other_class_order_than_the_checkpoints_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, epochs=1)
    trainer.fit(classifier(), Images())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = Images(classes=[*CLASSES[:2], "dog", "cat", *CLASSES[4:]])
    message = "class 2 is 'cat' in the checkpoint and 'dog' in the data"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).test(classifier(), other, ckpt_path=tmp_path / "x.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).validate(loaded, other)
    make_trainer(tmp_path, epochs=1).fit(loaded, other)  # fine-tuning takes the new classes
    assert loaded.export_spec.class_names == tuple(other.class_names)


# --- any model, helpful errors ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobileone_mu0", "test_resnet", "test_vit"])
def test_trains_any_timm_model(tmp_path, name):
    size = 160 if name == "test_vit" else 32
    data = Images(n=4)
    data.images = torch.randn(4, 3, size, size)
    trainer = make_trainer(tmp_path, EMA(0.9), epochs=1)
    trainer.fit(classifier(model=name), data)
    assert trainer.callback_metrics["val/loss"].isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"model": "mobileone_s9"},
            r"unknown `model` \(='mobileone_s9'\); did you mean mobileone_",
        ),
        ({"model": "?"}, r"unknown `model` \(='\?'\); timm\.list_models"),
        ({"num_classes": 0}, r"`num_classes` \(=0\)"),
        ({"lr": -1.0}, r"`lr` \(=-1\.0\) must be at least 0"),
        ({"momentum": -0.1}, r"`momentum` \(=-0\.1\) must be at least 0"),
        ({"label_smoothing": 1.5}, r"`label_smoothing` \(=1\.5\)"),
        ({"weight_decay": 0.0}, r"`weight_decay_end` \(=1e-05\) must be 0"),
        ({"schedule": "liner"}, r"`schedule` \(='liner'\) must be one of .*; did you mean linear"),
        (
            {"weight_decay_schedule": "step", "weight_decay_end": 0.0},
            r"`weight_decay_schedule` \(='step'\) cannot reach an end value of 0",
        ),
        ({"mixup": -0.1}, r"`mixup` \(=-0\.1\) must be at least 0"),
        ({"cutmix": math.nan}, r"`cutmix` \(=nan\) must be at least 0"),
        ({"metrics": ["F1Scor"]}, r"`metrics` names 'F1Scor'.*did you mean F1Score.*AUROC"),
        ({"metrics": ["ROC"]}, r"`metrics` names 'ROC'.*not one number"),
        ({"metrics": {"F1Score": {"average": None}}}, r"'F1Score'.*None.*not one number"),
        ({"metrics": {"F1Score": {"averag": "macro"}}}, r"'F1Score'.*averag"),
        ({"metrics": ["F1Score"], "num_classes": 1}, r"'F1Score'.*for 1 classes"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        classifier(**arguments)


def test_unknown_optimizer_is_named_with_similar_ones(tmp_path):
    with pytest.raises(ValueError, match=r"`optimizer` \(='momentun'\); did you mean .*momentum"):
        make_trainer(tmp_path).fit(classifier(optimizer="momentun"), Images())


def test_number_of_classes_must_be_the_datas(tmp_path):
    with pytest.raises(ValueError, match=r"`num_classes` \(=3\), but the data have 7 classes"):
        make_trainer(tmp_path).fit(classifier(num_classes=3), Images())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 7], r"label \(=7\) is outside 0\.\.6"),
        ([-1, 2], r"label \(=-1\)"),
        ([0.0, 1.0], "int64"),
    ],
)
@pytest.mark.parametrize("run", ["fit", "validate", "test"])
def test_wrong_labels_are_named(tmp_path, run, labels, message):
    with pytest.raises(ValueError, match=message):
        getattr(make_trainer(tmp_path), run)(classifier(), Images(labels=labels))


@pytest.mark.parametrize("run", ["fit", "validate"])
def test_a_wrong_label_of_a_later_batch_is_named(tmp_path, run):
    labels = [*[0] * 8, 7]
    with pytest.raises(ValueError, match=r"label \(=7\) is outside 0\.\.6"):
        getattr(make_trainer(tmp_path), run)(classifier(), Images(labels=labels))


def test_loss_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path):
    data, model = Images(), classifier()
    data.images[9] = torch.nan  # in the third batch
    trainer = make_trainer(tmp_path, EMA(0.9))
    with pytest.raises(
        FloatingPointError, match=r"loss is nan at step 2 \(epoch 0, .*images hold NaN"
    ):
        trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(v.isfinite().all() for v in saved["state_dict"].values())


def test_endless_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_epochs=-1"):
        make_trainer(tmp_path, epochs=-1).fit(classifier(), Images())


def test_channels_last_is_for_cuda_only(tmp_path):
    model = classifier(channels_last=True)
    make_trainer(tmp_path, epochs=1).fit(model, Images())
    assert all(p.is_contiguous() for p in model.parameters())
