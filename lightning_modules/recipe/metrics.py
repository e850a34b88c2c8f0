"""The metrics of a classifier: loss and accuracy always, and torchmetrics' by name."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchmetrics.classification
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from mobileone.io.suggest import did_you_mean

__all__ = ["MetricNames", "basic_metrics", "collect", "mean_metric", "named_metrics"]

MetricNames = Sequence[str] | Mapping[str, Mapping[str, Any]]

_PREFIX = "Multiclass"


def mean_metric() -> MeanMetric:
    """The mean of all images' losses; NaN stays visible."""
    # "disable" keeps NaN visible. It also ignores weights (torchmetrics 1.9), so that the mean must
    # be given the loss of each image, not a batch's mean and size.
    return MeanMetric(nan_strategy="disable")


def basic_metrics(num_classes: int) -> dict[str, Metric]:
    """`loss`, `acc1` and, with more than five classes, `acc5`."""
    accuracies = {
        f"acc{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro", validate_args=False)
        for k in (1, 5)
        if k == 1 or num_classes > k
    }
    return {"loss": mean_metric(), **accuracies}


def collect(metrics: Mapping[str, Metric], prefix: str) -> MetricCollection:
    """Metrics of a stage, named `prefix` + name."""
    # these share no state, and torchmetrics would guess from the first batch whether they do
    return MetricCollection(dict(metrics), prefix=prefix, compute_groups=False)


def named_metrics(names: MetricNames, num_classes: int) -> dict[str, Metric]:
    """Classes of `torchmetrics.classification`, called by name with `num_classes`.

    Args:
        names: `MulticlassF1Score` or, shorter, `F1Score`; with further arguments as
            `{"F1Score": {"average": "weighted"}}`. torchmetrics' default average is macro.
        num_classes: number of classes.

    Returns:
        A metric for each name, called as it was given.

    Raises:
        ValueError: a name is unknown (similar and valid ones are listed), its arguments are wrong,
            or its result is not one number.
    """
    arguments = names if isinstance(names, Mapping) else {name: {} for name in names}
    return {name: _metric(name, num_classes, kwargs) for name, kwargs in arguments.items()}


def _metric(name: str, num_classes: int, kwargs: Mapping[str, Any]) -> Metric:
    module = torchmetrics.classification
    known = [n.removeprefix(_PREFIX) for n in module.__all__ if n.startswith(_PREFIX)]
    short = name.removeprefix(_PREFIX)
    if short not in known:
        raise ValueError(
            f"`metrics` names {name!r}, which torchmetrics.classification does not have"
            f"{did_you_mean(short, known)} (valid names: {', '.join(sorted(known))})"
        )
    make = getattr(module, _PREFIX + short)
    try:
        _check_scalar(make(num_classes=num_classes, **kwargs), num_classes)
        metric: Metric = make(num_classes=num_classes, **{"validate_args": False, **kwargs})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`metrics` names {name!r} with the arguments {dict(kwargs)} for {num_classes} classes:"
            f" {error}"
        ) from error
    return metric


def _check_scalar(metric: Metric, num_classes: int) -> None:
    """Raise ValueError unless a metric gives one number, which can be logged and monitored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes without images
        metric.update(torch.eye(num_classes), torch.arange(num_classes))
        value = metric.compute()
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise ValueError("its result is not one number, so that it cannot be logged")
