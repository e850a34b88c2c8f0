from decimal import Decimal

import pytest
import timm
import torch

from mobileone.export import export_checkpoint, load_torchscript_artifact
from mobileone.export.checkpoint import build_network, model_weights
from mobileone.export.spec import ExportSpec
from mobileone.io.safe_pickle import UnsafeFileError
from tests.helpers.fetching import fetching
from tests.helpers.norms import randomize_bn
from tests.helpers.processes import run_python
from tests.helpers.tiny import tiny_spec

FORMATS = ["torchscript"]


@pytest.fixture(scope="module")
def model():
    return randomize_bn(timm.create_model("mobileone_s0", num_classes=3, in_chans=1)).eval()


@pytest.fixture
def contents(model):
    return {
        "epoch": 3,
        "global_step": 400,
        "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}
        | {"metric.total": torch.ones(1)},
        "hyper_parameters": {"model": "mobileone_s0", "num_classes": None, "model_kwargs": None},
        "export_spec": tiny_spec(1).to_dict(),
    }


def save(contents, path):
    torch.save(contents, path)
    return path


@pytest.mark.parametrize("compiled", [False, True])
def test_a_checkpoint_alone_is_enough(model, contents, tmp_path, compiled):
    if compiled:
        contents["state_dict"] = {
            k.replace("model.", "model._orig_mod."): v for k, v in contents["state_dict"].items()
        }
    path = save(contents, tmp_path / "x.ckpt")
    manifest = export_checkpoint(path, tmp_path / "artifact", FORMATS)
    assert (manifest.training.epoch, manifest.training.step) == (3, 400)
    assert manifest.training.checkpoint == "x.ckpt"
    images = torch.randn(2, 1, 32, 48)
    module, _ = load_torchscript_artifact(tmp_path / "artifact")
    with torch.no_grad():
        expected = model(images)
        assert (module(images) - expected).abs().max() < 1e-4 * expected.abs().max()


_READ_AND_CUT = """
import os, sys
from pathlib import Path
from mobileone.export.checkpoint import read_checkpoint
read = read_checkpoint(Path(sys.argv[1]))["state_dict"]
os.truncate(sys.argv[1], 1000)
print(sum(float(value.double().sum()) for value in read.values()))
"""


def test_a_checkpoint_that_is_cut_while_it_is_read_kills_no_process(contents, tmp_path):
    """Of a file that is mapped into memory, the next look at a tensor would: SIGBUS."""
    path = save(contents, tmp_path / "x.ckpt")
    expected = sum(float(value.double().sum()) for value in contents["state_dict"].values())
    assert float(run_python("-c", _READ_AND_CUT, path).stdout) == expected


def test_images_in_the_checkpoint_are_compared_on(contents, tmp_path):
    path = save(contents, tmp_path / "1.ckpt")
    assert export_checkpoint(path, tmp_path / "1", FORMATS).images == "synthetic"
    images = torch.randint(0, 256, (5, 1, 32, 48), dtype=torch.uint8)
    path = save({**contents, "export_images": images}, tmp_path / "2.ckpt")
    manifest = export_checkpoint(path, tmp_path / "2", FORMATS)
    assert manifest.images == "given"
    assert manifest.formats["torchscript"]["parity"]["images"] == 5


def test_arguments_of_the_model_are_used(contents, tmp_path):
    other = timm.create_model("mobileone_s0", num_classes=3, in_chans=1, global_pool="max")
    contents["state_dict"] = {f"model.{k}": v for k, v in randomize_bn(other).state_dict().items()}
    contents["hyper_parameters"]["model_kwargs"] = {"global_pool": "max"}
    path = save(contents, tmp_path / "x.ckpt")
    export_checkpoint(path, tmp_path / "artifact", FORMATS)
    images = torch.randn(2, 1, 32, 48)
    with torch.no_grad():
        expected = other.eval()(images)
        got = load_torchscript_artifact(tmp_path / "artifact")[0](images)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def broken(contents, change):
    if change == "no spec":
        del contents["export_spec"]
    elif change == "bad spec":
        contents["export_spec"]["std"] = [0.0]
    elif change == "no state":
        del contents["state_dict"]
    elif change == "no model":
        contents["state_dict"] = {"net.weight": torch.ones(1)}
    elif change == "other model":
        contents["hyper_parameters"]["model"] = "mobileone_s1"
    elif change == "unknown model":
        contents["hyper_parameters"]["model"] = "mobileone_s9"
    return contents


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no spec", "has no `export_spec`"),
        ("bad spec", r"`export_spec` of .* is not valid: `std`"),
        ("no state", "not a Lightning checkpoint"),
        ("no model", r"no weights named `model\.\*`"),
        ("other model", "do not fit 'mobileone_s1'"),
        ("unknown model", "mobileone_s9"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_said(contents, tmp_path, change, message):
    path = save(broken(contents, change), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=message):
        export_checkpoint(path, tmp_path / "artifact", FORMATS)
    assert not (tmp_path / "artifact").exists()


def test_a_damaged_a_foreign_and_a_missing_file(contents, tmp_path):
    path = save(contents, tmp_path / "x.ckpt")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="cannot be read"):
        export_checkpoint(path, tmp_path / "artifact")
    path.write_text("hello")
    with pytest.raises(ValueError, match="cannot be read"):
        export_checkpoint(path, tmp_path / "artifact")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        export_checkpoint(tmp_path / "none.ckpt", tmp_path / "artifact")


def test_a_checkpoint_fetches_nothing(contents, tmp_path):
    folder, contents["hyper_parameters"]["model_kwargs"] = fetching(tmp_path)
    export_checkpoint(save(contents, tmp_path / "x.ckpt"), tmp_path / "artifact", FORMATS)
    assert not folder.exists()


def test_an_address_is_taken_for_the_name_in_it(contents, tmp_path, monkeypatch):
    def fetch(*arguments, **options):
        raise AssertionError("the address was looked up")

    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", fetch)
    contents["hyper_parameters"]["model"] = "hf-hub:sender/mobileone_s0.apple_in1k@main"
    export_checkpoint(save(contents, tmp_path / "x.ckpt"), tmp_path / "artifact", FORMATS)


@pytest.mark.parametrize("value", ["../x", "a/b", "https://a", Decimal(1), [{"x": "file:y"}]])
def test_arguments_that_are_not_plain_are_refused(contents, value):
    spec = ExportSpec.from_dict(contents["export_spec"])
    with pytest.raises(UnsafeFileError, match="`model_kwargs` of the file has drop_rate="):
        build_network(spec, {"model": "mobileone_s0", "model_kwargs": {"drop_rate": value}})


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_code_in_a_checkpoint_does_not_run(contents, tmp_path, capsys):
    path = save({**contents, "extra": Evil()}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"names 'builtins\.print', .* run code: refused"):
        export_checkpoint(path, tmp_path / "artifact")
    assert "code ran" not in capsys.readouterr().out


def test_the_wrapper_of_a_compiled_network_is_taken_off_the_names():
    state = {"model._orig_mod.0.weight": 1, "model.1._orig_mod.bias": 2, "metric.total": 3}
    assert model_weights(state) == {"0.weight": 1, "1.bias": 2}
