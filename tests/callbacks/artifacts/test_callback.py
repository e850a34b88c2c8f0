import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback, WeightAveraging
from torch import nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from callbacks.artifacts.callback import ReparameterizeOnSave
from callbacks.artifacts.folder import CheckpointFolder
from callbacks.ema import EMA
from lightning_modules.errors import message_for_user
from mobileone.export import FORMATS, ExportSpec, Manifest, Metadata, load_torchscript_artifact
from mobileone.export import checkpoint as exports
from mobileone.export.artifact import RejectedError
from mobileone.io import optional_import
from tests.helpers.checkpoints import (
    STEPS,
    assert_artifact_is_of,
    contents,
    expected,
    fit,
    name,
    outputs,
    saver,
    targets,
)
from tests.helpers.modules import ScoredClassifier
from tests.helpers.processes import run_program


class Noisy(ScoredClassifier):
    """Draws from the generators of torch, Python and NumPy in each step."""

    def training_step(self, batch):
        x, y = batch
        noise = torch.rand_like(x) + random.random() + float(np.random.rand())
        return super().training_step((x + noise, y))


@pytest.fixture
def make(folder):
    return lambda **options: saver(folder, **{"background": False, **options})


# -- When and what ---------------------------------------------------------------------------


def test_each_validation_saves_both_and_links_them(make, tmp_path, folder):
    callback = make(save_top_k=1)
    fit(ScoredClassifier([0.2, 0.9, 0.5]), callback, tmp_path, max_epochs=3)
    assert contents(folder) == expected(1, 2)
    assert targets(folder) == {
        "last": name(2),
        "last.ckpt": f"{name(2)}.ckpt",
        "best": name(1),
        "best.ckpt": f"{name(1)}.ckpt",
    }
    assert callback.artifact_path == folder / name(2)
    assert callback.best_artifact_path == folder / name(1)
    assert callback.best_model_path == str(folder / f"{name(1)}.ckpt")
    manifest = Manifest.load(folder / "best")
    assert (manifest.training.epoch, manifest.training.step) == (1, 2 * STEPS)
    assert manifest.training.metrics["val/acc1"] == pytest.approx(0.9)
    manifest.verify(folder / "best")
    assert_artifact_is_of(folder / f"{name(1)}.ckpt")
    assert_artifact_is_of(folder / f"{name(2)}.ckpt")


def test_both_formats_by_default(tmp_path, folder):
    pytest.importorskip("coremltools")
    callback = ReparameterizeOnSave(
        dirpath=str(folder), metadata=Metadata(author="Ada"), background=False
    )
    fit(ScoredClassifier(), callback, tmp_path)
    manifest = Manifest.load(folder / "last")
    assert set(manifest.formats) == {"torchscript", "coreml"}
    assert manifest.images == "given"
    assert callback.last_error is None
    assert manifest.metadata.author == "Ada"
    manifest.verify(folder / "last")


@pytest.mark.parametrize(
    ("mode", "top_k", "kept"),
    [("max", 1, {1, 4}), ("max", 2, {1, 3, 4}), ("min", 1, {2, 4}), ("max", -1, {0, 1, 2, 3, 4})],
)
def test_the_best_k_and_the_last_are_kept(make, tmp_path, folder, mode, top_k, kept):
    scores = [0.5, 0.9, 0.1, 0.8, 0.6]
    fit(ScoredClassifier(scores), make(mode=mode, save_top_k=top_k), tmp_path, max_epochs=5)
    assert contents(folder) == expected(*kept)


def test_only_the_last_is_kept_without_a_top_k(make, tmp_path, folder):
    fit(ScoredClassifier([0.5, 0.1]), make(save_top_k=0), tmp_path, max_epochs=2)
    assert contents(folder) == {"last", "last.ckpt", name(1), f"{name(1)}.ckpt"}


@pytest.mark.parametrize(
    ("scores", "mode", "best"),
    [
        ([0.5, 0.5, 0.1], "max", 0),  # of equal scores the older stays best
        ([float("nan"), 0.5, float("nan")], "max", 1),  # one that is not a number is never best
        ([float("nan"), 0.5, float("nan")], "min", 1),
    ],
)
def test_equal_scores_and_those_that_are_not_numbers(make, tmp_path, folder, scores, mode, best):
    fit(ScoredClassifier(scores), make(mode=mode), tmp_path, max_epochs=3)
    assert targets(folder)["best"] == name(best)
    logged = Manifest.load(folder / "last").training.metrics["val/acc1"]
    assert logged == (None if np.isnan(scores[-1]) else pytest.approx(scores[-1]))


