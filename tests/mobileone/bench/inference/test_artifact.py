"""Latency of an artifact's own files."""

import dataclasses
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from lightning_modules.cli.main import main
from mobileone.bench.inference.artifact import measure_artifacts
from mobileone.bench.results import Result
from mobileone.bench.runtimes import RUNTIMES
from mobileone.bench.show.charts import bar_figure
from mobileone.bench.show.tables import result_table
from mobileone.export import FORMATS, export_model
from tests.helpers.command import error_of
from tests.helpers.tables import text_of
from tests.helpers.tiny import tiny_network, tiny_spec

READERS = {  # of each format, here
    "torchscript": ["torchscript"],
    "torch_export": ["torch_export"],
    "onnx": ["onnxruntime", "openvino"],
    "executorch": ["executorch"],
    "litert": ["litert"],
    "coreai": ["coreai"],
}
THERE = {
    name: there
    for name, readers in READERS.items()
    if name in FORMATS and (there := [key for key in readers if RUNTIMES[key].lack() is None])
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "artifact"
    names = [*THERE, "coreml"] if find_spec("coremltools") else list(THERE)
    export_model(tiny_network(), tiny_spec(), path, names)
    return path


@pytest.fixture(scope="module")
def result(folder):
    return measure_artifacts([str(folder)], runs=6)


def test_each_file_is_timed_in_each_runtime_that_reads_it(result, folder):
    timed = [row for row in result.rows if row["failure"] is None]
    expected = [(name, reader) for name, readers in THERE.items() for reader in readers]
    found = {(row["format"], row["runtime"]) for row in timed if not row["format"] == "coreml"}
    assert found == set(expected)
    for row in timed:
        assert row["relative_error"] < 1e-5
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["timed"] == (6 if row["speed"] else 1)
        assert row["folder"] == str(folder) and row["threads"] == 1
        file = folder / FORMATS[row["format"]].filename
        assert file.is_dir() or row["bytes"] == file.stat().st_size
        assert row["speed"] is (row["runtime"] != "coreai")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has the runtime")
def test_what_cannot_run_here_is_named(result):
    pytest.importorskip("coremltools")
    (row,) = (row for row in result.rows if row["format"] == "coreml")
    assert row["failure"] == f"needs darwin; this is {sys.platform}"
    assert "model.mlpackage: needs darwin" in " ".join(text_of(result_table(result)).split())


def test_a_table_and_a_panel_a_folder(folder, tmp_path):
    second = shutil.copytree(folder, tmp_path / "second")
    both = measure_artifacts([str(folder), str(second)], ["torchscript"], runs=1)
    assert "statistic min_ms, threads 1" in " ".join(text_of(result_table(both)).split())
    panels = bar_figure(both).axes
    assert [axes.get_title("left") for axes in panels] == [f"folder {folder}", f"folder {second}"]
    (bar,) = panels[1].patches
    assert bar.get_width() == both.rows[1]["min_ms"]


def test_runtimes_of_a_file_share_its_place_and_interpreters_are_not_drawn(result):
    """The interpreter of Core AI takes a hundred times as long as the others."""
    times = {
        ("a.onnx", "x"): 1.0,
        ("a.onnx", "y"): 2.0,
        ("b.pte", "z"): 3.0,
        ("c", "coreai"): 900.0,
    }
    rows = [
        {"folder": "f", "file": f"f/{file}", "runtime": runtime, "min_ms": time,
         "speed": runtime != "coreai", "failure": None}
        for (file, runtime), time in times.items()
    ]  # fmt: skip
    figure = bar_figure(dataclasses.replace(result, rows=rows))
    drawn = {bar.get_width(): bar.get_height() for bar in figure.axes[0].patches}
    assert drawn == pytest.approx({1.0: 0.42, 2.0: 0.42, 3.0: 0.84})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["x", "y", "z"]


class Repeated(nn.Module):
    """The tiny network, after the same convolution many times."""

    def __init__(self, times):
        super().__init__()
        self.conv, self.network, self.times = nn.Conv2d(3, 3, 9, padding=4), tiny_network(), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.conv(x)
        return self.network(x)


def test_a_file_that_takes_longer_is_told_from_a_shorter_one(tmp_path):
    spec = tiny_spec(size=(128, 128))
    for times in (1, 20):
        export_model(Repeated(times).eval(), spec, tmp_path / str(times), ["torchscript"])
    files = [str(tmp_path / name / "model.torchscript.pt") for name in ("1", "20")]
    short, long = measure_artifacts(files, runs=10).rows
    assert (short["file"], long["file"]) == (files[0], files[1])
    assert long["min_ms"] > 4 * short["min_ms"]


def test_a_runtime_that_computes_something_else_is_not_timed(folder, monkeypatch):
    wrong = dataclasses.replace(
        RUNTIMES["torchscript"], load=lambda path, x, threads: lambda: torch.zeros(1, 3)
    )
    monkeypatch.setitem(RUNTIMES, "torchscript", wrong)
    (row,) = measure_artifacts([str(folder)], ["torchscript"], runs=1).rows
    assert "differs from the file's by 1" in row["failure"] and "min_ms" not in row


def test_a_file_that_is_not_the_manifests_is_refused(folder, tmp_path, capsys):
    copied = shutil.copytree(folder, tmp_path / "copied")
    (copied / "model.pt2").write_bytes((copied / "model.torchscript.pt").read_bytes())
    said = error_of(capsys, "benchmark", "latency", "--artifact", copied, "--runs", "1")
    assert "model.pt2" in said
    for wrong in ([], [tmp_path / "none"]):
        assert "artifact" in error_of(capsys, "benchmark", "latency", "--artifact", *wrong)


def test_executorch_gets_the_threads_that_the_row_states(folder):
    if "executorch" not in THERE:
        pytest.skip("needs executorch")
    from executorch.extension.pybindings import _C

    for threads in (1, min(2, len(RUNTIMES))):
        _C._unsafe_reset_threadpool(3)
        (row,) = measure_artifacts([str(folder / "model.pte")], runs=1, threads=threads).rows
        assert row["failure"] is None and row["threads"] == threads
        assert _C._threadpool_get_thread_count() == threads


def test_the_command_saves_a_result_and_compares_it(folder, tmp_path, capsys):
    command = ["benchmark", "latency", "--runs", "2", "--artifact", str(folder)]
    command += ["--runtimes", "[torchscript]"]
    main([*command, "--output", str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {
        f"artifact.{end}" for end in ("json", "csv", "png", "svg")
    }
    saved = Result.load(tmp_path / "artifact.json", "artifact")
    assert [row["runtime"] for row in saved.rows] == ["torchscript"]
    main([*command, "--against", str(tmp_path / "artifact.json")])
    assert "now / before" in capsys.readouterr().out
