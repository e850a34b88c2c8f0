"""Shards hold the images of a folder, and are read in exact epochs."""

import gc
import json
import shutil
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_modules.cli.main import main
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.data.samplers import SampleKey, ShardSampler
from lightning_modules.data.shards import writer
from lightning_modules.data.shards.reader import open_shards
from lightning_modules.data.shards.writer import make_shards
from lightning_modules.data.splits import open_split
from tests.helpers.ranks import on_rank

SPLITS = {"train": {"cat": 12, "dog": 11}, "val": {"cat": 4, "dog": 3}}


@pytest.fixture
def folder(make_folder):
    return make_folder(SPLITS, size=(9, 8))


@pytest.fixture
def shards(folder, tmp_path):
    make_shards(folder, tmp_path / "shards", images_per_shard=5)
    return tmp_path / "shards"


def module(root, rank=0, processes=1, **options):
    defaults = {"batch_size": 2, "input_size": 8, "num_workers": 0, "seed": 1, "dataset": "wds"}
    data = on_rank(ImageDataModule(str(root), **{**defaults, **options}), rank, processes)
    data.setup("fit")
    return data


def by_library(urls):
    """All samples of some shards, as the WebDataset library reads them."""
    webdataset = pytest.importorskip("webdataset", reason="needs the extra `shards`")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        gc.collect()
    return samples


def contents(root, split):
    """File contents and class names below a split of the folder."""
    return Counter((p.read_bytes(), p.parent.name) for p in (root / split).rglob("*.png"))