def test_validations_within_an_epoch_count(make, tmp_path, folder):
    fit(ScoredClassifier([0.1, 0.2]), make(save_top_k=-1), tmp_path, val_check_interval=0.5)
    steps = {p.name for p in folder.glob("epoch*.ckpt") if not p.is_symlink()}
    assert steps == {"epoch=000-step=000002.ckpt", "epoch=000-step=000004.ckpt"}


def test_the_sanity_check_and_a_dry_run_save_nothing(make, tmp_path, folder):
    seen = []

    look = LambdaCallback(on_sanity_check_end=lambda *_: seen.extend(folder.iterdir()))
    fit(ScoredClassifier([0.5]), make(), tmp_path, num_sanity_val_steps=1, callbacks=[look])
    assert seen == []
    assert contents(folder) == expected(0)
    other = make(dirpath=str(tmp_path / "dry"))
    fit(ScoredClassifier(), other, tmp_path, fast_dev_run=True)
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize("end", [{"max_steps": 2}, {"max_steps": 6}, {"max_epochs": 2}])
def test_a_fit_that_would_end_without_a_validation_validates_at_its_end(
    make, tmp_path, folder, end
):
    trainer = fit(
        ScoredClassifier([0.5]), make(), tmp_path, check_val_every_n_epoch=3,
        **{"max_epochs": -1, **end},
    )  # fmt: skip
    steps = trainer.global_step
    assert steps == end.get("max_steps", 2 * STEPS)
    assert targets(folder)["best"] == f"epoch={(steps - 1) // STEPS:03d}-step={steps:06d}"
    assert Manifest.load(folder / "best").training.metrics["val/acc1"] == pytest.approx(0.5)
    assert trainer.check_val_every_n_epoch == 3  # as the caller has set it


@pytest.mark.parametrize(("least", "steps"), [({}, 2), ({"min_epochs": 2}, 2 * STEPS)])
def test_a_fit_that_another_callback_stops_before_a_validation_validates_at_its_end(
    make, tmp_path, folder, least, steps
):
    def stop(trainer, *_):
        trainer.should_stop = trainer.should_stop or trainer.global_step >= 2

    stops = LambdaCallback(on_train_batch_end=stop)
    module = ScoredClassifier([0.5, 0.6])
    options = {"check_val_every_n_epoch": 5, "max_epochs": 4, **least}
    trainer = fit(module, make(), tmp_path, callbacks=[stops], **options)
    assert trainer.global_step >= steps
    assert module.scores == [0.6]  # validated once
    assert Manifest.load(folder / "last").training.step == trainer.global_step


def test_a_separate_validation_saves_nothing(make, tmp_path, folder):
    trainer = fit(ScoredClassifier([0.5]), make(), tmp_path)
    before = contents(folder)
    trainer.validate(ScoredClassifier([0.9]), verbose=False)
    assert contents(folder) == before


def test_a_slash_in_a_metric_does_not_make_a_folder(make, tmp_path, folder):
    callback = make(filename="{step}-{val/acc1:.2f}")
    fit(ScoredClassifier([0.25]), callback, tmp_path)
    assert f"step={STEPS}-val_acc1=0.25.ckpt" in contents(folder)
    assert (folder / f"step={STEPS}-val_acc1=0.25" / "manifest.json").is_file()


# -- Which weights ---------------------------------------------------------------------------


class Average(WeightAveraging):
    def __init__(self):
        super().__init__(avg_fn=get_ema_avg_fn(0.5))


def test_averaged_weights_are_what_ships(make, tmp_path, folder):
    fit(ScoredClassifier([0.5]), make(), tmp_path, callbacks=[Average()])
    checkpoint = folder / f"{name(0)}.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    averaged, raw = saved["state_dict"], saved["current_model_state"]
    assert (averaged["model.3.weight"] - raw["model.3.weight"]).abs().max() > 1e-3
    assert_artifact_is_of(checkpoint)


def test_the_images_that_files_were_compared_on_stay_in_the_checkpoint(make, tmp_path, folder):
    fit(ScoredClassifier([0.5]), make(), tmp_path)
    saved = torch.load(folder / f"{name(0)}.ckpt", weights_only=True)["export_images"]
    (x, _) = next(iter(ScoredClassifier().val_dataloader()))
    want = ((x * 0.2 + 0.5) * 255).round().clamp(0, 255)
    assert saved.dtype == torch.uint8
    assert (saved.float() - want).abs().max() <= 1


