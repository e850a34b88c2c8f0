"""Evaluation on several processes counts every image once."""

import json

import pytest
from torch.utils.data import SequentialSampler

from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.recipe.classifier import ImageClassifier
from tests.helpers.processes import run_program
from tests.helpers.ranks import on_rank
from tests.helpers.trainer import make_trainer


def module(root, **options):
    return ImageDataModule(
        str(root), **{"batch_size": 2, "input_size": 16, "num_workers": 0} | options
    )


@pytest.mark.parametrize("split", ["val", "test"])
def test_loaders_of_several_processes_share_the_images(make_folder, split):
    root = make_folder({"train": {"a": 6, "b": 6}, "val": {"a": 3, "b": 2}})
    targets = []
    for rank in (0, 1):
        data = on_rank(module(root), rank, 2)
        data.setup("validate" if split == "val" else "test")
        loader = getattr(data, f"{split}_dataloader")()
        targets.append([t for _, batch in loader for t in batch.tolist()])
    assert targets == [[0, 0, 1], [0, 1]]  # of the order 0 0 0 1 1
    alone = module(root)
    alone.setup("validate")
    assert isinstance(alone.val_dataloader().sampler, SequentialSampler)


def test_process_without_images_is_refused(pets):
    with pytest.raises(ValueError, match=r"val has 4 images for 5 processes.*--trainer\.devices"):
        on_rank(module(pets, batch_size=1), processes=5).setup("fit")


def test_batch_is_compared_with_the_share_of_one_process(pets):
    on_rank(module(pets, batch_size=5), processes=2).setup("fit")
    with pytest.raises(ValueError, match="batch_size=6 is larger than the 5 training images"):
        on_rank(module(pets, batch_size=6), processes=2).setup("fit")


@pytest.mark.parametrize(
    ("processes", "batch"), [(1, 2), (2, 3)], ids=["fewer processes", "larger batches"]
)
def test_other_shares_than_the_checkpoints_are_said(pets, processes, batch):
    """Within an epoch a step is no longer a place in it."""
    saved = on_rank(module(pets), processes=2).state_dict()
    on_rank(module(pets), processes=2).load_state_dict(saved)  # the same: no warning
    on_rank(module(pets), processes=2).load_state_dict(
        {"seed": saved["seed"]}
    )  # of before shares were kept
    with pytest.warns(
        UserWarning,
        match=r"made with 2 process\(es\) and batches of 2, this run has "
        rf"{processes} process\(es\) and batches of {batch}: .*come twice or are left out",
    ):
        on_rank(module(pets, batch_size=batch), processes=processes).load_state_dict(saved)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_metrics_of_two_processes_are_those_of_one(make_folder, tmp_path):
    """33 images in batches of 4: five batches for one process, four for the other."""
    root = make_folder({"train": {"a": 10, "b": 10}, "val": {"a": 20, "b": 13}})
    run_program("metrics_on_two_ranks.py", root, tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())

    model = ImageClassifier.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    (alone,) = make_trainer(tmp_path).test(
        model, module(root, batch_size=33, input_size=32), verbose=False
    )
    assert found.pop("confusion") == 33
    assert found["test/acc1"] == pytest.approx(alone["test/acc1"], abs=1e-6)
    assert found["test/loss"] == pytest.approx(alone["test/loss"], rel=1e-5)
    # buffers are the first process's in both, so the last validation while fitting agrees too
    assert (found["val/acc1"] * 33) == pytest.approx(round(found["val/acc1"] * 33), abs=1e-4)