def files_of(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# --- what is written


def test_every_image_once_as_the_webdataset_library_reads_it(folder, shards):
    manifest = json.loads((shards / "_info.json").read_text())
    assert manifest["classes"] == ["cat", "dog"]
    for split, source in (("train", "train"), ("validation", "val")):
        described = manifest["splits"][split]
        urls = [str(shards / name) for name in described["filenames"]]
        samples = by_library(urls)
        found = Counter((s["png"], manifest["classes"][int(s["cls"])]) for s in samples)
        assert found == contents(folder, source)
        assert described["num_samples"] == sum(described["shard_lengths"]) == len(samples)
        for sample in samples:
            original = folder / source / json.loads(sample["json"])["filename"]
            assert original.read_bytes() == sample["png"]


def test_random_access_gives_the_same_as_the_library(shards):
    dataset = open_shards(shards, "train")
    urls = sorted(str(path) for path in shards.glob("train-*.tar"))
    samples = by_library(urls)
    assert len(dataset) == len(samples) == 23
    for index, sample in enumerate(samples):
        file, target = dataset.reader[index]
        assert (file.read(), target) == (sample["png"], int(sample["cls"]))


@pytest.mark.filterwarnings("ignore")
def test_timms_own_reader_understands_the_manifest(shards):
    from timm.data import create_dataset

    dataset = create_dataset("wds/", str(shards), split="validation", is_training=False)
    assert sorted(target for _, target in dataset) == [0] * 4 + [1] * 3
    del dataset
    gc.collect()  # it leaves its files open: have that warned about here and now


def test_training_images_are_mixed_and_validation_images_are_not(shards):
    first = [open_shards(shards, "train").reader[index][1] for index in range(5)]
    assert 0 < sum(first) < 5
    assert [open_shards(shards, "validation").reader[i][1] for i in range(7)] == [0] * 4 + [1] * 3


# --- where it is written


def test_a_stopped_run_leaves_no_folder_and_the_next_ends_with_the_same_bytes(
    folder, shards, tmp_path, monkeypatch
):
    add = writer._add

    def fail(tar, name, content):
        if name == "000000012.json":
            raise KeyboardInterrupt
        add(tar, name, content)

    monkeypatch.setattr(writer, "_add", fail)
    with pytest.raises(KeyboardInterrupt):
        make_shards(folder, tmp_path / "again", images_per_shard=6)
    assert not (tmp_path / "again").exists()
    assert len(list((tmp_path / "again.partial").glob("*.tar"))) == 3
    monkeypatch.setattr(writer, "_add", add)
    make_shards(folder, tmp_path / "again", images_per_shard=5)
    assert files_of(tmp_path / "again") == files_of(shards)
    assert not (tmp_path / "again.partial").exists()


def test_an_empty_current_folder_is_filled(folder, shards, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make_shards(folder, ".", images_per_shard=5)
    assert files_of(tmp_path / "here") == files_of(shards)


def test_folder_with_other_files_is_refused(folder):
    before = files_of(folder)
    with pytest.raises(FileExistsError, match="holds something: give a new"):
        make_shards(folder, folder)
    assert files_of(folder) == before


def test_images_per_shard_must_be_positive(folder, tmp_path):
    with pytest.raises(ValueError, match="images_per_shard=0"):
        make_shards(folder, tmp_path / "none", images_per_shard=0)


def test_classes_are_checked_before_anything_is_written(make_folder, tmp_path):
    root = make_folder({"train": {"a": 2, "b": 2}, "val": {"a": 2, "c": 1}})
    with pytest.raises(ValueError, match="'c'"):
        make_shards(root, tmp_path / "none")
    assert not list(tmp_path.glob("none*"))


# --- what is refused


def test_damage_is_named_before_training(shards):
    """Training does not read everything first: a flipped bit is found when it is decoded."""
    path = shards / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    (shards / "train-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"2 of .*: train-000001\.tar, train-000002\.tar"):
        module(shards)


def test_a_manifest_with_checksums_is_read(shards):
    """Shards of earlier versions have more keys."""
    path = shards / "_info.json"
    manifest = json.loads(path.read_text()) | {"plan": "0"}
    for split in manifest["splits"].values():
        split |= {"sha256": ["0"] * len(split["filenames"]), "index_sha256": "0"}
    path.write_text(json.dumps(manifest))
    assert sorted(t for _, batch in module(shards).val_dataloader() for t in batch.tolist())


def test_a_manifest_cannot_name_files_elsewhere(shards):
    path = shards / "_info.json"
    path.write_text(path.read_text().replace("train-000000.tar", "../train-000000.tar"))
    with pytest.raises(ValueError, match="leads elsewhere"):
        module(shards)


def test_command_line(folder, tmp_path, capsys):
    target = str(tmp_path / "out")
    main(["shards", str(folder), target, "--images_per_shard", "10"])
    assert "train: 23 images of 2 classes in 3 shards" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["shards", target])
    assert "required: destination" in capsys.readouterr().err


# --- reading them for training


def test_batches_are_those_of_the_folder(folder, shards):
    """The same images and classes, whatever the storage; validation in the same order."""
    data = module(shards)
    assert data.class_names == ["cat", "dog"]
    pairs = zip(data.val_dataloader(), module(folder, dataset="").val_dataloader(), strict=True)
    for (images, targets), (expected, labels) in pairs:
        assert torch.equal(images, expected)
        assert torch.equal(targets, labels)
    train = Counter(t for _, batch in data.train_dataloader() for t in batch.tolist())
    assert sum(train.values()) == 22  # the last incomplete batch is left out


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards, workers):
    alone, several = module(shards), module(shards, num_workers=workers)
    for (images, targets), (expected, labels) in zip(
        several.train_dataloader(), alone.train_dataloader(), strict=True
    ):
        assert torch.equal(images, expected)
        assert torch.equal(targets, labels)


@pytest.mark.parametrize(("processes", "workers"), [(2, 0), (3, 2)])
def test_every_validation_image_once_over_ranks_and_workers(shards, processes, workers):
    targets = []
    for rank in range(processes):
        data = module(shards, rank, processes, num_workers=workers)
        targets += [t for _, batch in data.val_dataloader() for t in batch.tolist()]
    assert sorted(targets) == [0] * 4 + [1] * 3


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_epochs_are_equally_long_and_complete(processes):
    lengths = [5, 5, 5, 5, 3]
    for epoch in (0, 1):
        shares = []
        for rank in range(processes):
            sampler = ShardSampler(range(23), lengths, 7, processes, rank, window=6)
            sampler.set_epoch(epoch)
            shares.append(list(sampler))
            assert len(sampler) == len(shares[-1])
        assert len({len(share) for share in shares}) == 1
        keys = [key for share in shares for key in share]
        assert {key.position for key in keys} == set(range(23))
        assert len(keys) - 23 < processes  # padding only
        assert {key.epoch for key in keys} == {epoch}


def test_order_changes_with_the_epoch_and_can_be_resumed():
    sampler = ShardSampler(range(40), [8] * 5, 3, window=16)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert [k.position for k in first] != [k.position for k in second]
    sampler.start = 7
    assert list(sampler) == second[7:]
    assert second[0] == SampleKey(1, second[0].position)


def test_shards_are_read_in_turn_and_each_process_reads_its_own():
    """With a window of two shards no more than three are open, and none comes back later."""
    lengths = [10] * 20
    shards_of = []
    for rank in (0, 1):
        order = [k.position // 10 for k in ShardSampler(range(200), lengths, 0, 2, rank, window=20)]
        for start in range(0, 100, 20):
            assert len(set(order[start : start + 20])) <= 2
        assert len({tuple(order[i : i + 10]) for i in range(0, 100, 10)}) == 10  # mixed within
        shards_of.append(set(order))
    assert not shards_of[0] & shards_of[1]


def test_unknown_split_lists_those_there_are(shards):
    with pytest.raises(ValueError, match=r"no split 'extra'.*train, validation"):
        open_split("wds", shards, "extra", None)


def test_broken_image_in_a_shard_is_named(folder, tmp_path):
    (folder / "val/cat/2.png").write_bytes(b"no image")
    make_shards(folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"000000002 in .*validation-000000\.tar"):
        list(module(tmp_path / "out").val_dataloader())


def test_training_from_the_command_line(folder, shards, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = "--model.model test_byobnet --data.batch_size 4 --data.input_size 32"
    quick = "--trainer.fast_dev_run true --trainer.accelerator cpu --data.num_workers 0"
    source = ["--data.dataset", "wds", "--data.root", str(shards)]
    main(["fit", *source, *options.split(), *quick.split()])
    assert "2 classes" in capsys.readouterr().out


def test_uppercase_and_jpeg_suffixes_are_those_that_timm_looks_for(tmp_path):
    root = tmp_path / "photos"
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(root / split / "a" / "x.JPEG")
    make_shards(root, tmp_path / "out")
    (sample,) = by_library([str(tmp_path / "out/train-000000.tar")])
    assert "jpg" in sample
    shutil.rmtree(root)  # the shards need it no more
    assert open_shards(tmp_path / "out", "train")[0][0].size == (4, 4)