@pytest.mark.parametrize("weights_only", [False, True])
def test_the_projects_own_average_ships_too(make, tmp_path, folder, weights_only):
    ema = EMA(decay=0.5, warmup=False)
    fit(ScoredClassifier([0.5]), make(save_weights_only=weights_only), tmp_path, callbacks=[ema])
    checkpoint = folder / f"{name(0)}.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    assert ("optimizer_states" in saved) != weights_only
    averaged = ema._average_model.module.state_dict()
    assert all(torch.equal(v, averaged[k]) for k, v in saved["state_dict"].items())
    assert_artifact_is_of(checkpoint)


def test_a_compiled_network_is_unwrapped(make, tmp_path, folder):
    module = ScoredClassifier([0.5])
    module.model = torch.compile(module.model, backend="eager")
    fit(module, make(), tmp_path)
    saved = torch.load(folder / f"{name(0)}.ckpt", weights_only=True)["state_dict"]
    assert any("_orig_mod" in key for key in saved)
    assert (folder / "last" / "manifest.json").is_file()


@pytest.mark.parametrize("formats", [["torchscript"], ["torchscript", "coreml"]])
def test_training_is_bit_identical_with_and_without(make, tmp_path, formats):
    def train(callback):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        module = Noisy([0.1, 0.2])
        torch.manual_seed(3)
        fit(module, callback, tmp_path, max_epochs=2, num_sanity_val_steps=1)
        draws = (torch.rand(1).item(), np.random.rand(), random.random())
        return module.state_dict(), draws, [m.training for m in module.modules()]

    if "coreml" in formats:
        pytest.importorskip("coremltools")
    with_export, without = train(make(formats=formats)), train(None)
    assert with_export[1:] == without[1:]
    assert all(torch.equal(v, without[0][k]) for k, v in with_export[0].items())


# -- Resuming --------------------------------------------------------------------------------


def test_the_ranking_survives_a_resume(make, tmp_path, folder):
    fit(ScoredClassifier([0.9, 0.1]), make(), tmp_path, max_epochs=2)
    callback = make()
    resume = str(folder / "last.ckpt")
    fit(ScoredClassifier([0.5, 0.2]), callback, tmp_path, max_epochs=4, resume=resume)
    assert contents(folder) == expected(0, 3)
    assert targets(folder)["best"] == name(0)
    assert float(callback.best_model_score) == pytest.approx(0.9)


def test_the_ranking_survives_a_move_of_the_folder(make, tmp_path, folder):
    fit(ScoredClassifier([0.9, 0.1]), make(), tmp_path, max_epochs=2)
    moved = tmp_path / "moved"
    folder.rename(moved)
    callback = make(dirpath=str(moved))
    resume = str(moved / "last.ckpt")
    fit(ScoredClassifier([0.5]), callback, tmp_path, max_epochs=3, resume=resume)
    assert contents(moved) == expected(0, 2)
    assert callback.best_model_path == str(moved / f"{name(0)}.ckpt")


def test_a_new_folder_starts_a_new_ranking(make, tmp_path, folder):
    fit(ScoredClassifier([0.9]), make(), tmp_path)
    other = make(dirpath=str(tmp_path / "other"))
    resume = str(folder / "last.ckpt")
    fit(ScoredClassifier([0.5]), other, tmp_path, max_epochs=2, resume=resume)
    assert contents(tmp_path / "other") == expected(1)
    assert contents(folder) == expected(0)


def test_a_checkpoint_that_was_deleted_does_not_count(make, tmp_path, folder):
    fit(ScoredClassifier([0.9, 0.1]), make(), tmp_path, max_epochs=2)
    (folder / f"{name(0)}.ckpt").unlink()
    resume = str(folder / "last.ckpt")
    fit(ScoredClassifier([0.5]), make(), tmp_path, max_epochs=3, resume=resume)
    assert targets(folder)["best.ckpt"] == f"{name(2)}.ckpt"
    assert targets(folder)["best"] == name(2)


def test_the_checkpoint_that_was_named_for_resuming_stays(make, tmp_path, folder):
    fit(ScoredClassifier([0.1]), make(), tmp_path)
    resume = str(folder / f"{name(0)}.ckpt")
    fit(ScoredClassifier([0.5, 0.6]), make(), tmp_path, max_epochs=3, resume=resume)
    assert contents(folder) == expected(0, 2)


