"""The names that packages offer: loaded when asked for, and complete."""

import importlib

import pytest

from tests.helpers.processes import run_python

PACKAGES = ["callbacks", "lightning_modules"]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_alone_loads_no_torch(package):
    code = f"import sys, {package}; assert not {{'torch', 'timm', 'lightning'}} & {{*sys.modules}}"
    run_python("-c", code)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_and_described(package):
    module = importlib.import_module(package)
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
        assert name in dir(module)
        assert f"`{name}`" in module.__doc__


@pytest.mark.parametrize("package", PACKAGES)
def test_an_unknown_name_is_an_import_error_that_names_it(package):
    with pytest.raises(ImportError, match="'NoSuchName'"):
        exec(f"from {package} import NoSuchName", {})


def test_a_room_is_still_importable_from_its_package():
    from callbacks import report
    from callbacks.report import callback

    assert report.callback is callback
