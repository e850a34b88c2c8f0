"""A written file as a function: from its artifact folder, or alone."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from mobileone.export.formats import torchscript
from mobileone.export.formats.table import FORMATS, format_of
from mobileone.export.manifest import MANIFEST_NAME, Manifest
from mobileone.export.spec import ExportSpec
from mobileone.export.verify.parity import NotVerifiedError, Runner
from mobileone.io.safe_pickle import UnsafeFileError

__all__ = [
    "Loaded",
    "check_files",
    "check_spec",
    "is_file_of_artifact",
    "load_runner",
    "load_torchscript_artifact",
    "spec_of_file",
]


class Loaded(NamedTuple):
    """A file that is ready to run.

    Attributes:
        run: 8-bit images (N, C, H, W) -> logits or probabilities (N, classes), on the CPU.
        format: its name in `FORMATS`.
        spec: what it expects and returns.
        file: where it is.
    """

    run: Runner
    format: str
    spec: ExportSpec
    file: Path


def load_runner(path: str | Path, name: str | None = None) -> Loaded:
    """An artifact as a function.

    Args:
        path: an artifact folder, or a file (`.pt`, `.onnx`, `.pte`, ...) of one. A file that was
            taken out of its folder, or compressed, is run by its own metadata.
        name: which format of a folder; None takes the first of `FORMATS` that can run here.

    Raises:
        FileNotFoundError: `path` is not an artifact, or holds no file of that format.
        ValueError: a file is damaged, does not match its manifest, or cannot be run here.
    """
    path = Path(path)
    check_files(path)
    if is_file_of_artifact(path):
        return _load_file(path, name)
    manifest = Manifest.load(path)
    present = [n for n in FORMATS if n in manifest.formats]
    if name is not None and name not in present:
        raise FileNotFoundError(
            f"{path} holds {list(manifest.formats)} and no {name!r} that is registered here: "
            "export it again with it, or import the module of a format of yours: --imports "
            "'[my_formats]'"
        )
    manifest.verify(path)
    reasons = []
    for candidate in present if name is None else [name]:
        file = path / manifest.formats[candidate]["path"]
        try:
            check_spec(file, candidate, manifest.spec)
            run = FORMATS[candidate].runner(file, manifest.spec)
            return Loaded(run, candidate, manifest.spec, file)
        except (ImportError, NotVerifiedError) as error:
            reasons.append(f"{candidate}: {error}")
    reasons += [f"{n}: not registered, see --imports" for n in manifest.formats if n not in FORMATS]
    raise ValueError(f"no file of {path} can be run here: {'; '.join(reasons)}")


def load_torchscript_artifact(path: str | Path) -> tuple[nn.Module, Manifest]:
    """The TorchScript module of an artifact folder, its files verified, and the manifest.

    The module maps normalized float images (N, C, H, W) to logits (N, classes), or, if the spec
    has `pixels`, float pixel values 0..255 to probabilities, on the CPU.

    Raises:
        FileNotFoundError: `path` is not an artifact folder, or holds no TorchScript file.
        ValueError: a file does not match the manifest.
    """
    loaded = load_runner(path, "torchscript")
    return torchscript.load(loaded.file), Manifest.load(path)


def _load_file(path: Path, name: str | None) -> Loaded:
    if not path.exists():
        raise FileNotFoundError(f"no file at {path}")
    manifest = _manifest_of(path)
    found = manifest.name_of(path) if manifest else None
    chosen = found or str(format_of(path))
    if name not in (None, chosen):
        raise ValueError(f"{path} is a file of the format {chosen!r}, not {name!r}")
    if chosen not in FORMATS:
        raise ValueError(
            f"{path} is of the format {chosen!r}, which is not among {', '.join(FORMATS)}: if a "
            "module of yours registers it, import that module with --imports '[my_formats]'"
        )
    if manifest and found:
        manifest.verify(path.parent, [found])
    try:
        spec = manifest.spec if manifest and found else spec_of_file(path, chosen)
        check_spec(path, chosen, spec)
        return Loaded(FORMATS[chosen].runner(path, spec), chosen, spec, path)
    except (ImportError, UnsafeFileError):
        raise
    except Exception as error:  # whatever a reader makes of a damaged file
        raise ValueError(f"{path} cannot be run as {chosen!r}: {error}") from error


def spec_of_file(path: Path, name: str) -> ExportSpec:
    """The own metadata of a file outside of its artifact folder.

    Raises:
        ValueError: its format has no place for that.
    """
    read = FORMATS[name].spec
    if read is None:
        raise ValueError(
            f"{path} is run from its artifact folder only: keep it next to its manifest"
        )
    return read(path)


def check_spec(path: Path, name: str, spec: ExportSpec) -> None:
    """Compare what a manifest says about classes and input with the file's own metadata.

    Raises:
        ValueError: they differ, so that one of them was changed.
    """
    if said := FORMATS[name].contradictions(path, spec):
        raise ValueError(
            f"the manifest says {said[0]}: one of them was changed; export the checkpoint again"
        )


def check_files(path: Path) -> None:
    """Refuse what may never end: named pipes and devices, as archives can bring them.

    Args:
        path: an artifact folder, or a file of one.

    Raises:
        ValueError: there is one.
    """
    artifact = (path / MANIFEST_NAME).exists() or is_file_of_artifact(path)
    for file in (path, *(path.rglob("*") if artifact else ())):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise ValueError(f"{file} is a named pipe or a device, and not a file: refused")


def is_file_of_artifact(path: Path) -> bool:
    """Whether a path is named as a file of an artifact, and is not an artifact folder itself."""
    return format_of(path) is not None and not (path / MANIFEST_NAME).is_file()


def _manifest_of(file: Path) -> Manifest | None:
    return Manifest.load(file.parent) if (file.parent / MANIFEST_NAME).is_file() else None
