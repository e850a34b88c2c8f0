"""Writing beside and renaming."""

import pytest

from mobileone.io.atomic import atomic_write, replace_text


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "folder" / "result.json"
    replace_text(path, "old")
    with atomic_write(path) as beside:
        assert beside.parent == path.parent
        assert beside.suffix == ".json"  # libraries choose a format by it
        assert beside.name.startswith(".")
        beside.write_text("ne")
        assert path.read_text() == "old"
        beside.write_text("new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    replace_text(path, "ä")
    with pytest.raises(OSError, match="full"), atomic_write(path) as beside:
        beside.write_text("half")
        raise OSError("disk full")
    assert path.read_text(encoding="utf-8") == "ä"
    assert list(tmp_path.iterdir()) == [path]
