"""Trainers on the CPU that print nothing and write only what a test asks for."""

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint

__all__ = ["SaveEachEpoch", "fit", "make_trainer"]


class SaveEachEpoch(Callback):
    """Write 0.ckpt, 1.ckpt, ... into the trainer's folder at the end of each training epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.current_epoch}.ckpt")


def make_trainer(folder, *callbacks, **options):
    """One epoch in a folder, without a logger and a sanity check; `options` replace the defaults.

    Checkpoints are written only by a checkpoint callback that is given.
    """
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "default_root_dir": folder,
        "logger": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit(folder, module, data=None, *callbacks, ckpt_path=None, **options):
    """Train a module with `make_trainer`; returns the trainer.

    Args:
        data: A data module, or a loader, or a pair of loaders for training and validation.
        ckpt_path: The checkpoint to resume from.
    """
    trainer = make_trainer(folder, *callbacks, **options)
    loaders = data if isinstance(data, tuple) else (data,)
    weights_only = None if ckpt_path is None else True
    trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=weights_only)
    return trainer
