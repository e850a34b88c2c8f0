"""Progressive learning, shown to act: sizes and magnitudes at every phase, in real trainings."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import LEVEL_TO_ARG, AugmentOp, RandAugment

from callbacks.curriculum import Curriculum
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.data.transforms import PhasedTransform, scale_strength
from tests.helpers.images import write_images
from tests.helpers.modules import Recorder
from tests.helpers.trainer import make_trainer

PAPER = [(0, 160, 0.3), (39, 192, 0.7), (114, 224, 1.0)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    four = {"cat": 4, "dog": 4}
    return write_images(tmp_path_factory.mktemp("images"), {"train": four, "val": four}, (48, 48))


def probe():
    """Records epoch, size and images of the training, and the sizes of the validation."""

    def look(module, batch):
        return module.current_epoch, batch[0].shape[-1], batch[0].clone()

    return Recorder(look)


def data_of(root, workers=0, **options):
    options = {"input_size": 32, "batch_size": 4, "num_workers": workers, **options}
    return ImageDataModule(str(root), model="mobileone_mu0", **options)


def train(root, folder, workers=0, ckpt_path=None, stop=None, **options):
    module, data = probe(), data_of(root, workers, **options)
    curriculum = Curriculum([(0, 16, 0.3), (100, 24, 0.7), (200, 32, 1.0)])
    trainer = make_trainer(folder, curriculum, max_epochs=6, limit_val_batches=1)
    if stop is not None:
        module.on_train_epoch_end = lambda: setattr(
            trainer, "should_stop", trainer.current_epoch + 1 >= stop
        )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer


EXPECTED = {0: 16, 1: 16, 2: 24, 3: 24, 4: 32, 5: 32}


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, False), (1, True)])
def test_every_phase_acts_in_training_and_not_in_validation(root, tmp_path, workers, persistent):
    module, _ = train(root, tmp_path, workers=workers, persistent_workers=persistent)
    assert {(epoch, size) for epoch, size, _ in module.trained} == set(EXPECTED.items())
    assert len(module.trained) == 12
    assert {size for _, size, _ in module.validated} == {32}


def test_resumed_run_continues_in_its_phase_with_the_same_images(root, tmp_path):
    options = {"auto_augment": "rand-m9-mstd0.5", "seed": 3}
    whole, _ = train(root, tmp_path / "whole", **options)
    _, trainer = train(root, tmp_path / "stopped", stop=3, **options)
    assert trainer.current_epoch == 3
    path = tmp_path / "stopped.ckpt"
    trainer.save_checkpoint(path)
    resumed, _ = train(root, tmp_path / "resumed", ckpt_path=path, **options)
    later = [entry for entry in whole.trained if entry[0] >= 3]
    assert [e[:2] for e in resumed.trained] == [e[:2] for e in later]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(resumed.trained, later, strict=True))


def test_a_data_module_that_ignores_its_curriculum_is_found_out(root, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageDataModule, "set_curriculum", lambda self, phases: None)
    monkeypatch.setattr(
        ImageDataModule,
        "_train_transform",
        PhasedTransform([(0, create_transform((3, 32, 32), is_training=True))]),
        raising=False,
    )
    with pytest.raises(RuntimeError, match="should train on 16 px, but the images are 32"):
        train(root, tmp_path)


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
def test_strength_scales_the_magnitudes_of_randaugment(root, strength):
    data = data_of(root, auto_augment="rand-m9-mstd0.5-inc1")
    data.set_curriculum([(0, 16, strength)])
    data.setup("fit")
    transform = data.train_dataloader().dataset.transform.at(0)
    ops = next(part.ops for part in transform.transforms if hasattr(part, "ops"))
    assert len(ops) == 15
    for op in ops:
        if op.name in ("AutoContrast", "Equalize", "Invert"):
            assert op.prob == pytest.approx(0.5 * strength)
        else:
            assert op.magnitude == pytest.approx(9 * strength)


@pytest.mark.parametrize("name", sorted(set(LEVEL_TO_ARG) - {"GaussianBlurRand"}))
def test_a_weaker_operation_changes_an_image_less(name):
    """Scaling a magnitude down would strengthen the operations that are weakest elsewhere."""
    ramp = np.linspace(0, 255, 32)  # smooth, so that moving further changes more
    pixels = np.stack(np.broadcast_arrays(ramp, ramp[:, None], ramp[::-1]), -1).astype(np.uint8)
    image = Image.fromarray(pixels)

    def distortion(op):
        op.prob, chance = 1.0, op.prob
        changed = [np.asarray(op(image)).astype(float) - pixels for _ in range(9)]
        return chance * np.mean([np.abs(c).mean() for c in changed])

    class Compose:
        def __init__(self, op):
            self.transforms = [RandAugment([op])]

    for magnitude in (3, 5, 9):
        built = Compose(AugmentOp(name, 0.5, magnitude, {"translate_const": 10}))
        steps = [distortion(scale_strength(built, s).transforms[0].ops[0]) for s in (0.1, 0.5, 1.0)]
        assert steps[0] <= steps[1] + 1e-9 <= steps[2] + 2e-9, (name, magnitude, steps)


def test_full_strength_changes_nothing():
    built = create_transform((3, 32, 32), is_training=True, auto_augment="original-mstd0.5")
    part = next(p for p in built.transforms if hasattr(p, "policy"))
    scaled = next(p for p in scale_strength(built, 1.0).transforms if hasattr(p, "policy"))
    assert [[vars(op) for op in sub] for sub in part.policy] == [
        [vars(op) for op in sub] for sub in scaled.policy
    ]


def test_phases_scale_with_the_length_of_the_training():
    curriculum = Curriculum(PAPER, epochs=300)
    assert curriculum.scaled(300) == PAPER
    assert curriculum.scaled(30) == [(0, 160, 0.3), (4, 192, 0.7), (11, 224, 1.0)]
    assert curriculum.scaled(1) == [(0, 224, 1.0)]  # an epoch that several phases claim: the last


@pytest.mark.parametrize(
    ("phases", "complaint"),
    [
        ([(1, 16, 1.0)], "begin with 0"),
        ([(0, 16, 1.0), (0, 24, 1.0)], "rise"),
        ([(0, 16, 1.0), (300, 24, 1.0)], "below `epochs`"),
        ([(0, 0, 1.0)], "at least 1 px"),
        ([(0, 16, 1.5)], r"in \[0, 1\]"),
    ],
)
def test_bad_phases_are_refused(phases, complaint):
    with pytest.raises(ValueError, match=complaint):
        Curriculum(phases)


def test_a_data_module_without_a_curriculum_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.datamodule = object()
    with pytest.raises(ValueError, match="needs a data module with `set_curriculum`"):
        Curriculum(PAPER).setup(trainer, probe(), "fit")
