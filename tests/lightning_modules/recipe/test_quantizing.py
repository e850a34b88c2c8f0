"""Training against the integer network: from a checkpoint, and back to one, in every way."""

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from lightning.pytorch import Callback

from callbacks.artifacts.callback import ReparameterizeOnSave
from callbacks.curriculum import Curriculum
from callbacks.ema import EMA
from lightning_modules.cli.main import main
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.recipe.classifier import ImageClassifier
from lightning_modules.run.folder import RunFolder
from mobileone.export import checkpoint, load_runner
from mobileone.export.checkpoint import export_checkpoint, load_model, read_checkpoint
from mobileone.export.preprocess import denormalize
from mobileone.quantization import SCHEMES, scheme_of
from tests.helpers.bitwise import differing
from tests.helpers.command import FIT, error_of
from tests.helpers.processes import run_program
from tests.helpers.trainer import SaveEachEpoch, make_trainer

NAME = "mobileone_mu0"
pytestmark = pytest.mark.filterwarnings("ignore:Found .* module\\(s\\) in eval mode at the start")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Float weights whose BatchNorm statistics are those of some images."""
    torch.manual_seed(5)
    network = timm.create_model(NAME, num_classes=2)
    with torch.no_grad():
        for _ in range(40):
            network(torch.randn(8, 3, 32, 32))
    path = tmp_path_factory.mktemp("start") / "float.pth"
    torch.save(network.state_dict(), path)
    return str(path)


def module(start, **options):
    given = {"weights": start, "quantize": "int8", "lr": 1e-3, **options}
    return ImageClassifier(NAME, num_classes=2, **given)


def train(model, images, folder, *callbacks, epochs=1, ckpt_path=None, batch_size=5, **options):
    data = ImageDataModule(str(images), batch_size=batch_size, input_size=32, num_workers=0)
    trainer = make_trainer(folder, EMA(0.9), *callbacks, max_epochs=epochs, **options)
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, r"`quantize` \(='int3'\) must be one of int8, int4, palette4"),
        ({"quantize_kwargs": {"statistics": "no"}}, r"`statistics` \(='no'\)"),
        ({"quantize_kwargs": {"kapa": 1}}, r"`quantize_kwargs` \(=\{'kapa': 1\}\).*kappa"),
    ],
)
def test_wrong_options_are_named(start, options, message):
    with pytest.raises(ValueError, match=message):
        module(start, **options)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no block with branches to fold"):
        ImageClassifier("test_vit", num_classes=2, quantize="int8")


def test_random_weights_are_refused_before_training(pets, tmp_path):
    with pytest.raises(ValueError, match=r"starts from a trained network.*--model.weights"):
        train(module(None), pets, tmp_path)


def test_a_float_checkpoint_is_not_resumed_as_integers(start, pets, tmp_path):
    trainer = train(module(start, quantize=None), pets, tmp_path)
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    with pytest.raises(ValueError, match=r"trained with `quantize` = None.*--model.weights"):
        train(module(None), pets, tmp_path, epochs=2, ckpt_path=tmp_path / "float.ckpt")


def test_training_begins_calibrated_at_the_float_weights(start, pets, tmp_path, caplog):
    model = module(start, lr=1e-12)
    images = torch.randn(4, 3, 32, 32)
    assert model.model.eval()(images).isnan().all()  # no step is known yet
    with caplog.at_level("INFO"):
        train(model, pets, tmp_path)
    assert "found on 10 training images" in caplog.text
    assert model.model.eval()(images).isfinite().all()
    stored, own = torch.load(start, weights_only=True), model.model.state_dict()
    assert all(torch.allclose(own[key], value, atol=1e-6) for key, value in stored.items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_checkpoint_gives_the_same_integers(start, pets, tmp_path, scheme):
    """What Lightning loads, and what the export builds, by the hyper-parameters alone."""
    kwargs = {"kappa": 2.0, "scales": "running"}
    model = module(start, quantize=scheme, quantize_kwargs=kwargs)
    train(model, pets, tmp_path).save_checkpoint(tmp_path / "end.ckpt")
    images = torch.randn(2, 3, 32, 32)
    expected = model.eval()(images)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    path = Path(tmp_path / "end.ckpt")
    built, _ = load_model(read_checkpoint(path), path)
    assert scheme_of(built) == scheme
    assert torch.equal(loaded.eval()(images), expected)
    assert torch.equal(built.eval()(images), expected)


@pytest.mark.parametrize("scales", ["learned", "running"])
def test_resumes_bit_for_bit(start, pets, tmp_path, scales):
    """With a teacher, the float network itself, averaged weights and a curriculum."""
    teacher = {"teacher": NAME, "teacher_weights": start, "distill_weight": 0.5}
    options = {"quantize_kwargs": {"scales": scales}, **teacher}

    def run(folder, weights, **kwargs):
        callbacks = Curriculum([(0, 24, 1.0), (150, 32, 1.0)]), SaveEachEpoch()
        return train(module(weights, **options), pets, folder, *callbacks, epochs=2, **kwargs)

    (tmp_path / "again").mkdir()
    run(tmp_path, start)
    run(tmp_path / "again", None, ckpt_path=tmp_path / "0.ckpt")
    whole, resumed = (
        torch.load(folder / "1.ckpt", weights_only=True)
        for folder in (tmp_path, tmp_path / "again")
    )
    assert not differing(resumed, whole)
    earlier = torch.load(tmp_path / "0.ckpt", weights_only=True)
    assert differing(earlier, whole)
    steps = [key for key in whole["current_model_state"] if key.endswith("input_quantizer.step")]
    moved = [
        not torch.equal(whole["current_model_state"][k], earlier["current_model_state"][k])
        for k in steps
    ]
    assert sum(moved) > len(moved) // 2  # all but the images' stay in motion


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_processes_train_one_network(start, make_folder, tmp_path, scheme):
    """The same bits on both, from one calibration of both shares of the images."""
    root = make_folder({"train": {"a": 12, "b": 12}, "val": {"a": 3, "b": 2}})
    run_program("quantize_on_two_ranks.py", start, root, tmp_path, scheme)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    for part in ("calibrated", "weights"):
        assert all(torch.equal(v, second[part][k]) for k, v in first[part].items()), part
    steps = [key for key in first["own"] if key.endswith("input_quantizer.step")][1:]
    for key in steps:
        widest = torch.maximum(first["own"][key], second["own"][key])
        assert first["calibrated"][key] > 0.99 * widest  # 1 %: zero moves to a whole code
    assert any(not torch.equal(first["own"][key], second["own"][key]) for key in steps)
    assert any(not torch.equal(first["weights"][k], first["calibrated"][k]) for k in steps)


class Validated(Callback):
    """The logits of the last validation."""

    def on_validation_epoch_start(self, trainer, pl_module):
        self.logits = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logits.append(outputs)


def test_what_is_validated_is_what_ships_in_integers(start, make_folder, tmp_path):
    """Onnxruntime's integer kernels against the averaged weights' validation, image by image."""
    root = make_folder({"train": {"a": 6, "b": 6}, "val": {"a": 12, "b": 12}})
    seen = Validated()
    saver = ReparameterizeOnSave(
        dirpath=str(tmp_path / "files"), formats=["onnx_int8"], background=False, strict=True
    )
    trainer = train(module(start, lr=0.01), root, tmp_path, seen, saver)
    artifact = saver.artifact_path
    assert "QLinearConv" in str(session_operations(artifact / "model.int8.onnx"))
    runner = load_runner(artifact, "onnx_int8")
    spec = trainer.lightning_module.export_spec
    images = torch.cat([batch[0] for batch in trainer.datamodule.val_dataloader()])
    found = runner.run(denormalize(images, spec))
    expected = torch.cat(seen.logits)
    assert found.shape == expected.shape == (24, 2)
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.95
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def session_operations(path):
    """What onnxruntime makes of a file, by name."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".fused.onnx"))
    options.log_severity_level = 3  # it warns that such a file is this machine's own
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}


