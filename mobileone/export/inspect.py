"""An artifact as text: what the manifest reports, and whether the files agree with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobileone.export.formats.table import FORMATS, format_of
from mobileone.export.load import check_files, check_spec, is_file_of_artifact, spec_of_file
from mobileone.export.manifest import Manifest, describe_files
from mobileone.export.spec import ExportSpec
from mobileone.export.verify.structure import count_kinds

__all__ = ["ChecksumMismatchError", "describe_artifact"]

_NAMES_SHOWN = 8
_TAKES = {"logits": "normalized images", "probabilities": "pixel values 0..255"}


class ChecksumMismatchError(ValueError):
    """The files of an artifact are not those of its manifest; the text describes it."""


def describe_artifact(path: str | Path) -> str:
    """Describe an artifact; operations are counted in the files themselves.

    Args:
        path: the artifact folder (the one with manifest.json), or a file, which is described by
            its own metadata.

    Raises:
        FileNotFoundError: it is not an artifact folder.
        ChecksumMismatchError: files differ from the manifest; its text is the description so far.
        ValueError: the manifest cannot be read, or the file has no metadata.
        ImportError: a file needs a package that is not installed.
    """
    path = Path(path)
    check_files(path)
    if path.exists() and is_file_of_artifact(path):
        try:
            return _describe_file(path)
        except (ImportError, ValueError):
            raise
        except Exception as error:  # whatever a reader makes of a damaged file
            raise ValueError(f"{path} cannot be read: {error}") from error
    manifest = Manifest.load(path)
    lines = [str(path), *_header(manifest)]
    try:
        manifest.verify(path)
        for name in manifest.formats.keys() & FORMATS.keys():
            check_spec(path / manifest.formats[name]["path"], name, manifest.spec)
        lines.append(_row("files", "as the manifest says (sizes, SHA-256, own classes and input)"))
    except ValueError as error:
        raise ChecksumMismatchError(
            "\n".join([*lines, _row("files", f"NOT AS THE MANIFEST SAYS: {error}")])
        ) from error
    for name, entry in manifest.formats.items():
        lines += ["", f"{name}: {entry['path']}", *_format(path, name, entry)]
    return "\n".join(lines)


def _describe_file(path: Path) -> str:
    name = str(format_of(path))
    size = sum(file["bytes"] for file in describe_files(path).values())
    spec = spec_of_file(path, name)
    output = FORMATS[name].returns(spec)
    rows = {
        **_spec_rows(spec),
        "takes": _TAKES[output],
        "output": output,
        "size": f"{size:,} bytes",
        **_operation_rows(FORMATS[name].count_operations(path)),
    }
    return "\n".join([str(path), *(_row(key, text) for key, text in rows.items())])


def _spec_rows(spec: ExportSpec) -> dict[str, str]:
    shown = ", ".join(repr(name) for name in spec.class_names[:_NAMES_SHOWN])
    more = ", ..." if spec.num_classes > _NAMES_SHOWN else ""
    return {
        "model": spec.model_name,
        "classes": f"{spec.num_classes}: {shown}{more}",
        "input": f"{'x'.join(map(str, spec.input_size))} (CHW), mean {spec.mean}, std {spec.std}",
        "resize": f"{spec.interpolation}, crop_pct {spec.crop_pct}, {spec.crop_mode}",
    }


def _operation_rows(counted: Mapping[str, int]) -> dict[str, str]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in count_kinds(counted).items())
    return {
        "operations": ", ".join(f"{count} {kind}" for kind, count in counted.items()),
        "of these": kinds,
    }


def _header(manifest: Manifest) -> list[str]:
    training, metadata = manifest.training, manifest.metadata
    metrics = ", ".join(f"{k} {v:.4g}" for k, v in training.metrics.items() if v is not None)
    rows = {
        **_spec_rows(manifest.spec),
        "colors": manifest.channel_order,
        "parameters": f"{manifest.parameters:,}",
        "training": f"epoch {training.epoch}, step {training.step}, {training.checkpoint}",
        "metrics": f"{metrics} (by the manifest alone)" if metrics else "none",
        "metadata": f"author {metadata.author}, license {metadata.license}, version "
        f"{metadata.version}: {metadata.description}",
        "written": f"{manifest.created} by "
        + ", ".join(f"{k} {v}" for k, v in manifest.versions.items()),
        "compared on": f"{manifest.images} images",
    }
    if manifest.condition is not None:
        rows["condition"] = f"one step of an input changes an output by {manifest.condition:.3g}"
    if manifest.problems:
        rows["REJECTED"] = "; ".join(manifest.problems)
    else:
        rows |= {f"no {name}": reason for name, reason in manifest.rejected.items()}
    return [_row(name, text) for name, text in rows.items()]


def _format(path: Path, name: str, entry: Mapping[str, Any]) -> list[str]:
    counted = FORMATS[name].count_operations(path / entry["path"]) if name in FORMATS else {}
    rows = {
        "size": f"{entry['bytes']:,} bytes",
        "input": _words(entry["input"]),
        "output": _words(entry["output"]),
        **_operation_rows(counted),
    }
    rows |= {k.replace("_", " "): _words(v) for k, v in entry.items() if k.endswith("parity")}
    return [_row(key, text) for key, text in rows.items()]


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()
    )


def _row(name: str, text: str) -> str:
    # a forged name must not reach the terminal as a command
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return f"  {name:<15}{shown}"
