"""Shards read by two processes with two workers each: every image once, also after a resume."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from lightning_modules.cli.main import main
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.recipe.classifier import ImageClassifier
from tests.helpers.processes import run_on_two_ranks
from tests.helpers.trainer import make_trainer


def write_images(root, count):
    """`count` training images and seven for validation, each in the color of its number."""
    for split, first, images in (("train", 1, count), ("val", 101, 7)):
        for number in range(first, first + images):
            folder = root / split / ("odd" if number % 2 else "even")
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 8), (number,) * 3).save(folder / f"{number:03d}.png")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What both ranks have seen: name -> [rank 0, rank 1]; and the folder."""
    out = tmp_path_factory.mktemp("two")
    for count in (24, 23):  # shards of 5 5 5 5 4 and 5 5 5 5 3 images, for four workers
        write_images(out / f"images-{count}", count)
        images, shards = str(out / f"images-{count}"), str(out / f"shards-{count}")
        main(["shards", images, shards, "--images_per_shard", "5"])
        assert len(list(Path(shards).glob("train-*.tar"))) == 5
    run_on_two_ranks("shards_on_two_ranks.py", out)
    names = ("even", "odd", "rest", "later")
    return {
        name: [json.loads((out / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        for name in names
    }, out


def trained(ranks, epoch):
    """The images of an epoch, of both ranks."""
    return Counter(n for rank in ranks for e, _, ns in rank["trained"] if e == epoch for n in ns)


@pytest.mark.slow
def test_every_training_image_once_an_epoch(runs):
    for epoch in (0, 1):
        assert trained(runs[0]["even"], epoch) == Counter(range(1, 25))
        for rank in runs[0]["even"]:
            assert [len(ns) for e, _, ns in rank["trained"] if e == epoch] == [5, 5, 2]
    orders = [[ns for e, _, ns in runs[0]["even"][0]["trained"] if e == epoch] for epoch in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.slow
def test_a_count_that_the_processes_cannot_share_repeats_one_image(runs):
    """Equally many steps on all ranks want 24 images of 23."""
    for epoch in (0, 1):
        counts = trained(runs[0]["odd"], epoch)
        assert set(counts) == set(range(1, 24))
        assert sorted(counts.values()) == [1] * 22 + [2]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("rest", 1), ("later", 5)])
def test_a_run_resumed_within_an_epoch_goes_on_with_the_images_not_yet_seen(runs, name, steps):
    """After the first of three steps of epoch 0, and after the second of epoch 1."""
    before = [rank["trained"][:steps] for rank in runs[0]["even"]]
    after = [rank["trained"] for rank in runs[0][name]]
    whole = [rank["trained"] for rank in runs[0]["even"]]
    assert [a + b for a, b in zip(before, after, strict=True)] == whole


@pytest.mark.slow
def test_validation_is_that_of_one_process_on_the_folder(runs):
    ranks, out = runs
    seen = [number for rank in ranks["even"] for number in rank["validated"]]
    assert sorted(seen) == list(range(101, 108))
    assert ranks["even"][0]["metrics"] == ranks["even"][1]["metrics"]
    alone = ImageDataModule(
        str(out / "images-24"), input_size=32, batch_size=7, num_workers=0, mean=(0.0,), std=(1.0,)
    )
    model = ImageClassifier.load_from_checkpoint(out / "even.ckpt", weights_only=True)
    (expected,) = make_trainer(out).validate(model, alone, verbose=False)
    for name in ("val/acc1", "val/loss"):
        assert ranks["even"][0]["metrics"][name] == pytest.approx(expected[name], rel=1e-5)
