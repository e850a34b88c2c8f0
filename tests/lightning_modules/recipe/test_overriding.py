"""A subclass with a loss, schedules, metrics and an argument of its own; metrics by name."""

import csv

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torch.optim.lr_scheduler import MultiStepLR
from torchmetrics.classification import MulticlassCohenKappa

from callbacks.report.figures import curve_figures, curves_figure
from lightning_modules.recipe.classifier import ImageClassifier
from mobileone.export import export_checkpoint, load_torchscript_artifact
from tests.helpers import checkpoints
from tests.helpers.trainer import SaveEachEpoch, fit
from tests.lightning_modules.recipe.test_classifier import CLASSES, TINY, Images, reference


class Focal(ImageClassifier):
    """Focal loss (arXiv 1708.02002), steps of the learning rate, and one more metric."""

    def __init__(self, *args, gamma: float = 2.0, **kwargs):
        super().__init__(*args, **kwargs)

    def make_loss(self):
        gamma = self.hparams["gamma"]

        def focal(logits, targets):
            losses = F.cross_entropy(logits, targets, reduction="none")
            return (1 - (-losses).exp()) ** gamma * losses

        return focal

    def make_schedules(self, optimizer, total_steps):
        return [MultiStepLR(optimizer, [total_steps // 2], gamma=0.5)]

    def make_metrics(self):
        return {**super().make_metrics(), "kappa": MulticlassCohenKappa(self.num_classes)}


def focal(**options):
    return Focal(TINY, **{"num_classes": len(CLASSES), "lr": 0.01, **options})


def test_a_subclass_trains_with_its_own_loss_schedules_and_metrics(tmp_path):
    model, data = focal(gamma=3.0, lr=0.0), Images(n=4)
    model.train()
    p = model(data.images).detach().softmax(1)[range(4), data.targets]
    expected = ((1 - p) ** 3 * -p.log()).mean().item()
    trainer = fit(tmp_path, model, data, max_epochs=2)
    assert trainer.callback_metrics["train/loss_epoch"].item() == pytest.approx(expected, rel=1e-4)
    assert "val/kappa" in trainer.callback_metrics
    model = focal()
    fit(tmp_path, model, Images(), max_epochs=2)
    assert model.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)


def test_its_checkpoint_is_resumed_rebuilt_and_exported(tmp_path):
    whole, resumed = focal(gamma=3.0), focal(gamma=3.0)
    fit(tmp_path, whole, Images(), SaveEachEpoch(), max_epochs=2)
    loaded = Focal.load_from_checkpoint(tmp_path / "1.ckpt", weights_only=True)
    assert loaded.hparams["gamma"] == 3.0
    fit(tmp_path, resumed, Images(), ckpt_path=tmp_path / "0.ckpt", max_epochs=2)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
    export_checkpoint(tmp_path / "1.ckpt", tmp_path / "artifact", ["torchscript"])
    shipped, _ = load_torchscript_artifact(tmp_path / "artifact")
    logits = reference(whole.model, Images())
    torch.testing.assert_close(shipped(Images().images), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("words", "names"),
    [("[F1Score, AUROC]", ["F1Score", "AUROC"]), ("{F1Score: {average: micro}}", ["F1Score"])],
)
def test_the_command_line_takes_metrics_and_the_argument_of_a_subclass(words, names):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Focal, "model")
    line = f"--model.num_classes=7 --model.model={TINY} --model.gamma=3 --model.mixup=0.2".split()
    config = parser.parse_args([*line, f"--model.metrics={words}", "--model.schedule=linear"])
    model = Focal(**config.model.as_dict())
    assert (model.hparams["gamma"], model.hparams["mixup"]) == (3.0, 0.2)
    assert list(model.make_metrics()) == [*names, "kappa"]
    with pytest.raises(ArgumentError, match="schedule"):
        parser.parse_args([*line, "--model.schedule=lineer"])


def labels_only(logits, targets):
    return -logits.log_softmax(1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize(
    ("loss", "mixup", "message"),
    [
        (F.cross_entropy, 0.0, r"gives \(\) for 2 images.*reduction='none'"),
        (None, 0.0, "fails on targets that are class indices.*not callable"),
        (lambda logits, targets: None, 0.0, "gives NoneType for 2 images"),
        (labels_only, 0.2, "fails on targets that are probabilities .*mixup"),
    ],
)
def test_a_loss_that_cannot_train_is_refused_at_once(loss, mixup, message):
    class Own(ImageClassifier):
        def make_loss(self):
            return loss

    with pytest.raises(ValueError, match=f"`make_loss` of Own returned {message}"):
        Own(TINY, num_classes=7, mixup=mixup)


def macro_f1(guesses, targets, classes):
    """From the counts of each class; a class that is neither true nor predicted counts not."""
    scores = []
    for c in range(classes):
        true, said = targets == c, guesses == c
        if true.any() or said.any():
            scores.append(2 * (true & said).sum().item() / (true.sum() + said.sum()).item())
    return sum(scores) / len(scores)


def test_metrics_by_name_are_logged_monitored_and_drawn(tmp_path):
    names = {"F1Score": {}, "MulticlassF1Score": {"average": "micro"}, "CalibrationError": {}}
    model = ImageClassifier(TINY, num_classes=7, lr=0.01, metrics=names)
    data, logger = Images(), CSVLogger(tmp_path)
    saver = checkpoints.saver(tmp_path / "checkpoints", monitor="val/F1Score", background=False)
    trainer = fit(tmp_path, model, data, saver, logger=logger, max_epochs=2)
    (tested,) = trainer.test(model, data, verbose=False)
    logits = reference(model.model, data)
    guesses = logits.argmax(1)
    assert tested["test/F1Score"] == pytest.approx(macro_f1(guesses, data.targets, 7))
    assert tested["test/MulticlassF1Score"] == pytest.approx(tested["test/acc1"])
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        scores = [float(row["val/F1Score"]) for row in csv.DictReader(file) if row["val/F1Score"]]
    assert len(scores) == 2
    assert float(saver.best_model_score) == pytest.approx(max(scores))
    confidence, right = logits.softmax(1).max(1).values, (guesses == data.targets).float()
    bins = (confidence * 15).ceil().clamp(1, 15)
    error = sum(
        (confidence[bins == b] - right[bins == b]).sum().abs().item() for b in range(1, 16)
    ) / len(right)
    assert tested["test/CalibrationError"] == pytest.approx(error, rel=1e-4)
    curves = {"val/acc1": [(1, 0.5)], "val/F1Score": [(1, 0.4), (2, 0.6)]}
    assert "F1Score" in curve_figures(curves)
    drawn = {axis.get_title() for axis in curves_figure(curves).axes}
    assert drawn >= {"loss", "accuracy", "F1Score"}
