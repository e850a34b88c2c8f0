"""The benchmark of the data covers every combination and says what binds a run."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from lightning_modules.cli.main import main
from lightning_modules.data.benchmark import benchmark_data

pytest.importorskip("webdataset", reason="needs the extra `shards`")

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
    assert result.images == 8
    combinations = {(row.reader, row.workers, row.decoder) for row in result.rows}
    assert len(combinations) == len(result.rows) == 3 * 2 * 2
    for row in result.rows:
        assert 0 < row.slowest <= row.images_per_second <= row.fastest
        assert row.cpu_ms > 0
    assert result.verdict.endswith("give --model for what training needs")
    assert not list(work.iterdir())


def test_verdict_compares_the_step_with_the_best_reader():
    result = benchmark_data(None, ("folder",), (0,), ("pillow",), 6, 3, 32, 1, "test_byobnet")
    assert result.model_images_per_second > 0
    step = replace(result, model_images_per_second=result.rows[0].images_per_second * 2)
    assert step.verdict.startswith("bound by data:")
    step = replace(result, model_images_per_second=result.rows[0].images_per_second / 2)
    assert step.verdict.startswith("bound by compute:")


def test_command_line(tmp_path, capsys):
    quick = "--readers [shards] --workers [0] --decoders [pillow] --images 4 --image_size 16"
    main(["benchmark", "data", *quick.split(), "--rounds", "1", "--directory", str(tmp_path)])
    assert "shards" in capsys.readouterr().out
    assert json.loads((tmp_path / "data.json").read_text())["rows"][0]["reader"] == "shards"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readers": ("zip",)}, "'zip' is unknown. There are folder, tar, shards"),
        ({"rounds": 0}, "rounds=0"),
        ({"decoders": ("x",)}, "'x' is unknown. There are pillow, torchvision"),
        ({"model": "mobileone_s9"}, "mobileone_s9"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        benchmark_data(**{"images": 1, **options})
