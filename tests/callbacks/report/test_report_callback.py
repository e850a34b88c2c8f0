"""Pictures and artifacts of a run: what is drawn, where it goes, and that wandb gets it."""

import csv
import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from callbacks.report import callback as report_module
from callbacks.report.callback import Report
from callbacks.report.callback import _write_matrix as write_matrix
from callbacks.report.figures import confusion_figure, curves_figure, read_curves, samples_figure
from lightning_modules.run.folder import RunFolder
from lightning_modules.run.wandb_logger import WandbOptions, make_loggers
from mobileone.export.manifest import Manifest
from mobileone.export.spec import ExportSpec
from tests.helpers import checkpoints
from tests.helpers.processes import wait_for
from tests.helpers.trainer import make_trainer
from tests.helpers.variants import slow

NAMES = ("cat", "dog", "a $5 bill")
SPEC = ExportSpec("mobileone_mu0", NAMES, (3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)


class Network(nn.Module):
    """Predicts the class that is written into the first pixel."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return 5 * self.scale * nn.functional.one_hot(x[:, 0, 0, 0].long(), 3).float()


class Classifier(LightningModule):
    export_spec = SPEC
    test_confusion = None

    def __init__(self):
        super().__init__()
        self.model = Network()

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, _):
        return self(batch[0]).sum()

    def validation_step(self, batch, _):
        self.log("val/acc1", 1.0)
        return self(batch[0])

    def test_step(self, batch, _):
        pass

    def on_test_epoch_end(self):
        self.test_confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [2, 0, 0]])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def loader():
    """Ten images sorted by class, in batches of four."""
    targets = torch.tensor([0] * 4 + [1] * 4 + [2] * 2)
    images = targets.float()[:, None, None, None].expand(-1, 3, 32, 32).clone()
    return DataLoader(TensorDataset(images, targets), batch_size=4)


@pytest.mark.parametrize(("samples", "classes"), [(3, [0, 1, 2]), (8, [0, 0, 1, 1, 1, 2, 2])])
def test_samples_come_from_the_whole_set(samples, classes, loader, tmp_path, monkeypatch):
    drawn = []

    def record(images, targets, probabilities, names):
        drawn.append((images, targets, probabilities))
        return samples_figure(images, targets, probabilities, names)

    monkeypatch.setattr("callbacks.report.callback.samples_figure", record)
    make_trainer(tmp_path, Report(samples=samples)).validate(Classifier(), loader, verbose=False)
    (_, worst, _), (images, targets, probabilities) = drawn
    assert len(worst) == min(samples, 10)
    assert targets.tolist() == classes
    assert probabilities.argmax(1).tolist() == classes
    expected = (torch.tensor(classes) * 0.5 + 0.5).clamp(max=1)  # as 8-bit images
    torch.testing.assert_close(images[:, 0, 0, 0], expected, rtol=0, atol=0.5 / 255 + 1e-6)
    for name in ("samples", "worst"):
        assert (tmp_path / f"report/{name}.png").stat().st_size > 1000


def test_no_samples_no_picture(loader, tmp_path):
    make_trainer(tmp_path, Report(samples=0)).validate(Classifier(), loader, verbose=False)
    assert not (tmp_path / "report").exists()


def test_confusion_matrix_is_drawn_and_written(loader, tmp_path):
    make_trainer(tmp_path, Report(samples=0)).test(Classifier(), loader, verbose=False)
    assert (tmp_path / "report/confusion_matrix.png").is_file()
    with (tmp_path / "report/confusion_matrix.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["true \\ predicted", *NAMES],
        ["cat", "3", "1", "0"],
        ["dog", "0", "4", "0"],
        ["a $5 bill", "2", "0", "0"],
    ]


def test_samples_figure_tells_right_from_wrong():
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1]])
    figure = samples_figure(torch.zeros(2, 3, 8, 8), torch.tensor([0, 2]), probabilities, NAMES)
    right, wrong = (axis.get_title() for axis in figure.axes[:2])
    assert right == "cat 90%"
    assert wrong == "✗ dog 70%\ntrue: a \\$5 bill"


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_samples_figure_takes_any_channels(channels):
    figure = samples_figure(
        torch.rand(9, channels, 8, 8), torch.zeros(9).long(), torch.eye(3).repeat(3, 1), NAMES
    )
    shown = [np.asarray(axis.images[0].get_array()).shape for axis in figure.axes[:9]]
    assert shown == [(8, 8, channels) if channels in (3, 4) else (8, 8)] * 9


def test_a_stream_of_unknown_length_is_shown_too(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(torch.full((3, 32, 32), float(t)), t) for t in (0, 0, 1, 1, 2, 2)])

    report = Report(samples=2)
    loader = DataLoader(Stream(), batch_size=2)
    make_trainer(tmp_path, report).validate(Classifier(), loader, verbose=False)
    assert torch.cat([targets for _, targets, _ in report._shown]).tolist() == [0, 1]


def test_curves_go_on_over_a_resume(tmp_path):
    """The later version replaces what a crash lost."""
    for version, rows in {
        0: "epoch,step,lr,val/acc1\n0,1,0.1,\n0,1,,0.5\n1,2,0.09,\n1,3,0.08,\n",
        1: "step,epoch,lr,val/acc1\n2,1,0.07,\n3,1,,0.75\n",
        10: "step,epoch,lr\n4,2,0.01\n",
        9: "step,epoch,lr\n4,2,0.02\n",
    }.items():
        folder = tmp_path / f"version_{version}"
        folder.mkdir()
        (folder / "metrics.csv").write_text(rows)
    curves = read_curves(tmp_path)
    assert curves["lr"] == [(1, 0.1), (2, 0.07), (3, 0.08), (4, 0.01)]
    assert curves["val/acc1"] == [(1, 0.5), (3, 0.75)]


def test_curves_figure_draws_each_metric_and_says_what_is_missing():
    figure = curves_figure({"val/acc1": [(1, 0.5), (3, 0.75)], "val/loss": [(1, 1e6), (3, 1.0)]})
    loss, accuracy, rate, _ = figure.axes
    assert accuracy.lines[0].get_xydata().tolist() == [[1, 0.5], [3, 0.75]]
    assert rate.texts[0].get_text() == "not logged"
    assert loss.lines[0].get_ydata()[0] == 1e6


def test_confusion_figure_shows_shares_and_counts():
    figure = confusion_figure(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), NAMES)
    axis = figure.axes[0]
    expected = [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(axis.images[0].get_array(), expected)
    assert sorted(text.get_text() for text in axis.texts) == ["1", "3", "4"]


def test_confusion_figure_of_a_thousand_classes_leaves_the_names_out():
    names = [str(n) for n in range(1000)]
    axis = confusion_figure(torch.eye(1000), names).axes[0]
    assert not axis.texts
    assert len(axis.get_xticks()) < 20


@pytest.mark.parametrize(
    ("arguments", "complaint"), [({"samples": -1}, "=-1"), ({"log_artifact": "all"}, "'all'")]
)
def test_bad_arguments_are_named(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        Report(**arguments)


def wandb_records(path):
    """The records of an offline run's file: a LevelDB log of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, []
    while position < len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if length == 0:  # not written yet
            return
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def finished_records(path):
    """All records, once wandb's own process has written the last one."""
    wait_for(lambda: any(record.HasField("exit") for record in wandb_records(path)))
    return list(wandb_records(path))


@pytest.mark.parametrize("mode", ["best", slow("every"), slow("none")])
def test_wandb_gets_pictures_and_the_artifact_with_its_manifest(
    mode, loader, tmp_path, monkeypatch
):
    import wandb

    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = RunFolder.create(str(tmp_path), "test")
    saver = checkpoints.saver(folder.checkpoints, background=False)
    loggers = make_loggers(folder, WandbOptions())
    running = make_trainer(folder.path, saver, Report(2, mode), logger=loggers)
    running.fit(Classifier(), loader, loader)
    wandb.finish()
    records = finished_records(next(folder.path.rglob("*.wandb")))
    history = {i.key or i.nested_key[0] for r in records for i in r.history.item}
    assert "report/samples" in history
    logged = {
        i.key or i.nested_key[0]: json.loads(i.value_json) for r in records for i in r.history.item
    }
    entry = Manifest.load(saver.best_artifact_path).formats["torchscript"]
    for key in ("max_relative_error", "top1_agreement"):
        assert logged[f"export/torchscript/{key}"] == pytest.approx(entry["parity"][key])
    assert logged["export/torchscript/bytes"] == entry["bytes"] > 1000
    assert entry["parity"]["top1_agreement"] == 1
    artifacts = [r.request.log_artifact.artifact for r in records] + [r.artifact for r in records]
    artifacts = [a for a in artifacts if a.name]
    assert len(artifacts) == (0 if mode == "none" else 1)
    for artifact in artifacts:
        assert artifact.type == "model"
        manifest = json.loads(artifact.metadata)
        assert manifest["spec"]["class_names"] == list(NAMES)
        files = {entry.path for entry in artifact.manifest.contents}
        assert {"manifest.json", "model.torchscript.pt"} <= files


def test_a_module_without_a_test_matrix_is_left_alone(tmp_path):
    module = SimpleNamespace(test_confusion=None)
    Report().on_test_end(SimpleNamespace(is_global_zero=True), module)


def test_a_matrix_that_was_cut_short_leaves_the_one_before(tmp_path):
    path = tmp_path / "confusion_matrix.csv"
    write_matrix(path, torch.eye(3, dtype=torch.int64), NAMES)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="zip"):
        write_matrix(path, torch.zeros(3, 3, dtype=torch.int64), NAMES[:2])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_go_to_any_logger_and_none_ends_the_training(tmp_path):
    """Stand-ins with the methods of Comet's experiment and of MLflow's client."""
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    calls = []
    comet = SimpleNamespace(log_image=lambda file, name, step: calls.append((file, name, step)))
    mlflow = SimpleNamespace(log_artifact=lambda run, file, folder: calls.append((run, folder)))

    def broken(*args, **kwargs):
        raise ConnectionError("no server")

    loggers = [
        SimpleNamespace(experiment=SimpleNamespace(log_image=broken)),
        SimpleNamespace(experiment=comet),
        SimpleNamespace(experiment=mlflow, run_id="r1"),
        SimpleNamespace(experiment=object()),
    ]
    with pytest.warns(UserWarning, match="did not take report/p: no server"):
        report_module._log_picture(loggers, "report/p", tmp_path / "p.png", 7)
    assert calls == [(str(tmp_path / "p.png"), "report/p", 7), ("r1", "report/p")]
