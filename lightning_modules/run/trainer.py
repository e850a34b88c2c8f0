"""Lightning's trainer, as the command line builds it."""

from typing import Any

from lightning.pytorch import Trainer

__all__ = ["ExactTrainer"]


class ExactTrainer(Trainer):
    """Lightning's `Trainer`, whose limit of 1 is one batch and of 1.0 all of them.

    The parser takes the first type of a union that fits. Lightning writes `Optional[Union[int,
    float]]`, and `typing`, which calls unions equal in any order, may answer with an
    `Optional[Union[float, int]]` that it made for whoever was imported before: 1 becomes 1.0.
    """

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        **kwargs: Any,
    ) -> None:
        """Take `lightning.pytorch.Trainer`'s arguments.

        Args:
            limit_train_batches: Training batches an epoch: a count, or a fraction with a point.
            limit_val_batches: Validation batches: a count, or a fraction with a point.
            limit_test_batches: Test batches: a count, or a fraction with a point.
            limit_predict_batches: Prediction batches: a count, or a fraction with a point.
            **kwargs: Its other arguments.

        Raises:
            MisconfigurationException: A value is out of its range, for example a fraction over 1.
        """
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            **kwargs,
        )
