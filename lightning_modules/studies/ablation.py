"""Short trainings that differ in one thing: branches, k, weight decay, EMA, curriculum."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_modules.data.transforms import resolve_config
from lightning_modules.run.config_files import packaged_configs
from lightning_modules.studies.cells import Cells, identity, parse, train
from mobileone.bench.paper import paper_table
from mobileone.bench.results import Result, Row
from mobileone.variants import VARIANTS

__all__ = ["study_ablation"]

Part = Literal["k", "branches", "recipe"]
PARTS: tuple[Part, ...] = ("k", "branches", "recipe")

_NONE = {"num_conv_branches": 1, "use_scale": False, "use_skip": False}

_RECIPE = "imagenet/base"


@dataclass(frozen=True)
class Setting:
    """One line of the study: what is changed in the configuration.

    Attributes:
        part: Which comparison it belongs to.
        name: What it is called.
        model_kwargs: Added to the model's keywords.
        options: Added to the command line of `mobileone fit`.
    """

    part: Part
    name: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    def key(self) -> str:
        """What decides the training: two settings with the same key are the same cells."""
        return json.dumps([self.model_kwargs, self.options], sort_keys=True)


def ablation_settings(
    model: str, size: int, weight_decay: float, parts: Sequence[Part]
) -> list[Setting]:
    """The lines of the study.

    Args:
        model: One of the family, unless it is only the recipe that is studied.
        size: Height of the images, in pixels.
        weight_decay: At the start of the training.
        parts: Which comparisons.

    Raises:
        ValueError: The model has no branches to choose.
    """
    if set(parts) != {"recipe"} and model not in VARIANTS:
        raise ValueError(
            f"`model` (={model!r}) has no k and no branches to choose; take one of "
            f'{", ".join(VARIANTS)}, or `parts` ["recipe"] alone'
        )
    own = VARIANTS[model].num_conv_branches if model in VARIANTS else None
    curriculum = ("--curriculum.phases", json.dumps(_recipe_phases(size)))
    plain = ("--curriculum.phases", "[]")
    constant = ("--model.weight_decay_end", repr(weight_decay))
    annealed = ("--model.weight_decay_end", repr(weight_decay / 10))
    raw = ("--ema.decay", "0")  # the average is then the last weights, exactly
    every = [
        # the model's own k changes nothing: the same training as "all branches"
        *(
            Setting("k", f"k = {k}", {} if k == own else {"num_conv_branches": k})
            for k in range(1, 6)
        ),
        Setting("branches", "all branches"),
        Setting("branches", "no scale branch", {"use_scale": False}),
        Setting("branches", "no skip branch", {"use_skip": False}),
        Setting("branches", "no branches", _NONE),
        Setting("recipe", "baseline", {}, (*plain, *constant, *raw)),
        Setting("recipe", "+ progressive curriculum", {}, (*curriculum, *constant, *raw)),
        Setting("recipe", "+ weight-decay annealing", {}, (*curriculum, *annealed, *raw)),
        Setting("recipe", "+ EMA", {}, (*curriculum, *annealed)),
    ]
    return [setting for setting in every if setting.part in parts]


def study_ablation(
    output: str | Path = "ablation",
    config: str = "quickstart",
    epochs: int = 8,
    seeds: int = 3,
    parts: Sequence[Part] = PARTS,
    options: Sequence[str] = (),
) -> Result:
    """Train a network many times, shortly, and compare what its parts are worth.

    Each training is `mobileone fit` with the configuration and a few options more, validated once,
    at its end. Its result is a file that is written atomically: called again with the same
    arguments, the study continues where it was ended, and repeats the training that was cut off.

    Args:
        output: Holds cells/ (a file for each training) and runs/ (their run folders).
        config: Configuration file, or the name of a packaged one.
        epochs: Length of each training.
        seeds: Trainings of each setting, with `seed_everything` 0, 1, ….
        parts: `k` (Table 6), `branches` (Table 5), `recipe` (Table 8).
        options: Further options of `mobileone fit`, as on its command line; for example
            ["--data.root", "/path/to/images", "--model.model", "mobileone_s1"].

    Returns:
        A row for each setting: `part`, `setting`, `n`, `acc1_mean`, `acc1_std` (in percent, over
        the seeds; None for one), `loss_mean` (validation), `train_loss_mean`, `seconds_mean`, and
        the paper's accuracy of that line, `paper_model`, `paper_top1`, `paper_verified`. Another
        data set, so the paper's differences are worth a look, its values are not.

    Raises:
        ValueError: An argument is out of its range, or the folder holds another study's cells.
        SystemExit: The options cannot be used; the message has been printed.
    """
    if epochs < 1 or seeds < 1:
        raise ValueError(f"`epochs` (={epochs}) and `seeds` (={seeds}) must be at least 1")
    wrong = [part for part in parts if part not in PARTS]
    if wrong or not parts:
        raise ValueError(f"`parts` (={list(parts)}) must be of {', '.join(PARTS)}")
    directory = Path(output).expanduser().absolute()
    base = ("--config", config, *options)
    base += ("--trainer.max_epochs", str(epochs), "--trainer.check_val_every_n_epoch", str(epochs))
    base += ("--checkpoint.formats", "[torchscript]", "--checkpoint.background", "false")
    base += ("--wandb.group", f"ablation-{directory.name}")
    parsed = parse(base)
    model, size, decay = _subject(parsed)
    settings = ablation_settings(model, size, decay, parts)
    cells = Cells(directory / "cells", identity(parsed))
    plan = [(setting, seed) for seed in range(seeds) for setting in settings]
    for done, (setting, seed) in enumerate(plan, 1):
        if cells.read(setting.key(), seed) is None:
            print(f"{done}/{len(plan)}: {setting.part}, {setting.name}, seed {seed}", flush=True)
            cells.write(setting.key(), seed, _train(base, parsed, setting, seed, cells))
    how = {"config": config, "options": list(options), "epochs": epochs, "seeds": seeds}
    how |= {"model": model, "image_size": size, "statistic": "after the last epoch"}
    how["note"] = "The paper's numbers are of ImageNet and 300 epochs: compare differences at most."
    found = [
        [cells.read(setting.key(), seed) or {} for seed in range(seeds)] for setting in settings
    ]
    rows = [_row(*pair, model) for pair in zip(settings, found, strict=True)]
    return Result.new("ablation", how, rows)


def _recipe_phases(size: int) -> list[list[float]]:
    """The recipe's phases (first epoch of 300, pixels, strength), scaled to another image size."""
    recipe = yaml.safe_load(packaged_configs()[_RECIPE].read_text(encoding="utf-8"))
    full = recipe["data"]["input_size"]
    return [
        [epoch, max(1, round(pixels * size / full)), strength]
        for epoch, pixels, strength in recipe["curriculum"]["phases"]
    ]