@pytest.mark.parametrize(
    ("quantize", "formats", "message"),
    [
        ("int8", ["torchscript"], r"\['torchscript'\] hold floats, and the network is quantized"),
        (None, ["onnx_int8"], r"\['onnx_int8'\] hold integers.*--model.quantize int8"),
    ],
)
def test_a_format_that_cannot_hold_it_is_refused_first(
    start, pets, tmp_path, quantize, formats, message
):
    saver = ReparameterizeOnSave(dirpath=str(tmp_path / "files"), formats=formats)
    with pytest.raises(ValueError, match=message):
        train(module(start, quantize=quantize), pets, tmp_path, saver)
    assert not (tmp_path / "files").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--checkpoint.formats", "[torchscript]"], "hold floats, and the network is quantized"),
        (["--model.weights", "null"], "starts from a trained network"),
        (
            [
                *("--trainer.sync_batchnorm", "true"),
                *("--model.quantize_kwargs", '{"statistics": "exact"}'),
            ],
            "--trainer.sync_batchnorm asks for those of all",
        ),
    ],
)
def test_the_command_refuses_before_it_makes_anything(
    start, pets, tmp_path, monkeypatch, capsys, more, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RunFolder, "create", lambda *_: pytest.fail("it made a run folder"))
    model = ["--model.model", NAME, "--model.weights", start, "--data.root", str(pets)]
    options = ["--model.quantize", "int8", "--checkpoint.formats", "[onnx_int8]", *more]
    assert message in error_of(capsys, *FIT, "--data.dataset", "folder", *model, *options)


def test_the_command_trains_on_from_a_run(start, pets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    configs = ["--config", "quickstart", "--config", "quantize"]
    images = ["--data.root", str(pets), "--data.dataset", "folder", "--data.input_size", "32"]
    small = ["--data.batch_size", "5", "--data.num_workers", "0", "--report.samples", "0"]
    short = ["--trainer.max_epochs", "1", "--checkpoint.formats", "[onnx_int8]"]
    model = ["--model.model", NAME, "--model.weights", start, "--wandb.mode", "disabled"]
    main(["fit", *configs, *images, *small, *short, *model])
    best = tmp_path / "runs/quantize/latest/checkpoints/best"
    manifest = json.loads((best / "manifest.json").read_text())
    assert list(manifest["formats"]) == ["onnx_int8"]
    main(["test", "--ckpt_path", f"{best}.ckpt", *images, *small])
    assert "test/acc1" in capsys.readouterr().out
    # `export` takes the formats that fit the network
    chosen = []
    monkeypatch.setattr(checkpoint, "export_model", lambda *args, **_: chosen.append(args[3]))
    export_checkpoint(f"{best}.ckpt", "shipped")
    export_checkpoint(f"{best}.ckpt", "shipped", ["coreml_int8"])
    assert chosen == [("onnx_int8", "coreml_int8"), ("coreml_int8",)]
