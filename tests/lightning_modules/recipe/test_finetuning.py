"""Fine-tuning: weights of every origin, a new head, layer-wise learning rates, frozen parts."""

import copy
from itertools import pairwise

import pytest
import timm
import torch
from lightning.pytorch import Callback

import mobileone
from callbacks.ema import EMA
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.recipe.classifier import ImageClassifier
from lightning_modules.recipe.optimizers import build_optimizer
from tests.helpers.apple import as_apple
from tests.helpers.norms import randomize_bn
from tests.helpers.trainer import make_trainer

NAME = "mobileone_mu0"
pytestmark = pytest.mark.filterwarnings("ignore:Found .* module\\(s\\) in eval mode at the start")


@pytest.fixture(scope="module")
def source():
    """A network of another task: seven classes."""
    torch.manual_seed(5)
    return timm.create_model(NAME, num_classes=7)


def fit(root, folder, epochs=1, callbacks=(), ckpt_path=None, **options):
    model = ImageClassifier(NAME, num_classes=2, **{"lr": 0.01, **options})
    data = ImageDataModule(str(root), batch_size=2, input_size=32, num_workers=0)
    trainer = make_trainer(folder, EMA(0.9), *callbacks, max_epochs=epochs, num_sanity_val_steps=2)
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return model, trainer


@pytest.mark.parametrize("origin", ["timm", "apple", "checkpoint"])
def test_the_body_is_the_files_and_the_head_is_new(source, origin, tmp_path, caplog):
    path = tmp_path / "weights.pth"
    state = source.state_dict()
    own = {f"model.{k}": v for k, v in state.items()} | {"val_metrics.acc1.total": torch.zeros(())}
    files = {"timm": state, "apple": as_apple(state), "checkpoint": {"state_dict": own}}
    torch.save(files[origin], path)
    with caplog.at_level("INFO"):
        model = ImageClassifier(NAME, num_classes=2, weights=str(path)).model
    loaded = model.state_dict()
    body = [key for key in state if not key.startswith("head.fc")]
    assert all(torch.equal(loaded[key], state[key]) for key in body)
    assert loaded["head.fc.weight"].shape[0] == 2
    assert "the head (head.fc.weight, head.fc.bias) is new" in caplog.text
    # with as many classes the head comes along
    same = ImageClassifier(NAME, num_classes=7, weights=str(path)).model
    assert torch.equal(same.head.fc.weight, source.head.fc.weight)


@pytest.mark.parametrize("expand", [True, False])
def test_fused_weights_are_fine_tuned_and_say_what_is_lost(source, expand, pets, tmp_path):
    fused = mobileone.reparameterize(randomize_bn(source).eval())
    torch.save(fused.state_dict(), tmp_path / "fused.pth")
    options = {"weights": str(tmp_path / "fused.pth"), "expand_fused": expand}
    with pytest.warns(UserWarning, match="the branches and BatchNorm's statistics .* are lost"):
        start = ImageClassifier(NAME, num_classes=7, **options).model.eval()
    images = torch.randn(2, 3, 32, 32)
    expected = fused(images)
    assert (start(images) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert any("conv_kxk" in key for key in start.state_dict()) == expand

    with pytest.warns(UserWarning, match="are lost"):
        # a random network's outputs are in the thousands, and training starts from just those
        model, trainer = fit(pets, tmp_path, lr=1e-10, **options)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    (tmp_path / "fused.pth").unlink()  # the checkpoint is enough
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    averaged = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(v, averaged[k]) for k, v in loaded.state_dict().items())
    assert not torch.equal(model.model.head.fc.weight, start.head.fc.weight)


def test_frozen_parts_stay_bit_for_bit(source, pets, tmp_path):
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model, _ = fit(
        pets, tmp_path, epochs=2, weights=str(tmp_path / "w.pth"), freeze=["stem", "stages.0"]
    )
    before, after = source.state_dict(), model.model.state_dict()
    frozen = [k for k in before if k.startswith(("stem.", "stages.0."))]
    assert frozen
    assert all(torch.equal(before[k], after[k]) for k in frozen)
    assert not torch.equal(
        before["stages.1.0.conv_kxk.0.bn.running_mean"],
        after["stages.1.0.conv_kxk.0.bn.running_mean"],
    )


def test_frozen_norms_stay_and_convolutions_learn(pets, tmp_path):
    source = timm.create_model(NAME, num_classes=7)
    with torch.no_grad():  # the statistics of some data: on those of a fresh layer it diverges
        for _ in range(40):
            source(torch.randn(8, 3, 32, 32))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    options = {"weights": str(tmp_path / "w.pth"), "freeze_bn": True, "lr": 1e-4}
    model, _ = fit(pets, tmp_path, epochs=2, **options)
    before, after = source.state_dict(), model.model.state_dict()
    norms = [k for k in before if ".bn." in k or "identity" in k]
    assert all(torch.equal(before[k], after[k]) for k in norms)
    key = "stages.1.0.conv_kxk.0.conv.weight"
    assert not torch.equal(before[key], after[key])


