"""Latency of the very files that ship, in every runtime that reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mobileone.bench.inference.case import as_tensor, relative_error
from mobileone.bench.results import Result, Row
from mobileone.bench.runtimes import RUNTIMES, Runtime, check_runtimes
from mobileone.bench.timing import (
    PROTOCOLS,
    check_threads,
    get_protocol,
    pinned,
    summarize,
    time_in_turn,
    torch_threads,
)
from mobileone.export.formats.table import FORMATS
from mobileone.export.load import Loaded, is_file_of_artifact, load_runner
from mobileone.export.manifest import Manifest, describe_files
from mobileone.export.preprocess import normalize
from mobileone.export.verify.parity import fixed_images

__all__ = ["measure_artifacts"]


def measure_artifacts(
    artifact: Sequence[str],
    runtimes: Sequence[str] | None = None,
    protocol: str = "paper",
    runs: int | None = None,
    threads: int = 1,
) -> Result:
    """Time the files of artifacts as they are, one image at a time, in turn.

    Files must be those of their manifest. What a runtime computes is compared, before anything is
    timed, with what the file's own format reads; a file that no runtime here can run, or that it
    computes wrongly, is in the result with the reason.

    Args:
        artifact: Artifact folders, or files of them.
        runtimes: Names in `RUNTIMES`; None: all that are present and read a file of an artifact.
        protocol: `paper` (1 warm-up, 1000 runs, minimum) or `modelbench` (20 rounds of 50, file
            reloaded, 10 lowest and 10 highest of each dropped, average).
        runs: Timed inferences of each case; None: the protocol's.
        threads: Threads, and processors that they are kept on.

    Returns:
        A result of the kind `artifact`; rows have `folder`, `file`, `format`, `runtime`, `bytes`,
        the times of `measure_latency`, `threads`, `image_size`, `speed` (false: an interpreter,
        whose times are no measure of a device's), `relative_error`, `failure`.

    Raises:
        FileNotFoundError: There is no such artifact.
        ValueError: A file is not that of its manifest, or an argument is out of its range.
        ImportError: A runtime was named that is not installed; says how to install it.
    """
    if not artifact or isinstance(artifact, str):
        raise ValueError(f"`artifact` (={artifact!r}) must be one or more folders or files")
    chosen = get_protocol(protocol, runs)
    check_threads(threads)
    names = None if runtimes is None else check_runtimes(runtimes, "cpu")
    files = [file for given in dict.fromkeys(artifact) for file in _files(Path(given))]
    with torch_threads(threads):
        cases = [case for file in files for case in _cases(*file, names, threads)]
        ready = {str(i): c.load for i, c in enumerate(cases) if c.load and c.row["speed"]}
        others = {str(i): c.load for i, c in enumerate(cases) if c.load and not c.row["speed"]}
        with pinned(threads) as processors:
            times = time_in_turn(ready, chosen) | time_in_turn(others, _ONCE)
    rows = [
        case.row | (summarize(times[str(i)]) if str(i) in times else {})
        for i, case in enumerate(cases)
    ]
    how = asdict(chosen) | {"threads": threads, "batch_size": 1, "processors": processors}
    how |= {"order": "in turns, shuffled", "form": "the files, as they are"}
    if any(row.get("speed") is False for row in rows):
        how["note"] = "Interpreters for checks (speed: no) are no measure of a device's speed."
    return Result.new("artifact", how, rows)


_ONCE = replace(PROTOCOLS["paper"], runs=1, rounds=1)  # of interpreters, which take long


@dataclass(frozen=True)
class _Case:
    row: Row
    load: Any = None


def _files(given: Path) -> list[tuple[Path, str]]:
    """The files of an artifact, with the format of each; "" where it is for the file to say."""
    if is_file_of_artifact(given):
        return [(given, "")]
    entries = Manifest.load(given).formats
    return [(given / entry["path"], name) for name, entry in entries.items()]


def _cases(file: Path, name: str, chosen: Sequence[str] | None, threads: int) -> list[_Case]:
    """A file in each runtime that reads it; one that cannot be run, with the reason."""
    row: Row = {
        "folder": str(file.parent), "file": str(file), "format": name, "runtime": "",
        "threads": threads, "bytes": sum(f["bytes"] for f in describe_files(file).values()),
    }  # fmt: skip
    readers = {
        key: runtime
        for key, runtime in RUNTIMES.items()
        if runtime.reads == file.suffix and (chosen is None or key in chosen)
    }
    lacks = {key: runtime.lack() for key, runtime in readers.items()}
    here = {key: runtime for key, runtime in readers.items() if lacks[key] is None}
    if not here:
        if chosen is not None and not readers:
            return []
        reasons = dict.fromkeys(f"{lack}" for lack in lacks.values())
        return [_Case(row | {"failure": "; ".join(reasons) or f"no runtime reads {file.suffix}"})]
    try:
        loaded = load_runner(file, name or None)
    except ImportError as error:
        return [_Case(row | {"failure": str(error)})]
    images = fixed_images(loaded.spec, 1)
    row |= {"format": loaded.format, "image_size": images.shape[-1]}
    expected = loaded.run(images)
    return [
        _case(row | {"runtime": key, "speed": runtime.speed}, runtime, loaded, images, expected)
        for key, runtime in here.items()
    ]


def _case(row: Row, runtime: Runtime, loaded: Loaded, images: Tensor, expected: Tensor) -> _Case:
    """A file in a runtime, compared with what its own format reads in it."""
    pixels = FORMATS[loaded.format].returns(loaded.spec) == "probabilities"
    x = images.float() if pixels else normalize(images, loaded.spec)
    load = partial(runtime.load, loaded.file, x, row["threads"])
    try:
        output = load()()
        if isinstance(output, Mapping):  # by class, of Core ML
            output = [[output[name] for name in loaded.spec.class_names]]
        error = relative_error(as_tensor(output), expected)
        tolerance = FORMATS[loaded.format].tolerance
        if not error < tolerance:
            raise RuntimeError(f"its output differs from the file's by {error:.2g} (relative)")
    except Exception as failure:  # whatever a runtime raises: the others are measured still
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        return _Case(row | {"failure": reason})
    return _Case(row | {"relative_error": error, "failure": None}, load)
