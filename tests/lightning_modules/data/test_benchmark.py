"""The benchmark of the data measures each number of workers and says what binds a run."""

import pytest
from PIL import Image

from lightning_modules.cli.main import main
from lightning_modules.data.benchmark import _verdict, benchmark_data
from lightning_modules.report.page import write_report
from mobileone.bench.results import Result

QUICK = {"batch_size": 3, "input_size": 32, "batches": 2, "rounds": 2}


@pytest.fixture
def images(tmp_path):
    for split, label in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        (tmp_path / split / label).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 30)).save(tmp_path / split / label / f"{number}.jpg")
    return str(tmp_path)


def test_every_number_of_workers_is_measured_and_the_verdict_compares_the_best(images):
    """Four images are fewer than a round takes: the next epoch follows."""
    result = benchmark_data(images, num_workers=(0, 1), model="test_byobnet", **QUICK)
    assert [(row["reader"], row["workers"]) for row in result.rows] == [
        ("folder", 0),
        ("folder", 1),
    ]
    for row in result.rows:
        assert 0 < row["slowest_images_per_s"] <= row["images_per_s"] <= row["fastest_images_per_s"]
    assert result.protocol["model_images_per_s"] > 0
    speed = max(row["images_per_s"] for row in result.rows)
    for step, bound in ((speed * 2, "data"), (speed / 2, "compute")):
        how = result.protocol | {"model_images_per_s": step}
        assert _verdict(how, result.rows).startswith(f"bound by {bound}:")


def test_command_line(images, tmp_path, capsys):
    quick = [f"--{name}={value}" for name, value in QUICK.items()]
    main(["benchmark", "data", "--root", images, *quick, "--workers", "[0]", "--output", images])
    assert "give --model for what training" in " ".join(capsys.readouterr().out.split())
    (row,) = Result.load(tmp_path / "data.json", "data").rows
    page = write_report(tmp_path).read_text()
    assert "Measured: data" in page and f"{row['images_per_s']:.4g}" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "root is not set"),
        ({"dataset": "zip"}, "dataset='zip' is unknown"),
        ({"rounds": 0}, "rounds=0"),
        ({"device": "cuda:99"}, "is not on this machine"),
        ({"dataset": "digits", "model": "mobileone_s9"}, "mobileone_s9"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        benchmark_data(**options)
