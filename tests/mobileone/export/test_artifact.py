import copy
import dataclasses
import random
import re
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from mobileone import MobileOneBlock
from mobileone.export import (
    ExportJob,
    Manifest,
    Metadata,
    RejectedError,
    TrainingState,
    artifact,
    export_model,
    load_torchscript_artifact,
)
from mobileone.export.formats import table as formats_module
from mobileone.export.inspect import describe_artifact
from mobileone.export.isolation import isolated
from mobileone.export.worker import run_job
from tests.helpers.tiny import tiny_network, tiny_spec

FORMATS = ["torchscript"]


def test_the_folder_holds_both_formats_and_says_what_was_checked(tmp_path):
    pytest.importorskip("coremltools")
    manifest = export_model(tiny_network(), tiny_spec(), tmp_path / "artifact")
    names = {p.name for p in (tmp_path / "artifact").iterdir()}
    assert names == {"model.torchscript.pt", "model.mlpackage", "manifest.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
    torchscript = manifest.formats["torchscript"]["parity"]
    assert torchscript["status"] == "measured"
    assert torchscript["max_relative_error"] < 1e-4
    assert torchscript["top1_agreement"] == 1
    coreml = manifest.formats["coreml"]
    assert coreml["parity"]["status"] == coreml["program_parity"]["status"] == "measured"
    assert coreml["parity"]["max_relative_error"] < 1e-2
    assert ("runtime_parity" in coreml) == (sys.platform == "darwin")
    assert manifest.images == "synthetic"
    assert manifest.problems == ()
    Manifest.load(tmp_path / "artifact").verify(tmp_path / "artifact")


def sabotage(monkeypatch):
    row = formats_module.FORMATS["torchscript"]

    def sabotaged(model, spec, path, metadata):
        wrong = copy.deepcopy(model)
        wrong[-1].weight.neg_()
        return row.write(wrong, spec, path, metadata)

    bad = dataclasses.replace(row, write=sabotaged)
    monkeypatch.setitem(formats_module.FORMATS, "torchscript", bad)


def test_a_wrong_file_is_not_published_under_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "artifact"
    with monkeypatch.context() as patched:
        sabotage(patched)
        with pytest.raises(RejectedError, match=r"torchscript: parity: relative error .* 0\.001"):
            export_model(tiny_network(), tiny_spec(), folder, FORMATS)
    assert [p.name for p in tmp_path.iterdir()] == ["artifact.rejected"]
    manifest = Manifest.load(tmp_path / "artifact.rejected")
    manifest.verify(tmp_path / "artifact.rejected")
    assert manifest.formats["torchscript"]["parity"]["max_relative_error"] > 0.1
    assert "relative error" in manifest.problems[0]
    export_model(tiny_network(), tiny_spec(), folder, FORMATS)
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_a_wrong_file_does_not_take_the_good_one_with_it(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    folder, names = tmp_path / "artifact", ["torchscript", "onnx"]
    with monkeypatch.context() as patched:
        sabotage(patched)
        manifest = export_model(tiny_network(), tiny_spec(), folder, names)
    assert list(manifest.formats) == ["onnx"]
    assert re.match("parity: relative error .* is above 0.001", manifest.rejected["torchscript"])
    assert Manifest.load(folder) == manifest
    manifest.verify(folder)
    assert {p.name for p in folder.iterdir()} == {"model.onnx", "manifest.json"}
    beside = Manifest.load(tmp_path / "artifact.rejected")  # for a look
    beside.verify(tmp_path / "artifact.rejected")
    assert list(beside.formats) == ["torchscript"]
    assert "no torchscript" in describe_artifact(folder)
    assert "REJECTED" in describe_artifact(tmp_path / "artifact.rejected")
    assert list(manifest.described()) == ["onnx", "torchscript"]
    assert manifest.described()["torchscript"].startswith("left out: parity: relative error")
    whole = export_model(tiny_network(), tiny_spec(), folder, names, overwrite=True)
    assert whole.rejected == {} and set(whole.formats) == {*names}
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_float16_that_overflows_is_left_out_with_what_helps(tmp_path):
    """As of statistics of few steps: a variance that is far too small."""
    pytest.importorskip("coremltools")
    model = tiny_network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var /= 1e9
    manifest = export_model(model, tiny_spec(), tmp_path / "artifact")
    assert list(manifest.formats) == ["torchscript"]
    assert re.search(
        r"not finite .*train longer.*--formats '\[torchscript,coreml_fp32\]'",
        manifest.rejected["coreml"],
    )


def test_a_rejected_artifact_leaves_the_older_one(tmp_path, monkeypatch):
    folder = tmp_path / "artifact"
    first = export_model(tiny_network(), tiny_spec(), folder, FORMATS)
    sabotage(monkeypatch)
    with pytest.raises(RejectedError):
        export_model(tiny_network(), tiny_spec(), folder, FORMATS, overwrite=True)
    assert Manifest.load(folder) == first


@pytest.mark.parametrize("older", [True, False])
def test_a_full_disk_leaves_no_rejected_folder_and_no_word_of_one(tmp_path, monkeypatch, older):
    sabotage(monkeypatch)
    if older:
        with pytest.raises(RejectedError, match=r"its files are in .*artifact\.rejected"):
            export_model(tiny_network(), tiny_spec(), tmp_path / "artifact", FORMATS)

    def full(staged, final):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "publish_folder", full)
    job = ExportJob(tmp_path / "a.ckpt", tmp_path / "artifact")
    monkeypatch.setattr(
        ExportJob,
        "run",
        lambda job: export_model(tiny_network(), tiny_spec(), job.directory, FORMATS),
    )
    result = run_job(job)
    assert (result.status, result.manifest) == ("rejected", None)
    assert "artifact is not published: torchscript: parity" in result.reason
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_no_trace_and_the_older_artifact(tmp_path, monkeypatch):
    folder = tmp_path / "artifact"
    first = export_model(tiny_network(), tiny_spec(), folder, FORMATS)

    def full(self, directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Manifest, "save", full)
    with pytest.raises(OSError, match="No space"):
        export_model(tiny_network(), tiny_spec(), folder, FORMATS, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
    assert Manifest.load(folder) == first
    first.verify(folder)


def test_an_existing_folder_is_replaced_only_on_demand(tmp_path):
    folder = tmp_path / "artifact"
    export_model(tiny_network(), tiny_spec(), folder, FORMATS, TrainingState(step=1))
    with pytest.raises(FileExistsError, match="--overwrite true"):
        export_model(tiny_network(), tiny_spec(), folder, FORMATS, TrainingState(step=2))
    assert Manifest.load(folder).training.step == 1
    export_model(
        tiny_network(), tiny_spec(), folder, FORMATS, TrainingState(step=2), overwrite=True
    )
    assert Manifest.load(folder).training.step == 2


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(tmp_path, training):
    model = tiny_network().bfloat16().to(memory_format=torch.channels_last).train(training)
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    export_model(model, tiny_spec(), tmp_path / "artifact", FORMATS)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert (ours.dtype, ours.requires_grad) == (theirs.dtype, theirs.requires_grad)
        assert ours.stride() == theirs.stride()


class Dicer(nn.Module):
    """Draws random numbers whenever it is copied or run, as a careless model may."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        torch.rand(1), np.random.rand(), random.random()
        warnings.simplefilter("ignore")
        torch.backends.cudnn.benchmark = True
        return self.model(x)


def modes():
    cudnn = torch.backends.cudnn
    return (
        torch.get_rng_state().tolist(),
        str(np.random.get_state()),
        random.getstate(),
        list(warnings.filters),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("formats", [["torchscript"], ["coreml"]])
def test_random_states_and_modes_are_left_as_they_were(tmp_path, formats, inference):
    if "coreml" in formats:
        pytest.importorskip("coremltools")
    model = Dicer(tiny_network())
    with torch.inference_mode(inference), torch.autocast("cpu", enabled=not inference):
        before = modes()
        export_model(model, tiny_spec(), tmp_path / "artifact", formats)
        assert modes() == before


def test_isolated_work_runs_in_the_same_modes_everywhere():
    with torch.inference_mode(), torch.autocast("cpu"), isolated():
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
    with isolated():
        assert not torch.is_grad_enabled()


def test_isolation_holds_when_the_work_fails():
    before = modes()
    with pytest.raises(RuntimeError), isolated():
        Dicer(nn.Identity())(torch.ones(1))
        raise RuntimeError
    assert modes() == before


def test_a_wrong_number_of_classes_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"returned \[\(8, 5\)\].*3 class names"):
        export_model(tiny_network(classes=5), tiny_spec(), tmp_path / "artifact", FORMATS)
    assert list(tmp_path.iterdir()) == []


def test_the_metadata_is_completed(tmp_path):
    run = TrainingState(3, 400, {"val/acc1": 0.5}, "x.ckpt")
    manifest = export_model(tiny_network(), tiny_spec(), tmp_path / "1", FORMATS, run)
    assert manifest.metadata.version == "epoch 3, step 400"
    assert "tiny" in manifest.metadata.description
    mine = Metadata("Ada", "MIT", "mine", "7")
    manifest = export_model(tiny_network(), tiny_spec(), tmp_path / "2", FORMATS, run, mine)
    assert manifest.metadata == mine


def test_a_compiled_model_is_unwrapped(tmp_path):
    model = tiny_network()
    export_model(torch.compile(model), tiny_spec(), tmp_path / "artifact", FORMATS)
    images = torch.randn(2, 3, 32, 48)
    module, _ = load_torchscript_artifact(tmp_path / "artifact")
    with torch.no_grad():
        assert torch.allclose(module(images), model(images), rtol=1e-4, atol=1e-5)


def test_loading_refuses_a_tampered_folder(tmp_path):
    folder = tmp_path / "artifact"
    export_model(tiny_network(), tiny_spec(), folder, FORMATS)
    file = folder / "model.torchscript.pt"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="does not match its manifest"):
        load_torchscript_artifact(folder)


def test_a_model_without_anything_to_fuse_is_exported(tmp_path):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    manifest = export_model(model, tiny_spec(), tmp_path / "artifact", FORMATS)
    assert manifest.formats["torchscript"]["parity"]["max_relative_error"] < 1e-5
    assert not any(isinstance(m, MobileOneBlock) for m in model.modules())
