"""The subcommands `study` and `report`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_modules.cli.output import print_table, run_or_exit

__all__ = ["report", "report_parser", "study", "study_parser"]


def study(name: str, argv: list[str]) -> None:
    """Run `mobileone study`."""
    options = study_parser(name).parse_args(argv)
    chosen = options.subcommand
    function, show = _study(chosen)
    result = run_or_exit(f"{name} {chosen}", function, **options[chosen].as_dict())
    print_table(show(result))
    directory = options[chosen].directory
    if directory is not None:
        print(f"{Path(directory)}/{chosen}.json, .csv, .png, .svg")


def study_parser(name: str) -> ArgumentParser:
    """Arguments of `mobileone study`."""
    parser = ArgumentParser(
        prog=f"mobileone {name}", description="Repeat an experiment of the paper on this machine."
    )
    studies = parser.add_subcommands()
    for chosen, (short, description) in _STUDIES.items():
        single = ArgumentParser(description=description)
        single.add_function_arguments(_study(chosen)[0], as_group=False)
        studies.add_subcommand(chosen, single, help=short)
    return parser


def report(name: str, argv: list[str]) -> None:
    """Run `mobileone report`."""
    options = report_parser(name).parse_args(argv)
    from lightning_modules.report.page import write_report

    path = run_or_exit(name, write_report, **options.as_dict())
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


def report_parser(name: str) -> ArgumentParser:
    """Arguments of `mobileone report`."""
    from lightning_modules.report.page import write_report

    parser = ArgumentParser(
        prog=f"mobileone {name}",
        description="Gather a folder of results and a run into one HTML page that needs nothing "
        "else. Example: mobileone report results --run runs/quickstart/latest",
    )
    parser.add_function_arguments(write_report, as_group=False, as_positional=True)
    return parser


_STUDIES = {
    "bottlenecks": (
        "latency of activations, skips and SE in 30 layers (Tables 2 and 3)",
        "Time a 30-layer network with different activations and blocks, beside the paper's. "
        "Example: mobileone study bottlenecks --directory results",
    ),
    "correlation": (
        "latency against multiply-adds and parameters (Table 1)",
        "Time a suite of networks, and correlate latency with multiply-adds and parameters. "
        "Example: mobileone study correlation --suite paper --directory results",
    ),
    "ablation": (
        "short trainings over k, branches and recipe (Tables 5, 6 and 8)",
        "Train many times, shortly, with and without what the paper adds. Ended, it goes on where "
        "it was. Example: mobileone study ablation --directory results/ablation",
    ),
}


def _study(chosen: str) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """What measures, and what makes a table of the result; each is imported when it is needed."""
    if chosen == "bottlenecks":
        from mobileone.bench.studies.bottlenecks import bottlenecks_table, study_bottlenecks

        return study_bottlenecks, bottlenecks_table
    if chosen == "correlation":
        from mobileone.bench.studies.correlation import correlation_table, study_correlation

        return study_correlation, correlation_table
    from lightning_modules.studies.ablation import ablation_table, study_ablation

    return study_ablation, ablation_table
