"""The command line, called in this process."""

import pytest

from lightning_modules.cli.main import main

__all__ = ["FIT", "error_of"]

# a training of seconds on the digits; later options replace these
FIT = (
    "fit --model.model test_byobnet --data.dataset digits --data.batch_size 8 "
    "--data.input_size 32 --data.num_workers 0 --checkpoint.formats [torchscript] "
    "--checkpoint.background false --trainer.limit_train_batches 4 --trainer.limit_val_batches 1 "
    "--trainer.accelerator cpu --trainer.enable_progress_bar false --model.lr 0.01 "
    "--trainer.max_epochs 2 --wandb.mode disabled --report.samples 0"
).split()


def error_of(capsys, *words, status=2):
    """What the command prints to stderr when it ends with an exit status other than 0."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == status
    return capsys.readouterr().err
