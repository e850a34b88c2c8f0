"""Every training batch is a function of (seed, epoch, position), proved with a real Trainer."""

import json
import pickle
import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.data.samplers import EpochSampler, SampleKey
from tests.helpers import trainer as helpers
from tests.helpers.modules import Recorder, digest
from tests.helpers.processes import run_program

LOADERS = [(0, False), (2, False), (2, True)]

pytestmark = pytest.mark.filterwarnings(
    "ignore:Consider setting `persistent_workers=True`",
    "ignore:.*exists and is not empty",
    "ignore:.*callbacks used to create the checkpoint need to be provided",
)


def module(root, workers=0, persistent=False, **options):
    defaults = {"batch_size": 4, "input_size": 16, "auto_augment": "rand-m9-mstd0.5", "seed": 3}
    return ImageDataModule(
        str(root),
        num_workers=workers,
        persistent_workers=persistent,
        **{**defaults, **options},
    )


def training_loader(data):
    data.setup("fit")
    return data.train_dataloader()


def fit(data, folder, epochs, *callbacks, **options):
    """Epoch and digest of each training batch."""
    recorder = Recorder(lambda module, batch: (module.current_epoch, digest(batch)))
    options = {"max_epochs": epochs, "num_sanity_val_steps": 2, **options}
    helpers.fit(folder, recorder, data, *callbacks, **options)
    return recorder.trained


@pytest.fixture
def uninterrupted(pets, tmp_path):
    """Digests of four epochs of two batches, read without workers."""
    seen = fit(module(pets), tmp_path, epochs=4)
    assert [epoch for epoch, _ in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({digest for _, digest in seen}) == 8  # every epoch has its own images
    return seen


# workers of either kind and a process without any, and both moments, once each
@pytest.mark.parametrize(
    ("workers", "persistent", "when"),
    [
        (0, False, "after validation"),
        (2, False, "after the training epoch"),
        (2, True, "after validation"),
    ],
)
def test_resumed_run_sees_the_batches_of_an_uninterrupted_one(
    pets, tmp_path, uninterrupted, workers, persistent, when
):
    checkpoint = ModelCheckpoint(
        tmp_path / "ckpt",
        filename="{epoch}",
        save_top_k=-1,
        save_on_train_epoch_end=when == "after the training epoch",
    )
    first = fit(module(pets, workers, persistent), tmp_path, 2, checkpoint)
    path = tmp_path / "ckpt" / "epoch=1.ckpt"
    second = fit(module(pets, workers, persistent), tmp_path, 4, ckpt_path=path)
    assert first + second == uninterrupted


@pytest.mark.parametrize(("workers", "persistent"), LOADERS[1:])
def test_number_of_workers_changes_nothing(pets, tmp_path, uninterrupted, workers, persistent):
    assert fit(module(pets, workers, persistent), tmp_path, epochs=4) == uninterrupted


def test_reloading_the_loader_and_no_sanity_check_change_nothing(pets, tmp_path, uninterrupted):
    options = {"reload_dataloaders_every_n_epochs": 1, "num_sanity_val_steps": 0}
    reloaded = fit(module(pets, 2, True), tmp_path, 4, **options)
    assert reloaded == uninterrupted


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_neither_matter_nor_move(pets, uninterrupted, workers):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    loader, before = training_loader(module(pets, workers)), state()
    batches = list(loader)
    assert state() == before
    assert digest(batches[0]) == uninterrupted[0][1]


def test_torch_flips_vary_with_image_and_epoch_but_not_with_the_global_seed(pets):
    options = {"auto_augment": None, "scale": (1, 1), "ratio": (1, 1), "hflip": 0.5}
    samples = training_loader(module(pets, **options)).dataset
    draws = []
    for seed in range(4):
        torch.manual_seed(seed)
        draws.append(
            [samples[SampleKey(epoch, 0)].image.sum(0)[0, 0].item() for epoch in range(12)]
        )
    assert draws[0] == draws[1] == draws[2] == draws[3]
    assert len(set(draws[0])) == 2  # the image and its mirror image


def test_seed_comes_from_the_checkpoint_unless_given(pets, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", filename="last")
    whole = fit(module(pets, seed=None), tmp_path, 2)
    fit(module(pets, seed=None), tmp_path, 1, checkpoint)
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    resumed = fit(module(pets, seed=None), tmp_path, 2, ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert resumed == whole[2:]
    with pytest.warns(UserWarning, match="data seed 5 differs from the checkpoint's 7"):
        other = fit(module(pets, seed=5), tmp_path, 2, ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert other != resumed


def test_seeds_and_epochs_are_not_interchangeable(pets):
    def order(seed, epoch):
        sampler = EpochSampler(range(100), seed)
        sampler.set_epoch(epoch)
        return [key.position for key in sampler]

    assert order(0, 1) != order(1, 0)
    assert sorted(order(0, 1)) == list(range(100))
    assert order(4, 2) == order(4, 2)


def test_ranks_share_the_images_out():
    samplers = [EpochSampler(range(10), seed=0, num_replicas=3, rank=rank) for rank in range(3)]
    for sampler in samplers:
        sampler.set_epoch(5)
    shares = [list(sampler) for sampler in samplers]
    assert [len(share) for share in shares] == [4, 4, 4] == [len(s) for s in samplers]
    positions = [key.position for share in shares for key in share]
    assert set(positions) == set(range(10))  # two of them twice, to make it even
    assert {key.epoch for share in shares for key in share} == {5}
    alone = EpochSampler(range(10), seed=0)
    alone.set_epoch(5)
    interleaved = [key.position for trio in zip(*shares, strict=True) for key in trio]
    assert interleaved[:10] == [key.position for key in alone]


def test_same_image_differs_between_epochs_but_not_between_reads(pets):
    samples = training_loader(module(pets)).dataset
    first = samples[SampleKey(0, 0)].image
    assert torch.equal(first, samples[SampleKey(0, 0)].image)
    assert not torch.equal(first, samples[SampleKey(1, 0)].image)
    assert torch.equal(first, samples[0].image)  # a plain index, from Lightning's own samplers


def test_loaders_survive_pickling(pets):
    samples = training_loader(module(pets)).dataset
    copy = pickle.loads(pickle.dumps(samples))
    assert torch.equal(copy[SampleKey(2, 1)].image, samples[SampleKey(2, 1)].image)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfit_batches_works(pets, tmp_path):
    seen = fit(module(pets), tmp_path, epochs=2, overfit_batches=1)
    assert len(seen) == 2
    assert seen[0][1] == seen[1][1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_see_every_image_once_an_epoch(make_folder, tmp_path):
    root = make_folder({"train": {"a": 4, "b": 4}, "val": {"a": 2, "b": 2}})
    run_program("images_of_two_ranks.py", root, tmp_path)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    loader = training_loader(module(root, batch_size=8, auto_augment=None))
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        expected = sorted(next(iter(loader))[0].sum((1, 2, 3)).tolist())
        found = sorted(v for rank in seen for e, *values in rank if e == epoch for v in values)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-2)
