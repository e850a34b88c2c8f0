import os
import stat
import subprocess
import sys

import pytest

from mobileone.io import atomic as publish
from tests.helpers.processes import start_python

needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="needs locks on folders")

HOLD = """
import sys, pathlib
from mobileone.io.atomic import staging
with staging(pathlib.Path(sys.argv[1])) as folder:
    print(folder.name, flush=True)
    sys.stdin.read()
"""


def folder_with(path, text):
    path.mkdir(parents=True)
    (path / "file").write_text(text)
    return path


def test_a_failure_while_staging_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), publish.staging(tmp_path) as folder:
        folder_with(folder / "x", "half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@needs_locks
def test_what_a_killed_process_has_left_is_removed_and_what_is_in_use_is_not(tmp_path):
    folder_with(publish._hidden(tmp_path), "left")
    with publish.staging(tmp_path) as used:
        folder_with(used / "x", "new")
        assert list(tmp_path.iterdir()) == [used]
        with publish.staging(tmp_path) as other:
            assert {*tmp_path.iterdir()} == {used, other}
        publish.clean_stale(tmp_path)
        assert (used / "x" / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == []


@needs_locks
def test_what_another_process_holds_stays_until_it_is_killed(tmp_path):
    pipe = subprocess.PIPE
    with start_python("-c", HOLD, tmp_path, stdin=pipe, stdout=pipe) as process:
        try:
            held = tmp_path / process.stdout.readline().strip()
            with publish.staging(tmp_path) as used:
                publish.clean_stale(tmp_path)
                assert {*tmp_path.iterdir()} == {held, used}
        finally:
            process.kill()
    with publish.staging(tmp_path) as used:
        assert [*tmp_path.iterdir()] == [used]


@needs_locks
def test_staging_leaves_what_another_machine_may_have_in_use(tmp_path, monkeypatch):
    def on(machine):
        monkeypatch.setattr(publish.platform, "node", lambda: machine)

    on("rack/a 1-b")
    other = folder_with(publish._hidden(tmp_path), "in use there")
    replaced = folder_with(publish._hidden(tmp_path, f"{publish._REPLACED}final"), "old")
    for machine in ("rack/a 1", "b", "rack/a 1-b-c", ""):
        on(machine)
        with publish.staging(tmp_path) as used:
            assert {*tmp_path.iterdir()} == {other, replaced, used}
    on("rack/a 1-b")
    with publish.staging(tmp_path) as used:
        assert {*tmp_path.iterdir()} == {tmp_path / "final", used}


def test_a_machine_without_a_name_does_not_take_another_one_s_folder_for_its_own(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(publish.platform, "node", lambda: "")
    left = folder_with(publish._hidden(tmp_path), "in use somewhere")
    with publish.staging(tmp_path) as used:
        assert {*tmp_path.iterdir()} == {left, used}


@needs_locks
def test_a_folder_that_is_made_again_while_it_is_cleaned_stays(tmp_path, monkeypatch):
    """Another cleaner removes it, and its owner makes it again, before this one has the lock."""
    folder, real = publish._hidden(tmp_path), publish._locked
    folder.mkdir()

    def late(descriptor):
        folder.rmdir()
        folder_with(folder, "new")
        return real(descriptor)

    monkeypatch.setattr(publish, "_locked", late)
    publish.clean_stale(tmp_path)
    assert (folder / "file").read_text() == "new"


@needs_locks
def test_cleaning_does_not_make_again_what_another_one_has_removed(tmp_path, monkeypatch):
    folder, real = publish._hidden(tmp_path), publish.os.open
    folder.mkdir()

    def late(path, flags):
        folder.rmdir()
        return real(path, flags)

    made = []
    monkeypatch.setattr(publish.os, "open", late)
    monkeypatch.setattr(type(folder), "mkdir", lambda self, **options: made.append(self))
    publish.clean_stale(tmp_path)
    assert made == []
    assert list(tmp_path.iterdir()) == []


def test_without_locks_nothing_is_removed_that_may_be_in_use(tmp_path, monkeypatch):
    """As on Windows; a folder that a killed process was replacing is restored."""
    monkeypatch.setattr(publish, "fcntl", None)
    used = folder_with(publish._hidden(tmp_path), "in use")
    aside = publish._hidden(tmp_path, f"{publish._REPLACED}final")
    folder_with(aside, "old")
    fresh = publish._hidden(tmp_path)
    fresh.touch()
    with publish.staging(tmp_path) as other:
        assert {*tmp_path.iterdir()} == {used, aside, fresh, other}
    publish.clean_stale(tmp_path)
    assert {*tmp_path.iterdir()} == {used, tmp_path / "final", fresh}


def test_a_folder_that_is_cleaned_away_before_it_is_held_is_made_again(tmp_path, monkeypatch):
    """By another process, which holds it at that moment."""
    real, calls = publish.directory_lock, []

    def late(folder, patience=0.0):
        calls.append(folder)
        if len(calls) == 1:
            folder.rmdir()
            raise FileNotFoundError(folder)
        return real(folder, patience)

    monkeypatch.setattr(publish, "directory_lock", late)
    with publish.staging(tmp_path) as folder:
        assert folder.is_dir()
        monkeypatch.undo()
        publish.clean_stale(tmp_path)
        assert folder.is_dir()
    assert len(calls) == 2


@pytest.mark.parametrize("can_swap", [True, False])
def test_a_folder_replaces_an_older_one(tmp_path, monkeypatch, can_swap):
    if not can_swap:
        monkeypatch.setattr(publish, "_swap", lambda first, second: False)
    final = folder_with(tmp_path / "final", "old")
    publish.publish_folder(folder_with(tmp_path / ".tmp-1", "new"), final)
    assert (final / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_the_two_names_are_swapped_in_one_call_here(tmp_path):
    first, second = folder_with(tmp_path / "1", "one"), folder_with(tmp_path / "2", "two")
    if not publish._swap(first, second):
        pytest.skip("no atomic swap on this system")
    assert (first / "file").read_text() == "two"
    assert (second / "file").read_text() == "one"


@needs_locks
def test_a_kill_between_the_two_renames_is_mended(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "_swap", lambda first, second: False)
    final = folder_with(tmp_path / "final", "old")
    staged = folder_with(tmp_path / ".tmp-1", "new")
    rename = type(staged).rename

    def killed(self, target):
        if self == staged:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(staged), "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        publish.publish_folder(staged, final)
    monkeypatch.undo()
    assert not final.exists()
    publish.clean_stale(tmp_path)
    assert (final / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_private_files_become_readable(tmp_path):
    staged = folder_with(tmp_path / ".tmp-1" / "x", "new")
    (staged / "file").chmod(0o600)
    (staged / "inner").mkdir(mode=0o700)
    publish.publish_folder(staged, tmp_path / "final")
    mask = (tmp_path / ".tmp-1").stat().st_mode & 0o777
    assert stat.S_IMODE((tmp_path / "final" / "file").stat().st_mode) == mask & 0o666
    assert stat.S_IMODE((tmp_path / "final" / "inner").stat().st_mode) == mask


def test_a_link_is_relative_and_never_missing(tmp_path, monkeypatch):
    link, first, second = tmp_path / "last", tmp_path / "1", tmp_path / "2"
    folder_with(first, "one")
    folder_with(second, "two")
    publish.point_link(link, first)
    moments = []
    replace = type(link).replace

    def watched(self, target):
        moments.append((link / "file").read_text())
        replace(self, target)
        moments.append((link / "file").read_text())

    monkeypatch.setattr(type(link), "replace", watched)
    publish.point_link(link, second)
    assert moments == ["one", "two"]
    assert str(link.readlink()) == "2"
    publish.point_link(link, None)
    assert not os.path.lexists(link)


def test_a_link_does_not_take_the_place_of_a_real_folder(tmp_path):
    folder_with(tmp_path / "last", "mine")
    folder_with(tmp_path / "1", "one")
    with pytest.raises(FileExistsError, match="move it away"):
        publish.point_link(tmp_path / "last", tmp_path / "1")
    assert (tmp_path / "last" / "file").read_text() == "mine"


@needs_locks
def test_cleaning_removes_only_what_was_staged(tmp_path):
    folder_with(tmp_path / "keep", "kept")
    folder_with(tmp_path / ".tmp-1", "stale")
    (tmp_path / ".tmp-2").symlink_to("keep")
    publish.clean_stale(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]
    assert (tmp_path / "keep" / "file").read_text() == "kept"


def test_discarding_hides_a_folder_before_it_empties_it(tmp_path, monkeypatch):
    folder_with(tmp_path / "old", "x")
    seen = []
    remove = publish.shutil.rmtree
    monkeypatch.setattr(
        publish.shutil,
        "rmtree",
        lambda p, **k: (seen.append((tmp_path / "old").exists()), remove(p, **k)),
    )
    publish.discard(tmp_path / "old")
    publish.discard(tmp_path / "old")
    assert seen == [False]
    assert list(tmp_path.iterdir()) == []