def test_a_validation_at_the_same_step_replaces_its_own_files(make, tmp_path, folder):
    def options():
        return {"accumulate_grad_batches": 2, "val_check_interval": 1, "limit_train_batches": 2}

    callback = make()
    callback.listeners.append(lambda path, manifest: published.append(path.name))
    published = []
    fit(ScoredClassifier([0.1, 0.2]), callback, tmp_path, **options())
    # two batches make one step: validations at step 0 and at step 1
    assert published == ["epoch=000-step=000000", "epoch=000-step=000001"]
    before = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    with pytest.warns(UserWarning, match="checkpoints of another run"):
        fit(ScoredClassifier([0.1, 0.3]), make(), tmp_path, **options())
    assert targets(folder)["last"] == "epoch=000-step=000001"
    Manifest.load(folder / "last").verify(folder / "last")
    after = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    assert Manifest.load(folder / "last").training.metrics["val/acc1"] == pytest.approx(0.3)


# -- When things go wrong --------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch):
    """Make chosen exports fail, counted from 0."""
    real, count = exports.export_model, iter(range(1000))

    def install(bad, error=lambda: RuntimeError("no such operator")):
        def export(*args, **kwargs):
            if next(count) in bad:
                raise error()
            return real(*args, **kwargs)

        monkeypatch.setattr(exports, "export_model", export)

    return install


def test_a_failed_export_does_not_stop_training(make, tmp_path, folder, failing):
    failing({0, 1, 2})
    callback = make()
    with pytest.warns(UserWarning, match="no such operator"):
        trainer = fit(ScoredClassifier([0.1, 0.2, 0.3]), callback, tmp_path, max_epochs=3)
    assert trainer.current_epoch == 3
    assert "no such operator" in callback.last_error
    assert targets(folder) == {"last.ckpt": f"{name(2)}.ckpt", "best.ckpt": f"{name(2)}.ckpt"}
    error = json.loads((folder / f"{name(2)}.export-error.json").read_text())
    assert "RuntimeError: no such operator" in error["error"]
    assert contents(folder) == {
        "last.ckpt",
        "best.ckpt",
        f"{name(2)}.ckpt",
        f"{name(2)}.export-error.json",
    }
    assert callback.artifact_path is None


@pytest.mark.filterwarnings("ignore:Exporting")
def test_the_last_good_artifact_stays_until_there_is_a_better(make, tmp_path, folder, failing):
    failing({1, 2})
    fit(ScoredClassifier([0.1, 0.2, 0.3]), make(), tmp_path, max_epochs=3)
    assert targets(folder) == {
        "last": name(0),
        "best": name(0),
        "last.ckpt": f"{name(2)}.ckpt",
        "best.ckpt": f"{name(2)}.ckpt",
    }
    load_torchscript_artifact(folder / "best")
    # A later success moves the links, and what they held on to goes.
    resume = str(folder / "last.ckpt")
    fit(ScoredClassifier([0.4]), make(), tmp_path, max_epochs=4, resume=resume)
    assert contents(folder) == expected(3)


@pytest.mark.filterwarnings("ignore:Exporting")
def test_the_best_is_tried_again_at_the_next_validation(make, tmp_path, folder, failing):
    failing({0})
    callback = make()
    fit(ScoredClassifier([0.9, 0.1]), callback, tmp_path, max_epochs=2)
    assert contents(folder) == expected(0, 1)
    assert targets(folder)["best"] == name(0)
    assert callback.last_error is None
    assert Manifest.load(folder / "best").training.metrics["val/acc1"] == pytest.approx(0.9)
    assert_artifact_is_of(folder / f"{name(0)}.ckpt")


@pytest.mark.filterwarnings("ignore:Exporting")
def test_only_an_artifact_that_failed_its_checks_is_not_tried_again(
    make, tmp_path, folder, failing
):
    """By the export's status: the text of an error may say anything."""
    failing({0}, lambda: OSError("the server said `RejectedError: quota`"))
    fit(ScoredClassifier([0.9, 0.1]), make(), tmp_path, max_epochs=2)
    assert targets(folder)["best"] == name(0)

    def reject():
        shutil.copytree(folder / name(0), folder / f"{name(2)}.rejected")
        return RejectedError("the logits differ")

    failing({3}, reject)  # counted from the start, with the second attempt
    resume = str(folder / "last.ckpt")
    fit(ScoredClassifier([0.95, 0.2]), make(), tmp_path, max_epochs=4, resume=resume)
    assert targets(folder)["best.ckpt"] == f"{name(2)}.ckpt"
    assert not (folder / name(2)).exists()


