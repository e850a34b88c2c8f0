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


def test_an_error_inside_a_module_is_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lacks_a_package.py").write_text("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        import_user_modules(["lacks_a_package"])
