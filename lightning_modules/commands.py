"""The subcommands that need no Trainer: predict, export, inspect, compress, benchmark."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

__all__ = [
    "benchmark",
    "benchmark_parser",
    "compress",
    "compress_parser",
    "export",
    "export_parser",
    "inspect",
    "inspect_parser",
    "predict",
    "predict_parser",
]


def predict(name: str, argv: list[str]) -> None:
    """Run `mobileone predict`."""
    options = predict_parser(name).parse_args(argv)
    from lightning_modules.predict import predict_folder

    summary = _answer(name, predict_folder, options)
    print(f"{summary.images} images -> {summary.output}")
    for path, reason in summary.unreadable:
        print(f"unreadable: {path}: {reason}", file=sys.stderr)


def predict_parser(name: str) -> ArgumentParser:
    """Arguments of `mobileone predict`."""
    from lightning_modules.predict import predict_folder

    return _parser_of(
        name,
        predict_folder,
        "Label images with a checkpoint (.ckpt) or an artifact folder, into a CSV file. "
        "Example: mobileone predict runs/quickstart/latest/checkpoints/best photos/ out.csv",
    )


def export(name: str, argv: list[str]) -> None:
    """Run `mobileone export`."""
    options = export_parser(name).parse_args(argv)
    from mobileone.export.checkpoint import export_checkpoint

    manifest = _answer(name, export_checkpoint, options)
    print(f"{', '.join(manifest.formats)} -> {Path(options.directory)}")


def export_parser(name: str) -> ArgumentParser:
    """Arguments of `mobileone export`."""
    from mobileone.export.checkpoint import export_checkpoint

    return _parser_of(
        name,
        export_checkpoint,
        "Write the fused artifacts of a checkpoint, without training. "
        "Example: mobileone export runs/quickstart/latest/checkpoints/last.ckpt shipped/",
    )


def benchmark(name: str, argv: list[str]) -> None:
    """Run `mobileone benchmark training` or `data`."""
    options = benchmark_parser(name).parse_args(argv)
    from rich.console import Console

    from mobileone.bench.training import benchmark_training

    if options.subcommand == "data":
        from lightning_modules.data_commands import print_data_benchmark

        return print_data_benchmark(name, options.data)
    options = options[options.subcommand]
    result = _answer(name, benchmark_training, options)
    # a pipe has no width of its own, and names must not be cut
    Console(width=None if sys.stdout.isatty() else 120).print(result.table())
    if options.directory is not None:
        print(f"{Path(options.directory)}/training.json, training.png")


def benchmark_parser(name: str) -> ArgumentParser:
    """Arguments of `mobileone benchmark`."""
    from mobileone.bench.training import benchmark_training

    training = ArgumentParser(
        description="Time and memory of a training step: timm's block, ours, the plain network. "
        "Example: mobileone benchmark training --variants [mobileone_s0] --directory results"
    )
    training.add_function_arguments(benchmark_training, as_group=False)
    from lightning_modules.data_commands import data_benchmark_parser

    parser = ArgumentParser(prog=f"mobileone {name}", description="Measure on this machine.")
    subcommands = parser.add_subcommands()
    subcommands.add_subcommand(
        "training", training, help="cost of a training step against timm and the plain network"
    )
    subcommands.add_subcommand(
        "data", data_benchmark_parser(), help="images a second by reader, workers and decoder"
    )
    return parser


def inspect(name: str, argv: list[str]) -> None:
    """Run `mobileone inspect`."""
    options = inspect_parser(name).parse_args(argv)
    from mobileone.export.describe import describe_artifact

    print(_answer(name, describe_artifact, options))


def inspect_parser(name: str) -> ArgumentParser:
    """Arguments of `mobileone inspect`."""
    from mobileone.export.describe import describe_artifact

    return _parser_of(
        name,
        describe_artifact,
        "Print what an artifact folder holds: manifest, inputs, outputs, operations, sizes, and "
        "whether the files are those that were written. Example: mobileone inspect "
        "runs/quickstart/latest/checkpoints/best",
    )


def compress(name: str, argv: list[str]) -> None:
    """Run `mobileone compress`."""
    options = compress_parser(name).parse_args(argv)
    from lightning_modules.compress import compress_checkpoint, format_rows

    print(format_rows(_answer(name, compress_checkpoint, options)))
    print(f"-> {Path(options.directory)}")


def compress_parser(name: str) -> ArgumentParser:
    """Arguments of `mobileone compress`."""
    from lightning_modules.compress import compress_checkpoint

    return _parser_of(
        name,
        compress_checkpoint,
        "Write smaller files of a checkpoint (8-bit and palettized Core ML, int8 ONNX) and print "
        "each one's size and accuracy. Example: mobileone compress "
        "runs/quickstart/latest/checkpoints/best.ckpt /path/to/images compressed/",
    )


def _parser_of(name: str, function: Callable[..., Any], description: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"mobileone {name}", description=description)
    parser.add_function_arguments(function, as_positional=True, as_group=False)
    return parser


def _answer(name: str, function: Callable[..., Any], options: Namespace) -> Any:
    """Call a function whose errors are messages for the user."""
    from mobileone.export import RejectedError

    try:
        return function(**options.as_dict())
    except (ValueError, OSError, ImportError, RejectedError) as error:
        print(f"mobileone {name}: error: {error}", file=sys.stderr)
        sys.exit(2)
