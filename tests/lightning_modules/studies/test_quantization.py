"""The quantization study: what it measures, that it goes on, and what it refuses."""

import pytest
import timm
import torch
from rich.console import Console

from lightning_modules.studies import quantization
from lightning_modules.studies.quantization import (
    study_quantization,
)
from mobileone.bench.results import Result
from mobileone.bench.show.charts import bar_figure
from mobileone.bench.show.tables import result_table
from mobileone.export import ExportSpec

OPTIONS = [
    *("--data.input_size", "32", "--data.num_workers", "0", "--report.samples", "0"),
    *("--trainer.limit_train_batches", "2", "--wandb.mode", "disabled"),
    *("--checkpoint.background", "false"),
]
WANTED = ["float", "noise-aware fold", "trained on frozen statistics"]
pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network that has seen images, as a checkpoint of ten digits."""
    torch.manual_seed(3)
    network = timm.create_model("mobileone_mu0", num_classes=10)
    with torch.no_grad():
        for _ in range(40):
            network(torch.randn(8, 3, 32, 32))
    half = (0.5, 0.5, 0.5)
    names = tuple(map(str, range(10)))
    spec = ExportSpec("mobileone_mu0", names, (3, 32, 32), half, half, "bilinear", 1.0)
    path = tmp_path_factory.mktemp("float") / "float.ckpt"
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    hyper = {"model": "mobileone_mu0", "quantize": None}
    torch.save(
        {"state_dict": state, "hyper_parameters": hyper, "export_spec": spec.to_dict()}, path
    )
    return str(path)


def study(folder, checkpoint, **options):
    given = {"settings": WANTED, "epochs": 1, "formats": ["onnx_int8"], "options": OPTIONS}
    return study_quantization(folder, [checkpoint], **given | options)


# such a network, hardly trained, may fail its checks: it is measured all the same
@pytest.mark.filterwarnings("ignore:Exporting .* failed")
def test_networks_are_measured_in_integers_and_the_study_goes_on(
    tmp_path, checkpoint, monkeypatch, capsys
):
    train, trained = quantization.train, []

    def counted(argv, root, name):
        trained.append(name)
        return train(argv, root, name)

    monkeypatch.setattr(quantization, "train", counted)
    simulated = study(tmp_path / "study", checkpoint, formats=[])
    assert [(r["setting"], r["runtime"]) for r in simulated.rows] == [
        (name, "simulation") for name in WANTED
    ]
    assert len(trained) == 1
    result = study(tmp_path / "study", checkpoint)
    assert len(trained) == 1  # only what was missing is measured
    assert [(r["setting"], r["runtime"]) for r in result.rows] == [
        ("float", "simulation"),
        ("float", "onnx"),
        *((name, runtime) for name in WANTED[1:] for runtime in ("simulation", "onnx_int8")),
    ]
    rows = {(row["setting"], row["runtime"]): row for row in result.rows}
    assert rows["float", "onnx"]["agreement_mean"] == 100
    assert all(0 <= row["acc1_mean"] <= 100 for row in result.rows)
    small, large = rows["noise-aware fold", "onnx_int8"], rows["float", "onnx"]
    assert 0 < small["latency_ms"] < 1000 and 0 < small["float_latency_ms"] < 1000
    assert small["megabytes"] < 0.5 * large["megabytes"]
    monkeypatch.setattr(quantization._Work, "_measure", None)
    assert study(tmp_path / "study", checkpoint).rows == result.rows

    Result.load(result.save(tmp_path / "quantization.json"), "quantization")
    capsys.readouterr()
    Console(width=200).print(result_table(result))
    assert "noise-aware fold" in capsys.readouterr().out
    (panel,) = bar_figure(result).axes
    assert [text.get_text() for text in panel.get_yticklabels()] == WANTED
    assert len(panel.patches) == len(result.rows)


def test_deviation_is_over_the_networks_of_a_model():
    cells = [
        {
            "runtime": "simulation",
            "acc1": value,
            "agreement": 100.0,
            "megabytes": None,
            "refused": 0,
        }
        for value in (90.0, 94.0)
    ]
    (row,) = quantization._rows("m", "s", cells)
    assert (row["n"], row["acc1_mean"]) == (2, 92)
    assert row["acc1_std"] == pytest.approx(8**0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": ["int9"]}, r"unknown `settings` \['int9'\]: choose from"),
        ({"epochs": 0}, r"`epochs` \(=0\)"),
        ({"formats": ["gguf"]}, r"unknown formats \['gguf'\]"),
    ],
)
def test_what_it_cannot_do_is_said_first(tmp_path, checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        study(tmp_path, checkpoint, **options)
    assert not (tmp_path / "cells").exists()


def test_another_configuration_needs_another_folder(tmp_path, checkpoint):
    study(tmp_path, checkpoint, settings=["float"], formats=[])
    with pytest.raises(ValueError, match="another configuration"):
        study(tmp_path, checkpoint, settings=["float"], formats=[], epochs=2)
