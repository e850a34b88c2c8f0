"""The measuring subcommands as a user meets them."""

import json
import subprocess
import sys
import time

import pytest

from lightning_modules.cli.main import main
from mobileone.bench.results import Result


def test_profile_prints_the_papers_row_and_saves_both_files(tmp_path, capsys):
    out = tmp_path / "profile.json"
    main(["profile", "mobileone_mu1", "--output", str(out)])
    shown = capsys.readouterr().out
    assert "139" in shown and "0.970" in shown
    assert Result.load(out).rows[0]["macs"] == pytest.approx(139e6, rel=0.01)
    assert (tmp_path / "profile.csv").read_text().startswith("model,level,name")


def test_latency_is_compared_with_an_earlier_result_of_this_machine_only(tmp_path, capsys):
    out = tmp_path / "latency.json"
    quick = ["benchmark", "latency", "mobileone_mu0", "--runtimes", "[eager]", "--runs", "2"]
    quick += ["--image_size", "32"]
    main([*quick, "--output", str(out)])
    assert capsys.readouterr().out.count("mobileone_mu0") == 1
    main([*quick, "--against", str(out)])
    assert "now / before" in capsys.readouterr().out
    other = json.loads(out.read_text())
    other["machine"]["machine_id"] = "elsewhere"
    out.write_text(json.dumps(other))
    with pytest.raises(SystemExit):
        main([*quick, "--against", str(out)])
    assert "different machines" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile"], "--suite paper"),
        (["profile", "mobileone_s0", "--output", "x.csv"], "must end in .json"),
        (["profile", "mobileone_s7"], "did you mean mobileone_s"),
        (["benchmark", "latency", "--suite", "2027"], "must be one of paper, 2026"),
        (["benchmark", "latency", "mobileone_s0", "--runtimes", "[x]"], "choose from eager"),
        (["benchmark", "latency", "mobileone_s0", "--against", "no.json"], "is not a file"),
        (["benchmark", "memory", "mobileone_s0", "--batch_sizes", "[0]"], "from 1 up"),
        (["benchmark", "pareto", "x", "--results", "[no.json]"], "is not a file"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_chart_of_the_paper_needs_no_measurement(tmp_path, capsys):
    main(["benchmark", "pareto", str(tmp_path / "figure")])
    assert "figure.png" in capsys.readouterr().out
    assert (tmp_path / "figure.svg").stat().st_size > 10_000


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from lightning_modules.cli.main import main; main(['--help']);"
        "heavy = {'torch', 'timm', 'matplotlib', 'jsonargparse'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    started = time.process_time()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "profile" in done.stdout and "benchmark" in done.stdout
    assert time.process_time() - started < 1
