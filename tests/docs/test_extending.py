"""Every command of docs/extending.md runs, with docs/examples, in a folder of its own."""

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
def test_the_commands_run(heading, folder):
    for program, *words in SECTIONS[heading]:
        if program == "python":
            runpy.run_path(*words)
        elif program == "wandb":  # its server hands out the words; test_sweep has the file
            assert (REPOSITORY / words[-1]).is_file()
        else:
            main([*words, *small(words)])


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