def no_converter(model, spec, path, metadata):
    raise RuntimeError("no such operator\nat line 3")


def test_a_format_that_cannot_be_written_does_not_take_the_others_with_it(
    make, tmp_path, folder, monkeypatch
):
    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], write=no_converter))
    callback = make(formats=["torchscript", "onnx"])
    with pytest.warns(UserWarning, match="and not for onnx: RuntimeError: no such operator") as w:
        fit(ScoredClassifier([0.1]), callback, tmp_path)
    assert contents(folder) == expected(0)
    assert "no such operator" in callback.last_error
    assert not any("tries again" in str(said.message) for said in w)  # which it would not
    resume = str(folder / "last.ckpt")
    with pytest.raises(RuntimeError, match="no such operator"):
        strict = make(formats=["torchscript", "onnx"], strict=True)
        fit(ScoredClassifier([0.2]), strict, tmp_path, max_epochs=2, resume=resume)


@pytest.mark.parametrize("rejected", [True, False])
def test_records_of_older_versions_have_no_status(tmp_path, rejected):
    old = {"error": "...", "training": {"epoch": 1, "step": 8, "metrics": {"val/acc1": 0.5}}}
    (tmp_path / "a.export-error.json").write_text(json.dumps(old))
    if rejected:
        (tmp_path / "a.rejected").mkdir()
        (tmp_path / "a.rejected" / "manifest.json").write_text("{}")
    folder = CheckpointFolder(tmp_path)
    assert folder.is_rejected(tmp_path / "a.ckpt") == rejected
    assert folder.missed_metrics(tmp_path / "a.ckpt") == {"val/acc1": 0.5}


@pytest.mark.filterwarnings("ignore:Exporting", "ignore:.* holds checkpoints of another run")
def test_an_older_artifact_is_not_taken_for_the_one_that_failed(make, tmp_path, folder, failing):
    fit(ScoredClassifier([0.1]), make(), tmp_path)
    failing({0})
    fit(ScoredClassifier([0.9, 0.2]), make(), tmp_path, max_epochs=2)
    assert Manifest.load(folder / "best").training.metrics["val/acc1"] == pytest.approx(0.9)
    assert targets(folder)["best"] == name(0)


def test_strict_raises_and_keeps_the_checkpoint(make, tmp_path, folder, failing):
    failing({0})
    with pytest.raises(RuntimeError, match="no such operator"):
        fit(ScoredClassifier([0.1]), make(strict=True), tmp_path)
    assert targets(folder)["last.ckpt"] == f"{name(0)}.ckpt"


@pytest.mark.filterwarnings("ignore:Exporting")
def test_a_full_disk_in_the_export_leaves_no_half_artifact(make, tmp_path, folder, monkeypatch):
    def full(self, directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Manifest, "save", full)
    callback = make()
    fit(ScoredClassifier([0.1]), callback, tmp_path)
    assert "No space left" in callback.last_error
    assert not any(p.name.startswith(".tmp") for p in folder.iterdir())
    assert not (folder / name(0)).exists()


