"""Every command of docs/extending.md runs, with docs/examples, in a folder of its own."""

import re
import runpy
import shlex
import shutil
import sys

import huggingface_hub
import pytest
import timm
import torch

from lightning_modules.cli.main import main
from mobileone.bench.runtimes import RUNTIMES
from mobileone.export import FORMATS, Manifest, normalize
from tests.helpers.images import write_images
from tests.helpers.paths import REPOSITORY
from tests.helpers.variants import slow_where

# what makes a command small; later words win
TINY = {
    "fit": "--model.lr 0.001 --trainer.max_epochs 1 --wandb.mode disabled "
    "--checkpoint.formats [torchscript] --checkpoint.background false",
    "benchmark": "--runs 2 --input_size 32",
    "export": "",
}
TINY_MODEL = "--model.model mobileone_mu0"
TINY_DATA = "--data.input_size 32 --data.batch_size 4 --data.num_workers 0"


def sections():
    """The commands, words by words, of each heading."""
    page = (REPOSITORY / "docs/extending.md").read_text().replace("\\\n", " ")
    return {
        part.partition("\n")[0]: [
            shlex.split(line)
            for block in re.findall(r"^```bash\n(.*?)^```$", part, re.S | re.M)
            for line in block.splitlines()
        ]
        for part in re.split(r"^## ", page, flags=re.M)[1:]
    }


SECTIONS = sections()


@pytest.fixture
def folder(tmp_path, tiny_run, monkeypatch):
    """A user's folder elsewhere: images/{train,val}/{cat,dog}, the examples, last.ckpt."""
    split = {"cat": 4, "dog": 4}
    write_images(tmp_path / "images", {"train": split, "val": split})
    for file in (tiny_run / "checkpoints/last.ckpt", *(REPOSITORY / "docs/examples").glob("*.py")):
        shutil.copy(file, tmp_path)
    shutil.copytree(tiny_run.parent, tmp_path / "runs/quickstart", symlinks=True)
    monkeypatch.chdir(tmp_path)
    before = {name: module for name, module in sys.modules.items() if name.startswith("my_")}
    for name in before:  # of other tests
        del sys.modules[name]
    tables = [(table, dict(table)) for table in (FORMATS, RUNTIMES)]
    yield tmp_path
    for table, rows in tables:
        table.clear()
        table.update(rows)
    for path in tmp_path.glob("my_*.py"):
        sys.modules.pop(path.stem, None)
    sys.modules.update(before)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in place of the Hugging Face hub."""

    class Stub:
        def create_repo(self, repo_id, exist_ok):
            (tmp_path / "hub" / repo_id).mkdir(parents=True)

        def upload_folder(self, *, repo_id, folder_path):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "HfApi", Stub)
    return tmp_path / "hub"


# a file of one's own each; the other headings are options, which have tests of their own
DEFAULT = ("A dataset", "A LightningModule", "A network", "A format", "Python")


def test_the_default_headings_are_on_the_page():
    assert set(DEFAULT) < set(SECTIONS)


@pytest.mark.filterwarnings("ignore")  # of trainings as small as these
@pytest.mark.parametrize("heading", slow_where(lambda name: name not in DEFAULT, SECTIONS))
def test_the_commands_run(heading, folder, hub, monkeypatch):
    for program, *words in SECTIONS[heading]:
        if program == "python":
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(words[0], run_name="__main__")
        elif program == "wandb":  # its server hands out the words; test_sweep has the file
            assert (REPOSITORY / words[-1]).is_file()
        else:
            main([*words, *small(words)])


def test_what_is_pushed_is_the_network_of_the_artifact_for_timm(folder, hub, monkeypatch):
    best = folder / "runs/quickstart/latest/checkpoints/best"
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py", str(best), "me/mine"])
    runpy.run_path("push_to_hub.py", run_name="__main__")
    pushed, manifest = hub / "me/mine", Manifest.load(best)
    manifest.verify(pushed)
    card = (pushed / "README.md").read_text()
    assert f"- val/acc1: {manifest.training.metrics['val/acc1']:.4g}\n" in card
    assert manifest.formats.keys() == {"torchscript", "onnx", "coreml_fp32"}
    for name, text in manifest.described().items():
        assert f"- {name}: {text}" in card

    network = timm.create_model(f"local-dir:{pushed}", pretrained=True).eval()
    config = network.pretrained_cfg
    assert (config["input_size"], config["crop_pct"]) == ((3, 32, 32), 1.0)
    assert tuple(config["label_names"]) == manifest.spec.class_names
    assert config["license"] == manifest.metadata.license  # not Apple's
    contents = torch.load(f"{best}.ckpt", weights_only=True)
    images = normalize(contents["export_images"], manifest.spec)
    shipped = torch.jit.load(best / "model.torchscript.pt")(images)
    with torch.no_grad():
        difference = network(images) - shipped
    assert difference.abs().max() < 1e-3 * shipped.abs().max()  # an untrained network's branches


def small(words):
    """Further words that make a command small."""
    tiny = [TINY[words[0]]]
    if words[0] == "fit":
        tiny += [TINY_MODEL] * ("--model.model" not in words)
        tiny += [TINY_DATA] * ("--data" not in words)
    return " ".join(tiny).split()


def test_a_heading_is_short():
    page = (REPOSITORY / "docs/extending.md").read_text()
    for part in re.split(r"^## ", page, flags=re.M)[1:]:
        heading, *lines = [line for line in part.splitlines() if line]
        assert len(lines) <= 10, heading
