"""Messages of the libraries that are useless to a user, each silenced by its own text."""

import logging
import os
import warnings

__all__ = ["silence_known_messages"]

_WARNINGS = (
    # Lightning calls a function of torch's that torch has deprecated
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # the number of workers is the user's decision; the data module has a default
    r"The '\w+' does not have many workers",
    # the interval is shortened where an epoch is shorter
    r"The number of training batches \(\d+\) is smaller than the logging interval",
)
_LOGS = ("💡 Tip:", "TPU available:", "Loading `train_dataloader` to estimate", "Seed set to")


def silence_known_messages() -> None:
    """Silence them, and shorten other warnings, for the rest of the process; for commands only."""
    # Lightning calls functions of jsonargparse that go in version 5, which is not admitted
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # without the place in our code, which tells a user nothing
    warnings.formatwarning = lambda message, *place, **line: f"warning: {message}\n"
    names = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch")
    for name in (*names, "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_telling)


def _is_telling(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LOGS)
