"""The sweep: what an agent of wandb would run is a training that works."""

from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from callbacks.artifacts.callback import ReparameterizeOnSave
from lightning_modules.cli.main import main

SWEEP = yaml.safe_load((Path(str(files("configs"))) / "sweep.yaml").read_text())
DRY = "--trainer.fast_dev_run true --trainer.accelerator cpu --data.input_size 32"


def agent_command(pick):
    """The words that wandb's agent runs, `${args}` filled in, with the values that `pick` takes."""
    values = {
        name: {"value": pick(option.get("values") or (option["min"], option["max"]))}
        for name, option in SWEEP["parameters"].items()
    }
    options = create_sweep_command_args({"args": values})["args"]
    filled = {"${env}": ["/usr/bin/env"], "${args}": options}
    words = create_sweep_command(list(SWEEP["command"]))
    return [part for word in words for part in filled.get(word, [word])]


@pytest.mark.parametrize("pick", [min, max])
def test_the_command_of_an_agent_trains(pick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env, program, *words = agent_command(pick)
    assert (env, program) == ("/usr/bin/env", "mobileone")
    main([*words, "--model.model", "mobileone_mu0", *DRY.split()])


def test_what_is_optimized_is_what_ranks_the_checkpoints():
    saver = ReparameterizeOnSave()
    assert SWEEP["metric"] == {"name": saver.monitor, "goal": f"{saver.mode}imize"}
