"""A run resumed in the middle of an epoch is the uninterrupted one, bit for bit."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.ema import EMA
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.data.samplers import EpochSampler
from lightning_modules.recipe.classifier import ImageClassifier
from tests.helpers import trainer as helpers
from tests.helpers.bitwise import differing
from tests.helpers.modules import Recorder, digest
from tests.helpers.variants import slow

pytestmark = pytest.mark.filterwarnings(
    "ignore:Consider setting `persistent_workers=True`",
    "ignore:.*exists and is not empty",
    "ignore:The dirpath has changed",
    "ignore:.*callbacks used to create the checkpoint need to be provided",
)

EVERY_VALIDATION = {"save_on_train_epoch_end": False}
EVERY_BATCH = {"every_n_train_steps": 1}


class Digests(Callback):
    """Remembers epoch, number and a digest of every training batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch_idx, digest(batch)))


def fit(root, folder, model, workers=0, ckpt_path=None, saving=EVERY_VALIDATION, **options):
    """Two epochs of five batches, validated and saved after two and four; what was seen."""
    loading = {"batch_size": 2, "input_size": 32, "seed": 3, "num_workers": workers, "vflip": 0.5}
    data, digests = ImageDataModule(str(root), **loading), Digests()
    callbacks = EMA(0.9), digests, ModelCheckpoint(folder, "{step}", save_top_k=-1, **saving)
    options = {"max_epochs": 2, "val_check_interval": 2, "num_sanity_val_steps": 2, **options}
    trainer = helpers.fit(folder, model, data, *callbacks, ckpt_path=ckpt_path, **options)
    trainer.save_checkpoint(folder / "end.ckpt")
    return digests.seen, torch.load(folder / "end.ckpt", weights_only=True)


def classifier():
    torch.manual_seed(1)
    return ImageClassifier("test_byobnet", num_classes=2, lr=0.05, model_kwargs={"drop_rate": 0.5})


def assert_same(found, expected):
    """Weights, averaged and raw, the optimizer's momentum and the schedules."""
    assert not differing(found, expected)
    assert found["global_step"] == 10


@pytest.mark.parametrize("workers", [slow(0), 1])
@pytest.mark.parametrize(
    ("saving", "steps"), [(EVERY_VALIDATION, (2, 4, 7)), (EVERY_BATCH, (1, 5, 8))]
)
def test_classifier_goes_on_as_if_nothing_had_happened(pets, tmp_path, workers, saving, steps):
    seen, end = fit(pets, tmp_path / "whole", classifier(), workers, saving=saving)
    assert [(epoch, batch) for epoch, batch, _ in seen] == [
        (e, b) for e in (0, 1) for b in range(5)
    ]
    assert len({digest for *_, digest in seen}) == 10
    for step in steps:
        path = tmp_path / "whole" / f"step={step}.ckpt"
        rest, resumed = fit(pets, tmp_path / f"{step}", classifier(), workers, path, saving)
        assert rest == seen[step:]
        assert_same(resumed, end)


def test_module_whose_loader_is_made_late(pets, tmp_path):
    """Lightning makes it late where a module does not ask for the number of steps."""
    seen, _ = fit(pets, tmp_path / "whole", Recorder())
    path = tmp_path / "whole" / "step=2.ckpt"
    assert fit(pets, tmp_path / "rest", Recorder(), ckpt_path=path)[0] == seen[2:]


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (7, {"max_epochs": -1, "max_steps": 10}),
        (2, {"reload_dataloaders_every_n_epochs": 1}),
    ],
    ids=["training by steps", "a loader made anew each epoch"],
)
def test_other_ways_to_train(pets, tmp_path, step, options):
    seen, end = fit(pets, tmp_path / "whole", classifier(), **options)
    path = tmp_path / "whole" / f"step={step}.ckpt"
    rest, resumed = fit(pets, tmp_path / "rest", classifier(), ckpt_path=path, **options)
    assert rest == seen[step:]
    assert_same(resumed, end)


def test_interruption_within_a_batch_repeats_that_batch(pets, tmp_path):
    class Fails(ImageClassifier):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3:
                raise KeyError("power cut")
            return super().training_step(batch, batch_idx)

    seen, end = fit(pets, tmp_path / "whole", classifier())
    torch.manual_seed(1)
    model = Fails("test_byobnet", num_classes=2, lr=0.05, model_kwargs={"drop_rate": 0.5})
    saving = {**EVERY_VALIDATION, "save_on_exception": True}
    with pytest.raises(KeyError, match="power cut"):
        fit(pets, tmp_path / "cut", model, saving=saving)
    (path,) = (tmp_path / "cut").glob("*step=3*")
    rest, resumed = fit(pets, tmp_path / "rest", classifier(), ckpt_path=path)
    assert rest == seen[3:]
    assert_same(resumed, end)


def test_start_of_a_sampler_leaves_out_what_came_before():
    samplers = [EpochSampler(range(10), 0, num_replicas=2, rank=rank) for rank in (0, 1)]
    for sampler in samplers:
        whole = list(sampler)
        sampler.start = 2
        assert list(sampler) == whole[2:]
        assert len(sampler) == 5
