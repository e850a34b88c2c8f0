"""Modules that are imported for what they register."""

import sys

import pytest

from mobileone.io.user_modules import import_user_modules, imported_user_modules


def test_a_module_of_the_current_folder_is_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (tmp_path / "of_my_own.py").write_text("import sys\nsys.registered_by_mine = True\n")
    import_user_modules(["of_my_own"])
    assert sys.registered_by_mine
    assert "of_my_own" in imported_user_modules()
    del sys.registered_by_mine, sys.modules["of_my_own"]


def test_a_missing_module_is_named_with_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"'nowhere\.inside'.*nowhere\.py.*{tmp_path}"):
        import_user_modules(["nowhere.inside"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import no_such_package\n", "'mine_broken', which imports 'no_such_package'"),
        ("x = 1\ndef f(:\n", r"which is not Python: .*mine_broken\.py, line 2"),
    ],
)
def test_a_module_that_cannot_be_imported_says_where(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_broken.py").write_text(text)
    with pytest.raises(ValueError, match=expected):
        import_user_modules(["mine_broken"])


@pytest.mark.parametrize("name", [".relative", "a/b.py", ""])
def test_what_is_not_a_module_name_is_refused(name):
    with pytest.raises(ValueError, match="is not a module's name"):
        import_user_modules([name])
