"""Help and completion: what they say, and that they are read from a cache without imports."""

import os
import shutil

import pytest

from lightning_modules.cli import help as cli_help
from lightning_modules.cli.commands import COMMANDS
from lightning_modules.cli.help import help_of, options_of
from lightning_modules.cli.main import main
from tests.helpers.processes import run_python

_HEAVY = ("torch", "lightning", "timm", "jsonargparse", "numpy", "mobileone")
_MAIN = "from lightning_modules.cli.main import main"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of this test's own, and the same terminal in all processes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def printed_help(capsys, *words):
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--help"])
    return capsys.readouterr().out


def imported(*words):
    """The text of a call in a process of its own, and the heavy packages that it has imported."""
    script = (
        f"import sys, atexit; {_MAIN}\n"
        f"atexit.register(lambda: print({{*{_HEAVY!r}}} & {{*sys.modules}}))\n"
        f"main({[*words]!r})"
    )
    said, _, names = run_python("-c", script).stdout.rstrip().rpartition("\n")
    return f"{said}\n", names


def test_help_that_was_made_before_imports_nothing(capsys):
    made = printed_help(capsys, "fit")
    assert "--model.label_smoothing" in made
    assert imported("fit", "--help") == (made, "set()")
    assert imported("fit", "-h") == (made, "set()")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["benchmark", "--help"]])
def test_what_the_table_tells_imports_nothing(words):
    assert imported(*words)[1] == "set()"


def test_the_first_help_lists_all_subcommands():
    said, _ = imported("--help")
    assert all(name in said for name in COMMANDS)


def test_help_is_made_again_when_the_code_the_packages_or_the_terminal_change(
    monkeypatch, tmp_path
):
    root = tmp_path / "code"
    (root / "callbacks").mkdir(parents=True)
    (root / "callbacks/a.py").write_text("")
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.setattr(cli_help, "_ROOT", root)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(packages))
    made = []

    def ask():
        help_of("fit", lambda: print(made.append(0) or "text"))
        return len(made)

    assert [ask(), ask()] == [1, 1]
    (root / "callbacks/a.py").write_text("x = 1")
    assert [ask(), ask()] == [2, 2]
    (root / "callbacks/b.py").write_text("")
    assert [ask(), ask()] == [3, 3]
    (packages / "lightning-9.dist-info").mkdir()
    os.utime(packages, ns=(1, 1))
    assert [ask(), ask()] == [4, 4]
    monkeypatch.setenv("COLUMNS", "60")
    assert [ask(), ask()] == [5, 5]


def test_a_cache_that_cannot_be_used_is_done_without(cache):
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    assert help_of("fit", lambda: print("text")) == "text\n"


def test_a_failure_is_not_kept():
    def fail():
        print("half of it")
        raise SystemExit(2)

    with pytest.raises(SystemExit):
        help_of("fit", fail)
    assert help_of("fit", lambda: print("text")) == "text\n"


def test_options_and_their_values_are_read_from_a_help():
    text = "  -h, --help  see --other\n  --a.b {x,y}\n  -c C, --config C\n  --n N, --n+ N  {no}\n"
    assert options_of(text) == {"--help": [], "--a.b": ["x", "y"], "--config": [], "--n": []}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mobileone ex", {"export"}),
        ("mobileone benchmark la", {"latency"}),
        ("mobileone fit --model.label", {"--model.label_smoothing"}),
        ("mobileone fit --trainer.max_epochs 3 --resume ", {"auto", "never"}),
        ("mobileone segment fit --trainer.max_e", {"--trainer.max_epochs"}),
        ("mobileone benchmark latency --runt", {"--runtimes"}),
        ("mobileone predict some.ckpt --top", {"--top_k"}),
        ("mobileone predict photos/some.c", {"photos/some.ckpt"}),
    ],
)
def test_tab_completion(line, expected, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/some.ckpt").touch()
    for name in ("fit", "segment fit", "benchmark latency", "predict"):
        if line.startswith(f"mobileone {name} "):
            printed_help(capsys, *name.split())  # in this process, where all is imported
    answer = tmp_path / "answer"
    environment = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    run_python("-c", f"{_MAIN}; main()", variables=environment, cwd=tmp_path)
    assert {word.strip() for word in answer.read_text().splitlines()} == expected


def test_a_user_without_a_home_gets_help(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", no_home)
    assert help_of("fit", lambda: print("text")) == "text\n"