def test_learning_rate_falls_from_block_to_block():
    model = timm.create_model(NAME)
    optimizer = build_optimizer(
        model, "momentum", lr=0.1, weight_decay=1e-4, layer_decay=0.5, no_decay_norm_bias=True
    )
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rate) == len(list(model.parameters()))
    units = [unit for stage in model.stages for unit in stage]
    first = [rate[id(unit.conv_kxk[0].conv.weight)] for unit in units]
    assert rate[id(model.head.fc.weight)] == pytest.approx(0.1)
    for earlier, later in pairwise(first):
        assert earlier == pytest.approx(later / 2)
    assert rate[id(model.stem.conv_kxk[0].conv.weight)] == pytest.approx(first[0] / 2)
    assert not any("lr_scale" in group for group in optimizer.param_groups)


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def _evil(path):
    torch.save({"state_dict": Evil()}, path)


def _cut(path):
    torch.save(timm.create_model(NAME).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-3000])


def _other(path):
    torch.save(timm.create_model("mobileone_mu2").state_dict(), path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_evil, r"names .builtins.print., and loading it would run code: refused"),
        (_cut, r"w.pth cannot be read as tensors: it is damaged"),
        (_other, r"do not fit: the weights look like mobileone_mu2"),
    ],
)
def test_bad_weight_files_are_refused(tmp_path, write, message, capsys):
    write(tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        ImageClassifier(NAME, num_classes=2, weights=str(tmp_path / "w.pth"))
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("route", ["checkpoint_path", "file", "url"])
def test_timms_routes_run_no_code_either(tmp_path, route, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    _evil(tmp_path / "evil.pth")
    overlay = {"file": str(tmp_path / "evil.pth")}
    if route == "url":
        overlay = {"url": (tmp_path / "evil.pth").as_uri(), "hf_hub_id": None}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    if route == "checkpoint_path":
        options = {"checkpoint_path": str(tmp_path / "evil.pth")}
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        timm.create_model(NAME, **options)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "none.pth"}, "no weights at none.pth"),
        ({"freeze": ["stage1"]}, r"names 'stage1', .*it has stem.*stages"),
        ({"freeze": ["stem", "stages", "head"]}, "leaves no parameter to train"),
        ({"layer_decay": 1.5}, r"`layer_decay` \(=1.5\)"),
        ({"distill_weight": 2.0}, r"`distill_weight` \(=2.0\)"),
        ({"distill_temperature": 0.0}, r"`distill_temperature` \(=0.0\)"),
        ({"skip_nonfinite": -1}, r"`skip_nonfinite` \(=-1\)"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ImageClassifier(NAME, num_classes=2, **options)


class Start(Callback):
    """What a training begins with."""

    def on_train_start(self, trainer, pl_module):
        self.network = copy.deepcopy(pl_module.model)


def test_fused_weights_train_from_their_function(source, pets, tmp_path, caplog):
    """A training begins with measured statistics and the file's function; a resumed one as it was.

    That training mode then computes the same is tested with `mobileone.calibrate`.
    """
    fused = mobileone.reparameterize(source.eval())
    torch.save(fused.state_dict(), tmp_path / "fused.pth")
    options, start = {"weights": str(tmp_path / "fused.pth"), "lr": 1e-9}, Start()
    with pytest.warns(UserWarning, match="are lost"), caplog.at_level("INFO"):
        _, trainer = fit(pets, tmp_path, callbacks=[start], **options)
    assert "measured on 10 training images" in caplog.text
    norms = [m for m in start.network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all((norm.running_mean != 0).any() for norm in norms)
    images = torch.randn(2, 3, 32, 32)
    expected = fused.forward_head(fused.forward_features(images), pre_logits=True)
    features = start.network.eval().forward_features(images)
    error = start.network.forward_head(features, pre_logits=True) - expected
    assert error.abs().max() < 1e-3 * expected.abs().max()

    trainer.save_checkpoint(tmp_path / "end.ckpt")
    averaged = torch.load(tmp_path / "end.ckpt", weights_only=True)["current_model_state"]
    with pytest.warns(UserWarning) as warned:  # of the longer schedule, too
        fit(pets, tmp_path, 2, [start], str(tmp_path / "end.ckpt"), **options)
    assert any("are lost" in str(warning.message) for warning in warned)
    resumed = start.network.state_dict()
    assert all(torch.equal(resumed[k], averaged[f"model.{k}"]) for k in resumed)
