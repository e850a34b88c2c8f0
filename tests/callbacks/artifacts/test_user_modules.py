"""A network and a format from modules of the user's own: fit, export worker and commands."""

import csv
import sys

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules.cli.main import main
from mobileone.export import FORMATS, ExportSpec, Manifest, load_runner, normalize, worker
from mobileone.io import user_modules
from tests.helpers.checkpoints import saver
from tests.helpers.command import error_of
from tests.helpers.paths import PROGRAMS
from tests.helpers.trainer import fit


class Module(LightningModule):
    def __init__(self, model="my_repvgg"):
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model(model, num_classes=3)
        self.export_spec = ExportSpec(
            model, ("a", "b", "c"), (3, 16, 16), (0.5,) * 3, (0.2,) * 3, "bilinear", 1
        )

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch):
        self.log("val/acc1", self.model(batch[0]).mean())

    def on_save_checkpoint(self, checkpoint):
        checkpoint["export_spec"] = self.export_spec.to_dict()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short fit with both of the user's modules: (folder of checkpoints, trained module)."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(PROGRAMS))
        patched.setattr(user_modules, "_imported", {})
        patched.delitem(sys.modules, "my_formats", raising=False)  # else it registers nothing
        user_modules.import_user_modules(["my_networks", "my_formats"])
        callback = saver(folder, formats=["torchscript", "weights"], strict=True)
        torch.manual_seed(0)
        module = Module()
        data = TensorDataset(torch.randn(16, 3, 16, 16), torch.randint(3, (16,)))
        seen = []
        with patched.context() as spy:
            real = worker.subprocess.Popen
            spy.setattr(
                worker.subprocess, "Popen", lambda c, **o: [seen.append(c), real(c, **o)][1]
            )
            loaders = DataLoader(data, 4), DataLoader(data, 8)
            fit(folder.parent, module, loaders, callback)
        yield folder, module.eval(), seen
        FORMATS.pop("weights")


def test_the_worker_imports_the_modules_and_the_format_is_published_and_compared(run):
    folder, module, commands = run
    assert [command[-2:] for command in commands] == [["my_networks", "my_formats"]]
    manifest = Manifest.load(folder / "last")
    manifest.verify(folder / "last")
    for name in ("torchscript", "weights"):
        parity = manifest.formats[name]["parity"]
        assert parity["status"] == "measured" and parity["max_relative_error"] < 1e-4
        assert parity["images"] == 16 and parity["tolerance"] == 1e-3
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = module.model(normalize(images, module.export_spec))
    found = load_runner(folder / "last", "weights").run(images)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_its_own_blocks_are_folded(run):
    folder, *_ = run
    counted = Manifest.load(folder / "last").formats["torchscript"]["operations"]
    assert counted["aten::_convolution"] == 3  # of 6 with 8 norms in training
    assert "aten::batch_norm" not in counted


def test_a_network_with_a_block_that_does_not_fold_is_rejected(run, tmp_path, monkeypatch):
    from mobileone.export import RejectedError, export_model

    _, module, _ = run
    block = type(module.model.blocks[0])
    monkeypatch.delattr(block, "fuse")
    monkeypatch.setattr(block, "reparameterize", lambda self: None, raising=False)
    with pytest.raises(RejectedError, match=r"the layer 'blocks\.0' \(MyBlock\) is not fused"):
        export_model(module.model, module.export_spec, tmp_path / "out", ["torchscript"])


def test_a_file_of_the_users_format_that_is_wrong_is_rejected(run, tmp_path, monkeypatch):
    from dataclasses import replace

    from mobileone.export import RejectedError, export_model

    def wrong(path, spec):
        read = FORMATS["torchscript"].runner
        export_model(module.model, spec, tmp_path / "other", ["torchscript"], overwrite=True)
        run = read(tmp_path / "other/model.torchscript.pt", spec)
        return lambda images: run(images) * 1.01

    _, module, _ = run
    monkeypatch.setitem(FORMATS, "weights", replace(FORMATS["weights"], runner=wrong))
    with pytest.raises(RejectedError, match=r"weights: parity: relative error 0\.01 of the logits"):
        export_model(module.model, module.export_spec, tmp_path / "out", ["weights"])


def test_no_command_imports_a_module_that_the_checkpoint_names(run, tmp_path, monkeypatch, capsys):
    """With the module in the current folder."""
    program = (PROGRAMS / "my_networks.py").read_text().replace("my_repvgg", "sent_network")
    (tmp_path / "sent_network.py").write_text(program)
    contents = torch.load(run[0] / "last.ckpt", weights_only=True)
    contents["hyper_parameters"]["model"] = contents["export_spec"]["model_name"] = "sent_network"
    torch.save(contents, tmp_path / "sent.ckpt")
    monkeypatch.chdir(tmp_path)
    refused = error_of(capsys, "export", "sent.ckpt", "none")
    assert "timm knows no model 'sent_network'" in refused and "--imports" in refused
    assert "sent_network" not in sys.modules


def test_commands_import_the_modules_by_name(run, tmp_path, monkeypatch, capsys):
    folder, module, _ = run
    images = tmp_path / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(images / f"{index}.png")
    checkpoint = folder / "last.ckpt"
    monkeypatch.chdir(PROGRAMS)
    monkeypatch.delitem(FORMATS, "weights")
    words = "--formats", "[weights]", "--imports", "[my_networks]"
    refused = error_of(capsys, "export", checkpoint, tmp_path / "none", *words)
    assert "unknown formats ['weights']" in refused and "--imports" in refused
    monkeypatch.delitem(sys.modules, "my_formats")  # else it is not run again
    imports = ("--imports", "[my_networks,my_formats]")
    for words in (
        ("export", checkpoint, tmp_path / "out", "--formats", "[weights]"),
        ("inspect", tmp_path / "out"),
        ("predict", tmp_path / "out", images, tmp_path / "out.csv"),
    ):
        main([str(word) for word in (*words, *imports)])
    assert "model.npz" in capsys.readouterr().out
    with (tmp_path / "out.csv").open() as file:
        found = [float(row["probability"]) for row in csv.DictReader(file)]
    with torch.no_grad():
        batch = normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2), module.export_spec)
        expected = module.model(batch).softmax(1).amax(1)
    assert found == pytest.approx(expected.tolist(), rel=1e-3)
