"""The benchmark of the data covers every combination and says what binds a run."""

from dataclasses import replace

import pytest
from PIL import Image

from lightning_modules.cli.main import main
from lightning_modules.data.benchmark import benchmark_data, data_table, data_verdict
from lightning_modules.report.page import write_report
from mobileone.bench.results import Result

# timm's tar reader leaves its files open until they are collected
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_every_combination_is_measured(tmp_path):
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (40, 30)).save(tmp_path / "train" / label / f"{number}.jpg")
    work = tmp_path / "work"
    work.mkdir()
    result = benchmark_data(
        tmp_path, workers=(0, 1), images=8, batch_size=3, image_size=16, rounds=2, workspace=work
    )
    assert result.protocol["images"] == 8
    combinations = {tuple(row[key] for key in result.keys) for row in result.rows}
    assert len(combinations) == len(result.rows) == 3 * 2
    for row in result.rows:
        assert 0 < row["slowest_images_per_s"] <= row["images_per_s"] <= row["fastest_images_per_s"]
        assert row["cpu_ms"] > 0
    assert data_verdict(result).endswith("give --model for what training needs")
    assert not list(work.iterdir())


def test_verdict_compares_the_step_with_the_best_reader():
    result = benchmark_data(None, ("folder",), (0,), 6, 3, 32, 1, "test_byobnet")
    assert result.protocol["model_images_per_s"] > 0
    speed = result.rows[0]["images_per_s"]
    for step, bound in ((speed * 2, "data"), (speed / 2, "compute")):
        other = replace(result, protocol=result.protocol | {"model_images_per_s": step})
        assert data_table(other).caption.startswith(f"bound by {bound}:")


def test_command_line(tmp_path, capsys):
    quick = "--readers [shards] --workers [0] --images 4 --image_size 16"
    main(["benchmark", "data", *quick.split(), "--rounds", "1", "--output", str(tmp_path)])
    assert "give --model for what training" in " ".join(capsys.readouterr().out.split())
    (row,) = Result.load(tmp_path / "data.json", "data").rows
    assert row["reader"] == "shards"
    page = write_report(tmp_path).read_text()
    assert "Measured: data" in page and f"{row['images_per_s']:.4g}" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readers": ("zip",)}, "'zip' is unknown. There are folder, tar, shards"),
        ({"rounds": 0}, "rounds=0"),
        ({"model": "mobileone_s9"}, "mobileone_s9"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        benchmark_data(**{"images": 1, **options})
