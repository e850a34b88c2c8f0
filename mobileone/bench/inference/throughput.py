"""Images a second of fused networks, by batch size and device."""

from collections.abc import Sequence

from mobileone.bench.inference.latency import check_device, measure_latency
from mobileone.bench.results import Result, Row
from mobileone.bench.runtimes import check_runtimes
from mobileone.bench.suites import choose_models

__all__ = ["measure_throughput"]


def measure_throughput(
    models: Sequence[str],
    batch_sizes: Sequence[int] = (1, 8, 32),
    devices: Sequence[str] = ("cpu",),
    runtimes: Sequence[str] | None = ("eager",),
    runs: int = 40,
    threads: int = 1,
    image_size: int | None = None,
    suite: str | None = None,
) -> Result:
    """Time batches, as `measure_latency` times single images, and divide.

    Contenders of the same batch size and device alternate. A batch that does not fit into memory
    stands in the result with that reason.

    Args:
        models: Names of timm's models, or torchvision's with the prefix `torchvision/`.
        batch_sizes: Images in an inference.
        devices: Devices of PyTorch.
        runtimes: Names in `RUNTIMES`; None: all that are present.
        runs: Timed inferences of each contender, batch size and device.
        threads: Threads, and processors that they are kept on.
        image_size: Height and width; None: what each model is meant for.
        suite: A group of models, in addition: `paper` (Table 9) or `2026`.

    Returns:
        A result of the kind `throughput`; rows are those of `measure_latency` with
        `images_per_s`, from the median time, and `best_images_per_s`, from the shortest.

    Raises:
        ValueError: A name or number is out of range, or there is no such device.
        ImportError: A runtime was named that is not installed; says how to install it.
    """
    names, choice = choose_models(models, suite)
    for name, values in (("batch_sizes", batch_sizes), ("devices", devices)):
        if not values or isinstance(values, str):
            raise ValueError(f"`{name}` (={values!r}) must be a list of one or more")
    if min(batch_sizes) < 1:
        raise ValueError(f"`batch_sizes` (={list(batch_sizes)}) must all be at least 1")
    for device in devices:
        check_device(device)
        check_runtimes(runtimes, device)
    results = [
        measure_latency(names, runtimes, "paper", runs, threads, batch, image_size, device)
        for device in devices
        for batch in batch_sizes
    ]
    how = results[0].protocol | choice
    how |= {
        "batch_size": None,
        "batch_sizes": list(batch_sizes),
        "device": None,
        "devices": {r.machine["device"]: r.machine["device_name"] for r in results},
        "statistic": "images_per_s",
    }
    rows = [_with_rate(row) for result in results for row in result.rows]
    return Result.new("throughput", how, rows, devices[-1])


def _with_rate(row: Row) -> Row:
    if row["failure"] is not None:
        return row
    images = 1e3 * row["batch_size"]
    return row | {
        "images_per_s": images / row["median_ms"],
        "best_images_per_s": images / row["min_ms"],
    }
