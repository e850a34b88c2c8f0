"""Who made a model and under which terms: written into the files that ship."""

from dataclasses import dataclass

__all__ = ["Metadata"]


@dataclass(frozen=True)
class Metadata:
    """Free text that travels with an artifact; Core ML shows it in Xcode.

    Attributes:
        author: who made the model.
        license: the terms of the weights, for example `MIT`.
        description: what the model does; None writes one from the model's name and classes.
        version: version of the model; None writes the training step.
    """

    author: str = "not stated"
    license: str = "not stated"
    description: str | None = None
    version: str | None = None
