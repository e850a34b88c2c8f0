"""The subcommands that measure: profile, and benchmark with its own subcommands."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lightning_modules.cli.output import exit_with_error, print_table, run_or_exit

__all__ = ["benchmark", "benchmark_parser", "profile", "profile_parser"]


def profile(name: str, argv: list[str]) -> None:
    """Run `mobileone profile`."""
    options = profile_parser(name).parse_args(argv)
    from mobileone.bench.inference.profile import profile_models
    from mobileone.bench.show.tables import profile_table

    level = options.pop("level")
    _measure(name, profile_models, options, lambda result: profile_table(result, level))


def profile_parser(name: str) -> ArgumentParser:
    """Arguments of `mobileone profile`."""
    from mobileone.bench.inference.profile import profile_models

    parser = _parser_of(
        profile_models,
        "Parameters, multiply-adds, activations and memory traffic, beside the paper's numbers. "
        "Example: mobileone profile mobileone_s1 repvit_m1_0 --level stage",
        prog=f"mobileone {name}",
    )
    parser.add_argument(
        "--level", default="model", choices=["model", "stage", "layer"], help="what has a row"
    )
    return parser


def benchmark(name: str, argv: list[str]) -> None:
    """Run `mobileone benchmark` and what follows it."""
    options = benchmark_parser(name).parse_args(argv)
    _BENCHMARKS[options.subcommand](f"{name} {options.subcommand}", options[options.subcommand])


def benchmark_parser(name: str) -> ArgumentParser:
    """Arguments of `mobileone benchmark`."""
    from lightning_modules.cli.data_commands import data_benchmark_parser
    from mobileone.bench.inference.latency import measure_latency
    from mobileone.bench.inference.memory import measure_memory
    from mobileone.bench.inference.throughput import measure_throughput
    from mobileone.bench.studies.pareto import draw_pareto
    from mobileone.bench.training_step.measure import measure_training

    parser = ArgumentParser(prog=f"mobileone {name}", description="Measure on this machine.")
    commands = parser.add_subcommands()
    training = ArgumentParser(
        description="Time and memory of a training step: timm's block, ours, the plain network. "
        "Example: mobileone benchmark training mobileone_s0 --directory results"
    )
    training.add_argument(
        "models", nargs="*", type=str, default=["mobileone_s0", "mobileone_s1"],
        help="MobileOnes, by timm's names",
    )  # fmt: skip
    training.add_function_arguments(measure_training, skip={"models"}, as_group=False)
    commands.add_subcommand(
        "training", training, help="cost of a training step against timm and the plain network"
    )
    latency = _parser_of(
        measure_latency,
        "Latency of fused networks in every runtime that is present. "
        "Example: mobileone benchmark latency --suite 2026 --runtimes [onnxruntime]",
    )
    latency.add_argument(
        "--against", type=str | None, default=None,
        help="an earlier result of this machine, to print the change since",
    )  # fmt: skip
    commands.add_subcommand("latency", latency, help="latency across runtimes")
    throughput = _parser_of(
        measure_throughput,
        "Images a second of fused networks. Example: mobileone benchmark throughput mobileone_s1 "
        "--batch_sizes [1,16,64]",
    )
    commands.add_subcommand("throughput", throughput, help="images a second, by batch size")
    memory = _parser_of(
        measure_memory,
        "Peak memory of fused networks, each in a process of its own. "
        "Example: mobileone benchmark memory mobileone_s0 mobileone_s1",
    )
    commands.add_subcommand("memory", memory, help="peak memory of inference")
    pareto = ArgumentParser(
        description="Draw accuracy against latency: the paper's Figure 1, with measurements of "
        "this machine on top. Example: mobileone benchmark pareto figure --results "
        "[results/latency.json]"
    )
    pareto.add_function_arguments(draw_pareto, as_positional=True, as_group=False)
    commands.add_subcommand("pareto", pareto, help="chart of accuracy against latency")
    commands.add_subcommand(
        "data", data_benchmark_parser(), help="images a second by reader, workers and decoder"
    )
    return parser


def _training(name: str, options: Namespace) -> None:
    from mobileone.bench.training_step.measure import measure_training, training_table

    _show_progress()
    result = run_or_exit(name, measure_training, **options.as_dict())
    print_table(training_table(result))
    if options.directory is not None:
        print(f"{Path(options.directory)}/training.json, .csv, .png, .svg")


def _latency(name: str, options: Namespace) -> None:
    from mobileone.bench.inference.latency import measure_latency
    from mobileone.bench.results import Result
    from mobileone.bench.show.tables import change_table, latency_table

    against = options.pop("against")
    before = run_or_exit(name, lambda: Result.load(against)) if against else None
    result = _measure(name, measure_latency, options, latency_table)
    if before is not None:
        print_table(run_or_exit(name, lambda: change_table(before, result)))


def _throughput(name: str, options: Namespace) -> None:
    from mobileone.bench.inference.throughput import measure_throughput
    from mobileone.bench.show.tables import throughput_table

    _measure(name, measure_throughput, options, throughput_table)


def _memory(name: str, options: Namespace) -> None:
    from mobileone.bench.inference.memory import measure_memory
    from mobileone.bench.show.tables import memory_table

    _measure(name, measure_memory, options, memory_table)


def _pareto(name: str, options: Namespace) -> None:
    from mobileone.bench.studies.pareto import draw_pareto

    paths = run_or_exit(name, draw_pareto, **options.as_dict())
    print(", ".join(map(str, paths)))


def _data(name: str, options: Namespace) -> None:
    from lightning_modules.cli.data_commands import print_data_benchmark

    print_data_benchmark(name, options)


_BENCHMARKS: dict[str, Callable[[str, Namespace], None]] = {
    "training": _training,
    "latency": _latency,
    "throughput": _throughput,
    "memory": _memory,
    "pareto": _pareto,
    "data": _data,
}


def _parser_of(function: Callable[..., Any], description: str, **more: Any) -> ArgumentParser:
    """The arguments of a function of `models`, which come first, and where the result goes."""
    parser = ArgumentParser(description=description, **more)
    parser.add_argument(
        "models", nargs="*", type=str, default=[],
        help="names of timm's models, or torchvision's with the prefix torchvision/",
    )  # fmt: skip
    parser.add_function_arguments(function, skip={"models"}, as_group=False)
    parser.add_argument(
        "--suite", type=str | None, default=None,
        help="a group of models by name: paper (Table 9), 2026",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=str | None, default=None,
        help="where to save: a file that ends in .json; the rows also as .csv beside it",
    )  # fmt: skip
    return parser


def _measure(
    name: str, function: Callable[..., Any], options: Namespace, table: Callable[[Any], Any]
) -> Any:
    """Call a measurement with the models that were named, print and save what it returns."""
    suite, output = options.pop("suite"), options.pop("output")
    if output is not None and Path(output).suffix != ".json":
        exit_with_error(name, f"`output` (={output!r}) must end in .json")
    named = options.pop("models")
    if not named and suite is None:
        exit_with_error(name, "name models, such as mobileone_s0, or --suite paper, --suite 2026")

    def run() -> Any:
        from mobileone.bench.suites import get_suite

        chosen = get_suite(suite) if suite is not None else None
        models = [*named, *(chosen.models if chosen else ())]
        result = function(models=models, **options.as_dict())
        if chosen is not None:
            result.protocol.update(suite=suite, missing=list(chosen.missing))
        return result

    _show_progress()
    result = run_or_exit(name, run)
    print_table(table(result))
    if output is not None:
        print(f"{result.save(output)}, {result.write_csv(Path(output).with_suffix('.csv'))}")
    return result


def _show_progress() -> None:
    """Say on stderr what is going on, where a person may be waiting."""
    logger = logging.getLogger("mobileone.bench")
    if sys.stderr.isatty() and not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