def test_a_full_disk_in_the_checkpoint_leaves_the_older_one(make, tmp_path, folder, monkeypatch):
    real, calls = Trainer.save_checkpoint, []

    def save(self, path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(self, path, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", save)
    callback = make()
    with pytest.raises(OSError, match="No space left"):
        fit(ScoredClassifier([0.1, 0.2]), callback, tmp_path, max_epochs=2)
    assert contents(folder) == expected(0)
    assert callback.best_model_path == callback.last_model_path == str(folder / f"{name(0)}.ckpt")
    assert_artifact_is_of(folder / f"{name(0)}.ckpt")


def test_stale_folders_go_at_the_start(make, tmp_path, folder):
    (folder / ".tmp-abc").mkdir(parents=True)
    (folder / "mine").mkdir()
    fit(ScoredClassifier([0.1]), make(), tmp_path)
    assert contents(folder) == expected(0) | {"mine"}


def test_a_missing_metric_is_named_with_those_there_are(make, tmp_path):
    with pytest.raises(ValueError, match=r"'val/f1', which .*valid names: val/acc1"):
        fit(ScoredClassifier([0.1]), make(monitor="val/f1"), tmp_path)


def test_a_module_without_what_is_needed_is_told_so_at_the_start(make, tmp_path):
    class Bare(ScoredClassifier):
        export_spec = None

    with pytest.raises(TypeError, match=r"Bare has no `export_spec`: define a property"):
        fit(Bare(), make(), tmp_path)

    class Wrong(ScoredClassifier):
        export_spec = "mobileone_s0"

    with pytest.raises(TypeError, match="must be an ExportSpec, not str"):
        fit(Wrong(), make(), tmp_path)

    module = ScoredClassifier()
    del module.model
    module.net = nn.Linear(1, 1)
    with pytest.raises(TypeError, match=r"Classifier must keep the network .* `self\.model`"):
        fit(module, make(), tmp_path)


def test_a_package_that_a_format_needs_is_named_before_training(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(optional_import, "version", {"executorch": "1.5.1", "torch": "2.13.1"}.get)
    saved = saver(folder, formats=["torchscript", "executorch"])  # naming it takes no package
    module = ScoredClassifier([0.1])
    with pytest.raises(
        ImportError, match=r"here is torch 2\.13\.1\): `pip install 'executorch>="
    ) as e:
        fit(module, saved, tmp_path)
    assert message_for_user(e.value) == str(e.value) and "\n" not in str(e.value)
    assert module.trainer.global_step == 0 and not folder.exists()


def test_names_must_differ():
    with pytest.raises(ValueError, match=r"must contain \{step\}"):
        ReparameterizeOnSave(filename="best")


# -- Telling others --------------------------------------------------------------------------


def test_listeners_hear_of_each_artifact_when_its_links_have_moved(make, tmp_path, folder):
    heard = []
    callback = make()
    callback.listeners.append(lambda p, m: heard.append((p, m.training.step, targets(folder))))
    fit(ScoredClassifier([0.1, 0.2]), callback, tmp_path, max_epochs=2)
    assert [h[:2] for h in heard] == [(folder / name(e), (e + 1) * STEPS) for e in (0, 1)]
    assert [h[2]["last"] for h in heard] == [name(0), name(1)]


def test_a_listener_that_fails_does_not_stop_training(make, tmp_path, folder):
    callback = make()
    callback.listeners.append(lambda path, manifest: 1 / 0)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        fit(ScoredClassifier([0.1]), callback, tmp_path)
    assert contents(folder) == expected(0)


def test_lightning_finds_last_and_best(make, tmp_path):
    trainer = fit(ScoredClassifier([0.9, 0.1]), make(), tmp_path, max_epochs=2)
    module = ScoredClassifier([0.3, 0.3])
    trainer.validate(module, ckpt_path="best", verbose=False, weights_only=True)
    assert trainer.ckpt_path.endswith(f"{name(0)}.ckpt")
    trainer.validate(module, ckpt_path="last", verbose=False, weights_only=True)
    assert Path(trainer.ckpt_path).resolve().name == f"{name(1)}.ckpt"


# -- Several processes -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("outcome", ["works", "fails"])
def test_two_processes_agree(tmp_path, folder, outcome):
    run_program("artifacts_on_two_ranks.py", folder, outcome)
    lines = [(folder.parent / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert [line[0] for line in lines] == ["0", "1"]
    assert lines[0][2:] == lines[1][2:]
    assert ("no such operator" in lines[0]) == (outcome == "fails")
    assert f"{name(0)[:9]}" in lines[0]
    assert (folder / "last" / "manifest.json").is_file() == (outcome == "works")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mobileone_s1", "repvgg_a0", "fastvit_t8", "repvit_m0_9"])
def test_families_that_timm_can_fuse(make, tmp_path, folder, model):
    import timm

    pytest.importorskip("coremltools")

    class Timm(ScoredClassifier):
        def __init__(self):
            super().__init__([0.5])
            self.model = timm.create_model(model, num_classes=3)

        @property
        def export_spec(self):
            return ExportSpec(
                model, ("a", "b", "c"), (3, 64, 64), (0.5,) * 3, (0.2,) * 3, "bicubic", 1
            )

        @staticmethod
        def _loader(batches):
            x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
            return DataLoader(TensorDataset(x, y), batch_size=4)

    module = Timm()
    # a barely trained network can exceed float16, which is then rightly refused
    callback = make(formats=["torchscript", "coreml_fp32"], strict=True)
    fit(module, callback, tmp_path)
    artifact, manifest = load_torchscript_artifact(folder / "last")
    assert manifest.formats["torchscript"]["parity"]["max_relative_error"] < 1e-3
    before = sum(p.numel() for p in module.model.parameters())
    assert manifest.parameters < before
    x = torch.randn(2, 3, 64, 64)
    want = outputs(module.model, x)
    assert (outputs(artifact, x) - want).abs().max() < 1e-3 * want.abs().max()
