"""Two trials of Optuna over the learning rate."""

import optuna
from lightning.pytorch import Trainer

from lightning_modules import ImageClassifier, ImageDataModule


def accuracy(trial):
    data = ImageDataModule("images", input_size=32, batch_size=4)
    model = ImageClassifier(
        "mobileone_mu0",
        num_classes=len(data.class_names),
        lr=trial.suggest_float("lr", 1e-3, 1e-1),
    )
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(model, data)
    return float(trainer.callback_metrics["val/acc1"])


optuna.create_study(direction="maximize").optimize(accuracy, n_trials=2)
