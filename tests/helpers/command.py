"""The command line, called in this process."""

import pytest

from lightning_modules.cli.main import main

__all__ = ["error_of"]


def error_of(capsys, *words, status=2):
    """What the command prints to stderr when it ends with an exit status other than 0."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == status
    return capsys.readouterr().err
