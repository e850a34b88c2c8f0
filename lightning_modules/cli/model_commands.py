"""The subcommands that need no Trainer: predict, export, inspect, compress."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_modules.cli.output import run_or_exit

__all__ = [
    "compress",
    "compress_parser",
    "export",
    "export_parser",
    "inspect",
    "inspect_parser",
    "predict",
    "predict_parser",
]

_ARTIFACT = "artifact"


def predict(name: str, argv: list[str]) -> None:
    """Run `mobileone predict`."""
    options = predict_parser(name).parse_args(_source_first(argv))
    del options[_ARTIFACT]
    from lightning_modules.inference.predict import predict_folder

    summary = run_or_exit(name, predict_folder, **options.as_dict())
    print(f"{summary.images} images -> {summary.output}")
    for path, reason in summary.unreadable:
        print(f"unreadable: {path}: {reason}", file=sys.stderr)


def predict_parser(name: str) -> ArgumentParser:
    """Arguments of `mobileone predict`."""
    from lightning_modules.inference.predict import predict_folder

    parser = _parser_of(
        name,
        predict_folder,
        "Label images with a checkpoint (.ckpt), an artifact folder or any file of one, into a CSV "
        "file. Example: mobileone predict runs/quickstart/latest/checkpoints/best photos/ out.csv",
    )
    parser.add_argument(
        f"--{_ARTIFACT}",
        metavar="SOURCE",
        help="the source, in place of the first argument",
    )
    return parser


def _source_first(argv: list[str]) -> list[str]:
    """`--artifact SOURCE IMAGES OUTPUT`, in any order, as `SOURCE IMAGES OUTPUT`."""
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument(f"--{_ARTIFACT}")
    found, rest = named.parse_known_args(argv)
    source = getattr(found, _ARTIFACT)
    return argv if source is None else [source, *rest]


def export(name: str, argv: list[str]) -> None:
    """Run `mobileone export`."""
    options = export_parser(name).parse_args(argv)
    from mobileone.export.checkpoint import export_checkpoint

    manifest = run_or_exit(name, export_checkpoint, **options.as_dict())
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


def inspect(name: str, argv: list[str]) -> None:
    """Run `mobileone inspect`; it exits with 1 if the files are not those that were written."""
    options = inspect_parser(name).parse_args(argv)
    from mobileone.export.inspect import ChecksumMismatchError, describe_artifact

    def describe(**arguments: Any) -> tuple[str, int]:
        try:
            return describe_artifact(**arguments), 0
        except ChecksumMismatchError as error:
            return str(error), 1

    text, code = run_or_exit(name, describe, **options.as_dict())
    print(text)
    if code:
        sys.exit(code)


def inspect_parser(name: str) -> ArgumentParser:
    """Arguments of `mobileone inspect`."""
    from mobileone.export.inspect import describe_artifact

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
    from lightning_modules.inference.compress import compress_checkpoint, format_rows

    print(format_rows(run_or_exit(name, compress_checkpoint, **options.as_dict())))
    print(f"-> {Path(options.directory)}")


def compress_parser(name: str) -> ArgumentParser:
    """Arguments of `mobileone compress`."""
    from lightning_modules.inference.compress import compress_checkpoint

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
