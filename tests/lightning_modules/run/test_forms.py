"""Measured forms belong to the run: a resumed one takes those that it began with."""

import json

import pytest

from lightning_modules.cli.main import main
from mobileone.collapsed import choices, keep_choices, trial
from mobileone.collapsed import cpu_kernels as native
from tests.helpers.command import FIT


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of this test alone."""
    native.library()  # which is cached in the user's folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keep_choices(None)
    yield tmp_path / "cache" / "mobileone" / "forms.json"
    keep_choices(None)
    trial._tried.clear()
    trial._fresh.clear()


@pytest.mark.filterwarnings("ignore:the checkpoint's schedule of")  # the second run is longer
def test_a_resumed_run_takes_the_forms_that_it_began_with(tmp_path, monkeypatch, cache):
    timed = []

    def seconds(run, device):
        run()
        timed.append(run.args[1])
        return 1.0 if run.args[1] is None else 0.5 + len(timed) % 3

    monkeypatch.setattr(trial, "seconds", seconds)
    options = [*FIT, "--model.model", "mobileone_mu0", "--model.collapse", "measured"]
    options += ["--trainer.limit_train_batches", "2"]
    options += ["--run.root", str(tmp_path), "--run.name", "forms", "--resume", "auto"]
    main([*options, "--trainer.max_epochs", "1"])
    (file,) = tmp_path.glob("forms/2*/forms/rank-0.json")  # not by `latest`
    began = json.loads(file.read_text())
    assert began == json.loads(cache.read_text())
    assert len({*next(forms for name, forms in began.items() if name != "format").values()}) > 1
    assert choices._run_file is None  # what trains next is no part of it
    cache.unlink()
    trials = len(timed)
    main([*options, "--trainer.max_epochs", "2"])
    assert len(timed) == trials and json.loads(file.read_text()) == began
    assert not cache.exists()
