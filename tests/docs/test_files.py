"""docs/files.md names what a run leaves: every file, and every key in it."""

import fnmatch
import json
import re

import pytest
import torch

from tests.helpers.paths import REPOSITORY


def rows(heading, part=0):
    """Names in the first column of a table, and all names in a row, by its first one."""
    text = (REPOSITORY / "docs/files.md").read_text()
    section = re.split(r"^## ", text.partition(f"## {heading}\n")[2], flags=re.M)[0]
    table = re.findall(r"(?:^\|.*\n)+", section, re.M)[part]
    lines = table.splitlines()[2:]
    return {name: line for line in lines for name in re.findall(r"`([^`]+)`", line.split("|")[1])}


def test_every_file_of_a_run_is_named(tiny_run):
    patterns = [name.replace("…", "*") for name in rows("A run folder")]
    for file in tiny_run.rglob("*"):
        path = file.relative_to(tiny_run).as_posix()
        parents = [
            path,
            *(f"{parent.as_posix()}/" for parent in file.relative_to(tiny_run).parents),
        ]
        if file.is_file():
            assert any(fnmatch.fnmatch(p, pattern) for p in parents for pattern in patterns), path


def test_the_record_of_a_run_has_the_named_keys(tiny_run):
    record = json.loads((tiny_run / "run.json").read_text())
    assert all(f"`{key}`" in rows("A run folder")["run.json"] for key in record)


@pytest.mark.parametrize("pattern", ["checkpoints/last.ckpt", "snapshots/*.ckpt"])
def test_a_checkpoint_has_exactly_the_named_keys(tiny_run, pattern):
    checkpoint = torch.load(next(tiny_run.glob(pattern)), weights_only=True)
    documented = rows("A checkpoint")
    assert set(checkpoint) == set(documented)
    for key in ("averaging_state", "export_spec", "ImageDataModule"):
        assert all(f"`{inner}`" in documented[key] for inner in checkpoint[key])
    assert all(f"`{k}`" in documented["lr_schedulers"] for k in checkpoint["lr_schedulers"][0])


def test_a_manifest_has_exactly_the_named_keys(tiny_run):
    manifest = json.loads((tiny_run / "checkpoints/last/manifest.json").read_text())
    documented = rows("manifest.json")
    assert set(manifest) == set(documented)
    spec = rows("A checkpoint")["export_spec"]
    assert all(f"`{key}`" in spec for key in manifest["spec"])
    for key in ("training", "metadata"):
        assert all(f"`{inner}`" in documented[key] for inner in manifest[key])
    entries = rows("manifest.json", part=1)
    for entry in manifest["formats"].values():
        assert set(entry) <= set(entries)
        for key in ("input", "output", "parity"):
            assert all(f"`{inner}`" in entries[key] for inner in entry[key]), entry[key]
