"""A run resumed in the middle of an epoch is the uninterrupted one, bit for bit."""

import hashlib

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.ema import EMA
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.data.samplers import EpochSampler
from lightning_modules.recipe.classifier import ImageClassifier

pytestmark = pytest.mark.filterwarnings(
    "ignore:Consider setting `persistent_workers=True`",
    "ignore:.*exists and is not empty",
    "ignore:The dirpath has changed",
    "ignore:.*callbacks used to create the checkpoint need to be provided",
    "ignore:.*treespec, LeafSpec.*:FutureWarning",  # inside Lightning 2.6
)

EVERY_VALIDATION = {"save_on_train_epoch_end": False}
EVERY_BATCH = {"every_n_train_steps": 1}


class Digests(Callback):
    """Remembers epoch, number and a digest of every training batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        data = batch[0].numpy().tobytes() + batch[1].numpy().tobytes()
        digest = hashlib.sha256(data).hexdigest()
        self.seen.append((trainer.current_epoch, batch_idx, digest))


class Plain(LightningModule):
    """Does not ask for the number of steps, so Lightning makes its loader late."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(root, folder, model, workers=0, ckpt_path=None, saving=EVERY_VALIDATION, **options):
    """Two epochs of five batches, validated and saved after two and four; what was seen."""
    data = ImageDataModule(
        str(root), batch_size=2, input_size=32, seed=3, num_workers=workers, vflip=0.5
    )
    digests = Digests()
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "val_check_interval": 2,
            "default_root_dir": folder,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                EMA(0.9),
                digests,
                ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **saving),
            ],
            **options,
        }
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "end.ckpt")
    return digests.seen, torch.load(folder / "end.ckpt", weights_only=True)


def classifier():
    torch.manual_seed(1)
    return ImageClassifier("test_byobnet", num_classes=2, lr=0.05, model_kwargs={"drop_rate": 0.5})


def assert_same(found, expected):
    """Weights, averaged and raw, and the optimizer's momentum."""
    for part in ("state_dict", "current_model_state"):
        assert found[part].keys() == expected[part].keys()
        different = [n for n, v in expected[part].items() if not torch.equal(v, found[part][n])]
        assert not different
    momenta = [end["optimizer_states"][0]["state"] for end in (found, expected)]
    assert momenta[0].keys() == momenta[1].keys()
    for index, state in momenta[0].items():
        assert torch.equal(state["momentum_buffer"], momenta[1][index]["momentum_buffer"])
    assert found["lr_schedulers"] == expected["lr_schedulers"]
    assert found["global_step"] == expected["global_step"] == 10


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
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
    seen, _ = fit(pets, tmp_path / "whole", Plain())
    path = tmp_path / "whole" / "step=2.ckpt"
    assert fit(pets, tmp_path / "rest", Plain(), ckpt_path=path)[0] == seen[2:]


def test_training_by_steps(pets, tmp_path):
    options = {"max_epochs": -1, "max_steps": 10}
    seen, end = fit(pets, tmp_path / "whole", classifier(), **options)
    path = tmp_path / "whole" / "step=7.ckpt"
    rest, resumed = fit(pets, tmp_path / "rest", classifier(), ckpt_path=path, **options)
    assert rest == seen[7:]
    assert_same(resumed, end)


def test_loader_made_anew_each_epoch(pets, tmp_path):
    options = {"reload_dataloaders_every_n_epochs": 1}
    seen, end = fit(pets, tmp_path / "whole", classifier(), **options)
    path = tmp_path / "whole" / "step=2.ckpt"
    rest, resumed = fit(pets, tmp_path / "rest", classifier(), ckpt_path=path, **options)
    assert rest == seen[2:]
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