def _subject(parsed: Mapping[str, Any]) -> tuple[str, int, float]:
    """Name of the model, height of its images, weight decay at the start."""
    arguments = parsed["model"]["init_args"]
    model = str(arguments["model"])
    size = resolve_config(model, parsed["data"]["init_args"]["input_size"])["input_size"][1]
    return model, int(size), float(arguments["weight_decay"])


def _train(
    base: Sequence[str], parsed: Mapping[str, Any], setting: Setting, seed: int, cells: Cells
) -> dict[str, float]:
    """One training, in a run folder that nobody has begun to fill."""
    argv = [*base, *setting.options, "--seed_everything", str(seed)]
    if setting.model_kwargs:
        kwargs = (parsed["model"]["init_args"]["model_kwargs"] or {}) | setting.model_kwargs
        argv += ["--model.model_kwargs", json.dumps(kwargs)]
    started = time.perf_counter()
    trainer = train(argv, cells.folder.parent / "runs", cells.path(setting.key(), seed).stem)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {
        "acc1": metrics["val/acc1"],
        "loss": metrics["val/loss"],
        "train_loss": metrics["train/loss_epoch"],
        "seconds": time.perf_counter() - started,
    }


def _row(setting: Setting, cells: Sequence[Mapping[str, float]], model: str) -> Row:
    accuracies = [100 * cell["acc1"] for cell in cells]
    return {
        "part": setting.part,
        "setting": setting.name,
        "n": len(cells),
        "acc1_mean": statistics.mean(accuracies),
        "acc1_std": statistics.stdev(accuracies) if len(cells) > 1 else None,
        "loss_mean": statistics.mean(cell["loss"] for cell in cells),
        "train_loss_mean": statistics.mean(cell["train_loss"] for cell in cells),
        "seconds_mean": statistics.mean(cell["seconds"] for cell in cells),
    } | _paper(setting, model)


def _paper(setting: Setting, model: str) -> Row:
    """The paper's line: of the same model if it has that, else of the first one it has."""
    table = paper_table({"k": 6, "branches": 5, "recipe": 8}[setting.part])
    name, top1 = "MobileOne-S2", None
    if setting.part == "recipe":
        top1 = {row["recipe"]: row["top1"] for row in table.rows}.get(setting.name)
    else:
        rows = [row for row in table.rows if row["build"] == model]
        rows = rows or [row for row in table.rows if row["build"] == table.rows[0]["build"]]
        name = rows[0]["model"]
        if setting.part == "k":
            top1 = next(row["top1"] for row in rows if setting.name == f"k = {row['k']}")
        elif column := {"all branches": "top1", "no branches": "top1_without"}.get(setting.name):
            top1 = rows[0][column]
    return {"paper_model": name, "paper_top1": top1, "paper_verified": table.verified}
