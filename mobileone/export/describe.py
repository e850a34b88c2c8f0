"""An artifact in words: what the manifest says, and whether the files agree with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobileone.export.formats import FORMATS
from mobileone.export.manifest import Manifest
from mobileone.export.structure import count_kinds

__all__ = ["describe_artifact"]

_NAMES_SHOWN = 8


def describe_artifact(path: str | Path) -> str:
    """Describe an artifact folder; operations are counted in the files themselves.

    Args:
        path: the artifact folder (the one with manifest.json).

    Raises:
        FileNotFoundError: it is not an artifact folder.
        ValueError: the manifest cannot be read.
        ImportError: a file needs a package that is not installed.
    """
    path = Path(path)
    manifest = Manifest.load(path)
    lines = [str(path), *_header(manifest)]
    try:
        manifest.verify(path)
        lines.append(_row("files", "as they were written (sizes and SHA-256)"))
    except ValueError as error:
        return "\n".join([*lines, _row("files", f"NOT AS WRITTEN: {error}")])
    for name, entry in manifest.formats.items():
        lines += ["", f"{name}: {entry['path']}", *_format(path, name, entry)]
    return "\n".join(lines)


def _header(manifest: Manifest) -> list[str]:
    spec, training, metadata = manifest.spec, manifest.training, manifest.metadata
    shown = ", ".join(repr(name) for name in spec.class_names[:_NAMES_SHOWN])
    more = ", ..." if spec.num_classes > _NAMES_SHOWN else ""
    metrics = ", ".join(f"{k} {v:.4g}" for k, v in training.metrics.items() if v is not None)
    rows = {
        "model": f"{spec.model_name}, {manifest.parameters:,} parameters",
        "classes": f"{spec.num_classes}: {shown}{more}",
        "input": f"{'x'.join(map(str, spec.input_size))} (CHW), {manifest.channel_order}, "
        f"mean {spec.mean}, std {spec.std}",
        "resize": f"{spec.interpolation}, crop_pct {spec.crop_pct}, {spec.crop_mode}",
        "training": f"epoch {training.epoch}, step {training.step}, {training.checkpoint}",
        "metrics": metrics or "none",
        "metadata": f"author {metadata.author}, license {metadata.license}, version "
        f"{metadata.version}: {metadata.description}",
        "written": f"{manifest.created} by "
        + ", ".join(f"{k} {v}" for k, v in manifest.versions.items()),
        "compared on": f"{manifest.images} images",
    }
    if manifest.problems:
        rows["REJECTED"] = "; ".join(manifest.problems)
    return [_row(name, text) for name, text in rows.items()]


def _format(path: Path, name: str, entry: Mapping[str, Any]) -> list[str]:
    counted = FORMATS[name].operations(path / entry["path"]) if name in FORMATS else {}
    kinds = ", ".join(f"{count} {kind}" for kind, count in count_kinds(counted).items())
    rows = {
        "size": f"{entry['bytes']:,} bytes",
        "input": _words(entry["input"]),
        "output": _words(entry["output"]),
        "operations": ", ".join(f"{count} {kind}" for kind, count in counted.items()),
        "of these": kinds,
    }
    rows |= {k.replace("_", " "): _words(v) for k, v in entry.items() if k.endswith("parity")}
    return [_row(key, text) for key, text in rows.items()]


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()
    )


def _row(name: str, text: str) -> str:
    return f"  {name:<15}{text}"
