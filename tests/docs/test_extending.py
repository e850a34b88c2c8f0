"""Every snippet of docs/extending.md runs, in the order of the page, in a folder of its own."""

import re
import shlex
import shutil

import pytest

from tests.helpers.images import write_images
from tests.helpers.paths import REPOSITORY
from tests.helpers.processes import run_python
from tests.helpers.variants import slow_where

# what makes a snippet small; later words win
TINY = {
    "fit": "--model.lr 0.001 --trainer.max_epochs 1 --wandb.mode disabled "
    "--checkpoint.formats [torchscript]",
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
def folder(tmp_path, tiny_run):
    """A user's folder outside of the repository: images/{train,val}/{cat,dog}, last.ckpt."""
    split = {"cat": 4, "dog": 4}
    write_images(tmp_path / "images", {"train": split, "val": split})
    shutil.copy(tiny_run / "checkpoints/last.ckpt", tmp_path)
    return tmp_path


# a file of one's own each; the other headings are options, which have tests of their own
DEFAULT = ("A dataset", "A LightningModule", "A network", "A format", "Python")


def test_the_default_headings_are_on_the_page():
    assert set(DEFAULT) < set(SECTIONS)


@pytest.mark.parametrize("heading", slow_where(lambda name: name not in DEFAULT, SECTIONS))
def test_the_snippets_run(heading, folder):
    for language, text in SECTIONS[heading]:
        named = re.match(r"# (\w+\.py)\n", text)
        if named:
            (folder / named[1]).write_text(text)
        elif language == "python":
            (folder / "script.py").write_text(text)
            run_python("script.py", cwd=folder)
        else:
            run_command(shlex.split(text.replace("\\\n", " ")), folder)


def run_command(words, folder):
    if words[0] == "wandb":  # its server hands out the words; the file is tested with the recipes
        assert (REPOSITORY / words[-1]).is_file()
        return
    command = words[1]
    tiny = [TINY[command]]
    if command == "fit":
        tiny += [TINY_MODEL] * ("--model.model" not in words) + [TINY_DATA] * (
            "--data" not in words
        )
    run_python("-m", "mobileone", *words[1:], *" ".join(tiny).split(), cwd=folder)
