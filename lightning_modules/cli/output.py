"""What subcommands print of their results."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.data.shards.reader import Manifest as ShardsManifest
    from lightning_modules.inference.predict import PredictionSummary
    from mobileone.export.manifest import Manifest

__all__ = [
    "print_result",
    "show_formats",
    "show_page",
    "show_paths",
    "show_predictions",
    "show_shards",
]


def print_result(result: Any, width: int = 150) -> None:
    """Print a text, or a table of rich's: a pipe has no width, and names must not be cut."""
    if isinstance(result, str):
        print(result)
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else width).print(result)


def show_predictions(summary: "PredictionSummary") -> str:
    """How many images there are and where; what could not be read goes to stderr."""
    for path, reason in summary.unreadable:
        print(f"unreadable: {path}: {reason}", file=sys.stderr)
    return f"{summary.images} images -> {summary.output}"


def show_formats(manifest: "Manifest") -> str:
    """A line for each format of an artifact, written or left out."""
    rows = manifest.described()
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def show_paths(paths: Sequence[Path]) -> str:
    """Files in a line."""
    return ", ".join(map(str, paths))


def show_page(path: Path) -> str:
    """A file and its size."""
    return f"{path} ({path.stat().st_size / 1e6:.1f} MB)"


def show_shards(manifest: "ShardsManifest") -> str:
    """A line for each split."""
    return "\n".join(
        f"{split.name}: {split.num_samples} images of {len(manifest.classes)} classes in "
        f"{len(split.filenames)} shards, {sum(split.bytes) / 1e6:.1f} MB"
        for split in manifest.splits.values()
    )
