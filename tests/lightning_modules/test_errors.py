"""Which errors are a line for the user, and which keep their traceback."""

import pytest
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_modules.errors import message_for_user


class Broken(LightningDataModule):
    """Has a mistake of its author, which Lightning meets in `setup_data`."""

    images = None

    def train_dataloader(self):
        return range(len(self.images))

    val_dataloader = train_dataloader


def test_a_mistake_in_a_users_data_module_is_not_blamed_on_the_trainers_options(tmp_path):
    trainer = Trainer(
        accelerator="cpu", fast_dev_run=True, logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(TypeError, match="has no len") as caught:
        trainer.fit(BoringModel(), Broken())
    assert "setup_data" in {entry.name for entry in caught.traceback}
    assert message_for_user(caught.value) is None


def test_what_lightning_itself_refuses_is_a_line():
    with pytest.raises(ValueError, match="invalid strategy") as caught:
        _instantiate_trainer(strategy="dpp")
    assert message_for_user(caught.value).startswith("--trainer: You selected an invalid")


def _instantiate_trainer(**options):
    """Named as the step of Lightning's command that makes the trainer."""
    return Trainer(accelerator="cpu", logger=False, **options)
