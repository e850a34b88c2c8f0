"""The subcommands about data sets: shards, benchmark data."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_modules.cli.output import exit_with_error, print_table, run_or_exit

__all__ = ["data_benchmark_parser", "print_data_benchmark", "shards", "shards_parser"]


def shards(name: str, argv: list[str]) -> None:
    """Run `mobileone shards`."""
    parser = shards_parser(name)
    options = parser.parse_args(argv)
    from lightning_modules.data.shards.format import verify_shards
    from lightning_modules.data.shards.writer import make_shards
    from lightning_modules.run.warning_filters import silence_known_messages

    silence_known_messages()
    arguments = options.as_dict()
    checked = arguments.pop("verify")
    if checked is not None:
        manifest, place = run_or_exit(name, verify_shards, root=checked), checked
    elif arguments["source"] is None or arguments["destination"] is None:
        exit_with_error(name, "give SRC and DST, or --verify DST; --help says more.")
    else:
        manifest, place = run_or_exit(name, make_shards, **arguments), arguments["destination"]
    for split in manifest.splits.values():
        print(
            f"{split.name}: {split.num_samples} images of {len(manifest.classes)} classes in "
            f"{len(split.filenames)} shards, {sum(split.bytes) / 1e6:.1f} MB"
        )
    print(f"as written: {place}" if checked is not None else f"-> {Path(place)}")


def shards_parser(name: str) -> ArgumentParser:
    """Arguments of `mobileone shards`."""
    from lightning_modules.data.shards.writer import make_shards

    parser = ArgumentParser(
        prog=f"mobileone {name}",
        description="Write an ImageFolder as WebDataset shards. A run that was stopped goes on "
        "where it was. Example: mobileone shards /data/imagenet /data/imagenet-shards; then train "
        "with --data.dataset wds --data.root /data/imagenet-shards",
    )
    parser.add_argument("source", nargs="?", help="folder with train/<class>/*, val/<class>/*")
    parser.add_argument(
        "destination", nargs="?", help="a new folder, that of a stopped run, or shards to mend"
    )
    parser.add_argument("--verify", type=str | None, help="check this folder of shards, write none")
    parser.add_function_arguments(make_shards, as_group=False, skip={"source", "destination"})
    return parser


def print_data_benchmark(name: str, options: Namespace) -> None:
    """Run `mobileone benchmark data`."""
    from lightning_modules.data.benchmark import benchmark_data
    from lightning_modules.run.warning_filters import silence_known_messages

    silence_known_messages()
    result = run_or_exit(name, benchmark_data, **options.as_dict())
    print_table(result.table())
    print(result.verdict)
    if options.directory is not None:
        print(Path(options.directory) / "data.json")


def data_benchmark_parser() -> ArgumentParser:
    """Arguments of `mobileone benchmark data`."""
    from lightning_modules.data.benchmark import benchmark_data

    parser = ArgumentParser(
        description="Images a second of the training loader, and whether they or the network bind "
        "a run. Example: mobileone benchmark data --root /data/imagenet --workspace /data "
        "--workers [0,2,8] --model mobileone_s0 --device cuda"
    )
    parser.add_function_arguments(benchmark_data, as_group=False)
    return parser
