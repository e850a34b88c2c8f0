"""The command `mobileone`: a table of subcommands, each imported when it is called."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version

import argcomplete

__all__ = ["COMMANDS", "complete", "main"]


@dataclass(frozen=True)
class Command:
    """One subcommand: where its function is, and one line for the help."""

    target: str
    help: str

    def load(self) -> Callable[[str, list[str]], None]:
        """Import the function, which takes the subcommand's name and its arguments."""
        module, _, name = self.target.partition(":")
        return getattr(import_module(module), name)


_TRAINING = "lightning_modules.run.fit:run"
_DENSE = "lightning_modules.cli.dense_commands:run"

COMMANDS = {
    "fit": Command(_TRAINING, "train; after each validation write checkpoint and fused artifacts"),
    "validate": Command(_TRAINING, "evaluate a checkpoint on the validation set"),
    "test": Command(_TRAINING, "evaluate a checkpoint on the test set, with a confusion matrix"),
    "predict": Command(
        "lightning_modules.cli.model_commands:predict",
        "label a folder of images with a checkpoint or an artifact, into a CSV file",
    ),
    "export": Command(
        "lightning_modules.cli.model_commands:export",
        "turn a checkpoint into fused artifacts, untrained",
    ),
    "profile": Command(
        "lightning_modules.cli.bench_commands:profile",
        "count parameters, multiply-adds and memory traffic, beside the paper's",
    ),
    "benchmark": Command(
        "lightning_modules.cli.bench_commands:benchmark",
        "measure on this machine: latency, throughput, memory, data, the cost of a training step",
    ),
    "segment": Command(_DENSE, "fit, validate or export a segmentation network"),
    "detect": Command(_DENSE, "fit, validate or export an object detector"),
    "shards": Command(
        "lightning_modules.cli.data_commands:shards",
        "write a folder of images as WebDataset shards, or check those that were written",
    ),
    "compress": Command(
        "lightning_modules.cli.model_commands:compress",
        "write smaller files, and measure what they lose",
    ),
    "study": Command(
        "lightning_modules.cli.study_commands:study",
        "repeat an experiment of the paper: bottlenecks, correlation, ablation",
    ),
    "report": Command(
        "lightning_modules.cli.study_commands:report",
        "gather results and a run into one HTML page to send",
    ),
    "inspect": Command(
        "lightning_modules.cli.model_commands:inspect",
        "print what an artifact holds, and check its files",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    Args:
        argv: Arguments after the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: With code 2 on arguments that cannot be used.
    """
    # waiting threads sleep: spinning ones stall training where cores are shared
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if "_ARGCOMPLETE" in os.environ:
        targets = {name: command.target for name, command in COMMANDS.items()}
        import_module("lightning_modules.cli.main").complete(targets)
    elif name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"mobileone {version('mobileone-lightning')}")
    elif name in COMMANDS:
        COMMANDS[name].load()(name, rest)
    else:
        listed = ", ".join(COMMANDS)
        sys.exit(_complain(f"unknown subcommand {name!r}; choose one of: {listed}"))


def _complain(message: str) -> int:
    print(f"mobileone: error: {message}", file=sys.stderr)
    return 2


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {c.help}" for name, c in COMMANDS.items())
    return f"""usage: mobileone SUBCOMMAND [options]

Train MobileOne, or any reparameterizable timm network, and ship it.

subcommands:
{rows}

  -h, --help     show this help
  --version      show the version

`mobileone SUBCOMMAND --help` lists a subcommand's options. To begin:

  mobileone fit --config configs/quickstart.yaml"""


if __name__ == "__main__":
    main()


def complete(commands: Mapping[str, str]) -> None:
    """Answer the shell and exit; only the subcommand that is being typed is imported.

    jsonargparse answers for a parser on its own, so the subcommand's word is taken out of the
    line that the shell sent.

    Args:
        commands: Where the function of each subcommand is, as `module:function`; beside it is
            `<subcommand>_parser`.
    """
    program, _, rest = os.environ["COMP_LINE"].partition(" ")
    name, typed, arguments = rest.partition(" ")
    if not typed or name not in commands:
        parser = argparse.ArgumentParser(prog="mobileone")
        parser.add_argument("subcommand", choices=list(commands))
        argcomplete.autocomplete(parser)
        return
    os.environ["COMP_LINE"] = f"{program} {arguments}"
    os.environ["COMP_POINT"] = str(int(os.environ["COMP_POINT"]) - len(name) - 1)
    if name in ("fit", "validate", "test"):
        from lightning_modules.run.fit import run

        run(name, [])
    elif name not in ("segment", "detect"):  # whose parser is LightningCLI's own
        module = import_module(commands[name].partition(":")[0])
        getattr(module, f"{name}_parser")(name).parse_args([])
