"""Lists without brackets, and options by other names."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_modules.run.option_words import spell_out


@pytest.fixture
def parser():
    def command(
        names: Sequence[str] | None = None,
        metrics: Sequence[str] | Mapping[str, float] = (),
        mean: tuple[float, ...] | None = None,
        input_size: int | tuple[int, int, int] | None = None,
        images: str | Sequence[str] = "",
        num_workers: int = 0,
        head: type[torch.nn.Module] = torch.nn.Linear,
        trunk: torch.nn.Sequential | None = None,
    ) -> None:
        """Any."""

    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(command, "data", as_group=False)
    return parser


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--data.names onnx,coreml", "names", ["onnx", "coreml"]),
        ("--data.names=onnx,coreml", "names", ["onnx", "coreml"]),
        ("--data.names [onnx,coreml]", "names", ["onnx", "coreml"]),
        ("--data.names onnx", "names", ["onnx"]),
        ("--data.names null", "names", None),
        ("--data.names+ onnx", "names", ["onnx"]),
        ("--data.metrics F1Score", "metrics", ["F1Score"]),
        ('--data.metrics {"F1Score":1.0}', "metrics", {"F1Score": 1.0}),
        ("--data.mean 0.5,0.25", "mean", (0.5, 0.25)),
        ("--data.mean 0.5", "mean", (0.5,)),
        ("--data.input_size 1,32,32", "input_size", (1, 32, 32)),
        ("--data.input_size 32", "input_size", 32),
        ("--data.image_size 32", "input_size", 32),
        ("--data.size=32", "input_size", 32),
        ("--data.workers 2", "num_workers", 2),
        ("--data.images a,b.png", "images", "a,b.png"),
        ("--data.names yes,no", "names", ["yes", "no"]),
        ("--data.names photo[1].jpg,@b", "names", ["photo[1].jpg", "@b"]),
        ("--data.names 1,2", "names", ["1", "2"]),
        ("--data.mean=-0.5,0.25", "mean", (-0.5, 0.25)),
        ("--data.mean -0.5,0.25", "mean", (-0.5, 0.25)),
        ("--data.head torch.nn.Sequential", "head", torch.nn.Sequential),
    ],
)
def test_what_is_meant_is_taken(parser, words, name, value):
    found = parser.parse_args(spell_out(words.split(), parser))
    assert found.data[name] == value


def test_a_class_that_one_can_iterate_over_is_no_list(parser):
    words = ["--data.trunk", "torch.nn.Sequential"]
    assert spell_out(words, parser) == words


def test_a_name_that_the_command_has_stays_its_own():
    parser = ArgumentParser()
    parser.add_argument("--size", type=int)
    assert spell_out(["--size", "3"], parser) == ["--size", "3"]
    assert spell_out(["--input_size=3"], parser) == ["--size=3"]
    assert spell_out(["--other", "size"], parser) == ["--other", "size"]
