"""The table at the end of a fit says what is there, and of which checkpoint."""

import re
from dataclasses import replace

import pytest
from rich.console import Console

from lightning_modules.run.summary import fit_summary
from mobileone.export import FORMATS
from tests.helpers.checkpoints import fit, name, saver
from tests.helpers.modules import ScoredClassifier

pytestmark = pytest.mark.filterwarnings("ignore:epoch=.* has files for", "ignore:Exporting")


def no_converter(model, spec, path, metadata):
    raise RuntimeError("no such operator, choose '[onnx,coreml]'")


def shown(callback, run):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(fit_summary(callback, run))
    return {
        cells[0].strip(): cells[1].strip()
        for line in capture.get().splitlines()
        if len(cells := line.strip("│").split("│")) == 2
    }


def train(folder, scores, broken, monkeypatch):
    """A fit; `broken` are the formats that cannot be written after each of its validations."""
    real, turns = dict(FORMATS), iter(broken)
    callback = saver(folder / "checkpoints", formats=["torchscript", "onnx"], background=False)

    class Turns(ScoredClassifier):
        def on_validation_epoch_end(self):
            super().on_validation_epoch_end()
            turn = next(turns)
            for key in ("torchscript", "onnx"):
                write = no_converter if key in turn else real[key].write
                monkeypatch.setitem(FORMATS, key, replace(real[key], write=write))

    fit(Turns(scores), callback, folder, max_epochs=len(scores))
    return shown(callback, folder)


def test_what_was_written_and_what_was_left_out(tmp_path, monkeypatch):
    rows = train(tmp_path, [0.5], [["onnx"]], monkeypatch)
    assert rows["val/acc1"] == "0.5000"
    assert rows["checkpoint"] == f"checkpoints/{name(0)}.ckpt"
    assert rows["artifact"] == f"checkpoints/{name(0)}"
    assert re.match(r"model\.torchscript\.pt, \d+ kB, parity error ", rows["torchscript"])
    assert rows["torchscript"].endswith(", same class 4/4")
    assert rows["onnx"] == "left out: RuntimeError: no such operator, choose '[onnx,coreml]'"


def test_files_of_another_checkpoint_are_not_shown_as_the_best_ones(tmp_path, monkeypatch):
    every = ["torchscript", "onnx"]
    rows = train(tmp_path, [0.5, 0.9, 0.1], [[], every, every], monkeypatch)
    assert rows["checkpoint"] == f"checkpoints/{name(1)}.ckpt"
    assert rows["artifact"].startswith("none of this checkpoint: ")
    assert "no such operator" in rows["artifact"]
    assert rows["best/"] == f"still the artifact of {name(0)}.ckpt, another checkpoint"
    assert "torchscript" not in rows
