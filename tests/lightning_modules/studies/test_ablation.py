"""The ablation study: what its settings are, that it resumes, and one real training."""

import json

import pytest
from rich.console import Console

from lightning_modules.studies import ablation
from lightning_modules.studies.ablation import (
    PARTS,
    ablation_settings,
    study_ablation,
)
from mobileone.bench.show.charts import bar_figure
from mobileone.bench.show.tables import result_table

TINY = [
    *("--model.model", "mobileone_mu0", "--model.warmup_epochs", "0"),
    *("--data.input_size", "32", "--data.num_workers", "0", "--report.samples", "0"),
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "2"),
]


@pytest.fixture
def trained(monkeypatch):
    """Replaces training by a record of it; the accuracy tells setting and seed."""
    calls = []

    def train(base, parsed, setting, seed, cells):
        calls.append((setting.name, seed))
        if len(calls) == getattr(train, "killed_at", None):
            raise KeyboardInterrupt
        accuracy = 0.5 + 0.1 * seed + 0.01 * setting.model_kwargs.get("num_conv_branches", 0)
        return {"acc1": accuracy, "loss": 1.0, "train_loss": 2.0, "seconds": 3.0}

    monkeypatch.setattr(ablation, "_train", train)
    train.calls = calls
    return train


def test_the_models_own_k_is_no_change():
    settings = {s.name: s for s in ablation_settings("mobileone_s0", 64, 1e-4, PARTS)}
    assert settings["k = 4"].key() == settings["all branches"].key()
    assert settings["k = 1"].model_kwargs == {"num_conv_branches": 1}
    assert len({s.key() for s in settings.values()}) == len(settings) - 1


def test_each_line_of_the_recipe_adds_one_thing():
    lines = ablation_settings("mobileone_s2", 224, 1e-4, ["recipe"])
    options = [dict(zip(s.options[::2], s.options[1::2], strict=True)) for s in lines]
    # epochs 0-38, 39-113 and 114-299, as in the public reproductions and the recipe's own file
    full = json.dumps([[0, 160, 0.3], [39, 192, 0.7], [114, 224, 1.0]])
    assert [o["--curriculum.phases"] for o in options] == ["[]", full, full, full]
    assert [float(o["--model.weight_decay_end"]) for o in options] == [1e-4, 1e-4, 1e-5, 1e-5]
    assert [o.get("--ema.decay") for o in options] == ["0", "0", "0", None]


def test_another_network_has_only_a_recipe():
    with pytest.raises(ValueError, match=r"`model` \(='repvgg_a0'\) has no k and no branches"):
        ablation_settings("repvgg_a0", 64, 1e-4, PARTS)
    assert len(ablation_settings("repvgg_a0", 64, 1e-4, ["recipe"])) == 4


def test_a_killed_study_goes_on(tmp_path, trained):
    trained.killed_at = 4
    with pytest.raises(KeyboardInterrupt):
        study_ablation(tmp_path, epochs=2, seeds=2, parts=["k"], options=TINY)
    assert len(list((tmp_path / "cells").iterdir())) == 3
    result = study_ablation(tmp_path, epochs=2, seeds=2, parts=["k"], options=TINY)
    # what was finished is not trained again, what was killed is
    assert (
        trained.calls[4:]
        == trained.calls[3:4] + [(f"k = {k}", seed) for seed in range(2) for k in range(1, 6)][4:]
    )
    rows = {row["setting"]: row for row in result.rows}
    assert rows["k = 1"]["acc1_mean"] == pytest.approx(56)  # 51 and 61
    assert rows["k = 1"]["acc1_std"] == pytest.approx(50**0.5)
    assert rows["k = 1"]["n"] == 2
    more = study_ablation(tmp_path, epochs=2, seeds=3, parts=["k"], options=TINY)
    assert len(trained.calls) == 4 + 7 + 5
    assert {row["n"] for row in more.rows} == {3}


def test_another_configuration_needs_another_folder(tmp_path, trained):
    study_ablation(tmp_path, epochs=2, seeds=1, parts=["recipe"], options=TINY)
    with pytest.raises(ValueError, match="another configuration"):
        study_ablation(tmp_path, epochs=3, seeds=1, parts=["recipe"], options=TINY)


def test_the_papers_lines_stand_beside(tmp_path, trained, capsys):
    options = [*TINY, "--model.model", "mobileone_s1"]
    result = study_ablation(tmp_path, epochs=2, seeds=1, options=options)
    rows = {(row["part"], row["setting"]): row for row in result.rows}
    assert rows["k", "k = 5"]["paper_top1"] == 75.2
    assert rows["branches", "no branches"]["paper_top1"] == 74.6
    assert rows["branches", "no skip branch"]["paper_top1"] is None
    assert rows["recipe", "+ EMA"]["paper_top1"] == 77.4
    assert {r["paper_model"] for r in result.rows if r["part"] == "recipe"} == {"MobileOne-S2"}
    assert rows["k", "k = 1"]["acc1_std"] is None
    capsys.readouterr()
    Console(width=200).print(result_table(result))
    lines = capsys.readouterr().out.splitlines()
    assert "unverified" in next(line for line in lines if "+ EMA" in line)
    assert "unverified" not in next(line for line in lines if "k = 5" in line)
    texts = [text.get_text() for axes in bar_figure(result).axes for text in axes.texts]
    assert "75.2" in texts and texts.count("–") == 2  # a scale or skip branch alone


def test_options_are_checked_before_anything_is_trained(tmp_path, trained, capsys):
    with pytest.raises(SystemExit):
        study_ablation(tmp_path, options=["--model.modle", "mobileone_s0"])
    assert "modle" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`parts`"):
        study_ablation(tmp_path, parts=["depth"])
    with pytest.raises(ValueError, match=r"`epochs` \(=0\)"):
        study_ablation(tmp_path, epochs=0)
    assert not trained.calls


def test_a_cell_is_a_fit(tmp_path, monkeypatch):
    chosen = ablation_settings("mobileone_mu0", 32, 1e-4, ["recipe", "branches"])
    chosen = [s for s in chosen if s.name in ("no branches", "+ progressive curriculum")]
    monkeypatch.setattr(ablation, "ablation_settings", lambda *_: chosen)
    result = study_ablation(tmp_path, epochs=1, seeds=1, options=TINY)
    assert [row["setting"] for row in result.rows] == [s.name for s in chosen]
    assert all(0 <= row["acc1_mean"] <= 100 for row in result.rows)
    # `latest` is a link
    runs = [path for path in tmp_path.glob("runs/*/*") if not path.is_symlink()]
    configs = [(path / "config.yaml").read_text() for path in runs]
    assert len(configs) == 2
    plain = next(text for text in configs if "use_skip: false" in text)
    other = next(text for text in configs if "use_skip: false" not in text)
    assert "num_conv_branches: 1" in plain
    assert "decay: 0.0" in other
    assert all(f"group: ablation-{tmp_path.name}" in text for text in configs)
    # a wandb run of its own for each
    assert [len(list(path.glob("wandb/offline-run-*/run-*.wandb"))) for path in runs] == [1, 1]
