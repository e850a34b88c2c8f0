"""Every snippet of docs/extending.md runs, in the order of the page, in a folder of its own."""

import re
import runpy
import shlex
import shutil
import sys

import pytest

from lightning_modules.cli.main import main
from mobileone.bench.runtimes import RUNTIMES
from mobileone.export import FORMATS
from tests.helpers.images import write_images
from tests.helpers.paths import REPOSITORY
from tests.helpers.variants import slow_where

# what makes a snippet small; later words win
TINY = {
    "fit": "--model.lr 0.001 --trainer.max_epochs 1 --wandb.mode disabled "
    "--checkpoint.formats [torchscript] --checkpoint.background false",
    "benchmark": "--runs 2 --image_size 32",
    "export": "",
}
TINY_MODEL = "--model.model mobileone_mu0"
TINY_DATA = "--data.input_size 32 --data.batch_size 4 --data.num_workers 0"


def sections():
    """The code blocks, (language, text), of each heading."""
    page = (REPOSITORY / "docs/extending.md").read_text()
    return {
        part.partition("\n")[0]: re.findall(r"^```(\w+)\n(.*?)^```$", part, re.S | re.M)
        for part in re.split(r"^## ", page, flags=re.M)[1:]
    }


SECTIONS = sections()


@pytest.fixture
def folder(tmp_path, tiny_run, monkeypatch):
    """A user's folder outside of the repository: images/{train,val}/{cat,dog}, last.ckpt."""
    split = {"cat": 4, "dog": 4}
    write_images(tmp_path / "images", {"train": split, "val": split})
    shutil.copy(tiny_run / "checkpoints/last.ckpt", tmp_path)
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


# a file of one's own each; the other headings are options, which have tests of their own
DEFAULT = ("A dataset", "A LightningModule", "A network", "A format", "Python")


def test_the_default_headings_are_on_the_page():
    assert set(DEFAULT) < set(SECTIONS)


@pytest.mark.filterwarnings("ignore")  # of trainings as small as these
@pytest.mark.parametrize("heading", slow_where(lambda name: name not in DEFAULT, SECTIONS))
def test_the_snippets_run(heading, folder):
    for language, text in SECTIONS[heading]:
        named = re.match(r"# (\w+\.py)\n", text)
        if named:
            (folder / named[1]).write_text(text)
        elif language == "python":
            (folder / "script.py").write_text(text)
            runpy.run_path("script.py")
        else:
            run_command(shlex.split(text.replace("\\\n", " ")))


def run_command(words):
    if words[0] == "wandb":  # its server hands out the words; the file is tested with the recipes
        assert (REPOSITORY / words[-1]).is_file()
        return
    command = words[1]
    tiny = [TINY[command]]
    if command == "fit":
        tiny += [TINY_MODEL] * ("--model.model" not in words) + [TINY_DATA] * (
            "--data" not in words
        )
    main([*words[1:], *" ".join(tiny).split()])
