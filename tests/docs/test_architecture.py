"""The tree of docs/architecture.md is the tree that is there."""

import re

from tests.helpers.paths import REPOSITORY as ROOT

PRODUCT = ["mobileone", "callbacks", "lightning_modules", "configs"]


def documented() -> set[str]:
    """The paths that the tree names; four spaces are a level."""
    text = (ROOT / "docs/architecture.md").read_text()
    block = re.search(r"## The tree\n\n```\n(.*?)```", text, re.S).group(1)
    found, above = set(), []
    for line in filter(None, block.splitlines()):
        spaces, name = re.match(r"( *)(\S+)", line).groups()
        above = [*above[: len(spaces) // 4], name.rstrip("/")]
        found.add("/".join(above) + "/" * name.endswith("/"))
    return found


def test_every_path_of_the_tree_exists():
    for path in documented():
        there = ROOT / path
        assert there.is_dir() if path.endswith("/") else there.is_file(), path


def test_every_folder_of_the_product_is_in_the_tree():
    folders = {
        f"{file.parent.relative_to(ROOT)}/"
        for room in PRODUCT
        for pattern in ("*.py", "*.yaml")
        for file in (ROOT / room).rglob(pattern)
    }
    assert folders - documented() == set()
