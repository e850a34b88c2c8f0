"""The measuring subcommands as a user meets them."""

import json
from pkgutil import resolve_name

import pytest

from lightning_modules.cli.commands import COMMANDS
from lightning_modules.cli.main import main
from mobileone.bench.results import KINDS, Result
from mobileone.bench.runtimes import RUNTIMES
from mobileone.bench.show.tables import change_table
from tests.helpers.command import error_of
from tests.helpers.paths import PROGRAMS


def test_profile_prints_the_papers_row_and_saves_both_files(tmp_path, capsys):
    main(["profile", "mobileone_mu1", "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "139" in shown and "969.70 k" in shown and "profile.json" in shown
    result = Result.load(tmp_path / "profile.json")
    assert result.rows[0]["macs"] == pytest.approx(139e6, rel=0.01)
    assert (tmp_path / "profile.csv").read_text().startswith("model,level,name")
    main(["profile", "mobileone_mu1", "--level", "stage"])
    shown = capsys.readouterr().out
    assert "stages.0" in shown and "stages.0.0" not in shown


def test_latency_is_compared_with_an_earlier_result_of_this_machine_only(tmp_path, capsys):
    out = tmp_path / "latency.json"
    quick = ["benchmark", "latency", "mobileone_mu0", "--runtimes", "[eager]", "--runs", "2"]
    quick += ["--input_size", "32"]
    main([*quick, "--output", str(tmp_path)])
    assert capsys.readouterr().out.count("mobileone_mu0") == 1
    main([*quick, "--against", str(out)])
    assert "now / before" in capsys.readouterr().out
    other = json.loads(out.read_text())
    other["machine"]["machine_id"] = "elsewhere"
    out.write_text(json.dumps(other))
    assert "different machines" in error_of(capsys, *quick, "--against", out)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_result_has_a_command_and_can_be_compared(kind):
    (command,) = (c for name, c in COMMANDS.items() if name.split()[-1].removeprefix("--") == kind)
    assert callable(resolve_name(command.function)) and callable(resolve_name(command.show))
    keys, statistic = KINDS[kind].keys, KINDS[kind].statistic
    row = dict.fromkeys(keys, "x") | {statistic or "min_ms": 2.0}
    before = Result.new(kind, {"statistic": "min_ms"}, [row])
    after = Result.new(kind, {"statistic": "min_ms"}, [row | {statistic or "min_ms": 3.0}])
    *_, ratio = change_table(before, after).columns
    assert list(ratio.cells) == ["1.5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile"], "--suite paper"),
        (["profile", "mobileone_s0", "--output", "results/x.json"], "give 'results'"),
        (["profile", "mobileone_s7"], "did you mean mobileone_s"),
        (["benchmark", "latency", "--suite", "2027"], "must be one of paper, 2026"),
        (["benchmark", "latency", "mobileone_s0", "--runtimes", "[x]"], "choose from eager"),
        (["benchmark", "latency", "mobileone_s0", "--against", "no.json"], "is not a file"),
        (["benchmark", "memory", "mobileone_s0", "--batch_sizes", "[0]"], "`batch_size` (=0)"),
        (["benchmark", "pareto", "--results", "[no.json]"], "is not a file"),
        (["benchmark", "latency", "mobileone_s0", "--runtimes", "eager,x"], "choose from eager"),
        (["benchmark", "latency", "mobileone_s0", "--size", "0"], "`input_size` (=0)"),
        (["benchmark", "latncy"], "unknown subcommand 'benchmark latncy'; choose one of: latency"),
        (["profile", "mobileone_s0", "--imports", "[no_such_module]"], "'no_such_module'"),
    ],
)
def test_mistakes_are_reported_before_anything_is_measured(arguments, message, capsys):
    assert message in error_of(capsys, *arguments)


def test_an_earlier_result_must_be_of_the_same_kind(tmp_path, capsys):
    Result.new("profile", {}, []).save_all(tmp_path)
    said = error_of(capsys, "benchmark", "latency", "x", "--against", tmp_path / "profile.json")
    assert "is a result of 'profile', not of 'latency'" in said


def test_the_chart_of_the_paper_needs_no_measurement(tmp_path, capsys):
    main(["benchmark", "pareto", "--output", str(tmp_path / "figures")])
    assert "pareto.png" in capsys.readouterr().out
    assert (tmp_path / "figures/pareto.svg").stat().st_size > 10_000


def test_a_group_lists_its_subcommands(capsys):
    main(["benchmark", "--help"])
    shown = capsys.readouterr().out
    assert "benchmark latency" in shown and "study" not in shown


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.show])
def test_every_command_takes_modules_of_the_users_own(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--imports" in shown
    assert f"Example: mobileone {name}" in " ".join(shown.split())


def test_a_runtime_of_the_users_own_is_measured_by_all(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(PROGRAMS)
    monkeypatch.setattr("mobileone.io.user_modules._imported", {})
    options = ["test_byobnet", "--imports", "[my_runtimes]", "--input_size", "32"]
    try:
        for kind, more in (("latency", ["--runs", "1"]), ("memory", [])):
            command = ["benchmark", kind, *options, *more, "--runtimes", "[mine]"]
            main([*command, "--output", str(tmp_path)])
            (mine,) = Result.load(tmp_path / f"{kind}.json").rows
            assert mine["runtime"] == "mine" and mine["failure"] is None
            number = "min_ms" if kind == "latency" else "peak_mib"
            assert mine[number] > 0
    finally:
        RUNTIMES.pop("mine", None)
