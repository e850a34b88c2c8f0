"""Links and paths in the documents lead to something."""

import re

import pytest

from tests.helpers.paths import REPOSITORY as ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "mobileone|callbacks|lightning_modules|configs|docs|tests"
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def anchors(document):
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@each_document
def test_every_named_path_exists(document):
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", document.read_text()):
        assert (ROOT / path).exists(), path


@each_document
def test_every_link_leads_somewhere(document):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", document.read_text()):
        file = document.parent / target if target else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"
