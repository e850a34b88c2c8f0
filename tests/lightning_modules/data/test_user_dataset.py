"""A dataset from a function of the user's own: treated as folders are, and checked early."""

import sys

import pytest
import torch

from lightning_modules.cli.main import main
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.errors import UnreadableImageError, UsageError
from mobileone.io.user_modules import import_user_modules
from tests.helpers.ranks import on_rank
from tests.helpers.user_data import LOCK


def module(root, function, stage="fit", **options):
    name = f"tests.helpers.user_data:{function}" if function else ""
    defaults = {"batch_size": 2, "input_size": 16, "num_workers": 0, "seed": 3}
    data = ImageDataModule(str(root), name, **{**defaults, **options})
    data.setup(stage)
    return data


def batches(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(first, second):
    return all(
        torch.equal(images, others) and torch.equal(targets, labels)
        for (images, targets), (others, labels) in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("function", ["make_paths", "make_images"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(pets, function, workers):
    """Order, augmentation and curriculum: bit for bit."""
    own, folder = (module(pets, name, num_workers=workers) for name in (function, None))
    for data in (own, folder):
        data.set_curriculum([(0, 8, 0.0), (1, 16, 1.0)])
    assert own.class_names == folder.class_names == ["cat", "dog"]
    for epoch in (0, 1):
        assert same(batches(own, epoch), batches(folder, epoch))
    assert same(list(own.val_dataloader()), list(folder.val_dataloader()))


def test_a_resumed_epoch_continues_where_it_stopped(pets):
    complete = batches(module(pets, "make_paths"))
    resumed = on_rank(module(pets, "make_paths"), batches_done=2)
    assert same(batches(resumed), complete[2:])


def test_a_lock_that_another_thread_holds_does_not_stop_the_workers(pets):
    """As one of the C library's, in a worker that was forked from this process, for ever."""
    data = module(pets, "make_locked", num_workers=1)
    batches_of_it = iter(data.train_dataloader())
    with LOCK:
        images, _ = next(batches_of_it)
    assert len(images) == 2


def test_workers_have_the_modules_of_imports(pets):
    import_user_modules(["tests.helpers.apple"])
    assert batches(module(pets, "make_of_imports", num_workers=1))


def test_workers_share_what_their_server_has_imported(pets):
    """All that reading needs, in memory that the garbage collector leaves alone."""
    assert batches(module(pets, "make_of_server", num_workers=1))


def test_a_data_set_that_no_worker_can_be_sent_is_refused(pets):
    data = module(pets, "make_local", num_workers=1)
    with pytest.raises(UsageError, match=r"Local.*top of a module.*--data\.num_workers 0"):
        batches(data)


def test_splits_must_have_the_same_classes(make_folder):
    root = make_folder({"train": {"a": 2, "b": 2}, "val": {"a": 1, "c": 1}})
    with pytest.raises(ValueError, match=r"val has classes .*'c'"):
        module(root, "make_paths")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:make", r"`data.dataset` names 'no_such_module'.*in the folder"),
        ("tests.helpers.user_data:make_path", r"make_path does not exist; did you mean make_paths"),
        ("tests.helpers.user_data:not_callable", "not_callable is not a function, but 3"),
        ("tests.helpers.user_data:make_without_split", r"does not take \(root, split\): too many"),
    ],
)
def test_a_function_that_is_not_there_is_refused_at_once(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(str(tmp_path), name)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "make_nothing",
            r"make_nothing\(root, 'train'\) returned a NoneType, which has no __len__",
        ),
        ("make_nameless", r"a list whose `classes` is None, not a list of names\. A function"),
        ("make_tensors", "sample 0 of .* has a Tensor as its image: leave transforms out"),
        ("make_text_labels", "has the label 'cat', and the 2 classes are numbered 0 to 1"),
        ("make_gone", r"has the image '.*gone\.png', which is not a file"),
    ],
)
def test_a_wrong_result_is_refused_before_training(pets, function, message):
    with pytest.raises(ValueError, match=message):
        module(pets, function)


def test_a_later_wrong_label_is_named_with_its_path(pets):
    data = module(pets, "make_late_error", skip_unreadable=True)
    with pytest.raises(UnreadableImageError, match=r"image 9 \(.*dog/3\.png\).*has the label 2"):
        batches(data)


def test_a_mistake_in_the_users_code_is_not_an_unreadable_image(pets):
    with pytest.raises(AttributeError, match="no_such_attribute"):
        batches(module(pets, "make_mistake", skip_unreadable=True))


def test_a_broken_image_is_named_or_skipped(pets):
    (pets / "val/cat/1.png").write_bytes(b"no image")
    data = module(pets, "make_paths")
    with pytest.raises(UnreadableImageError, match=r"cat/1\.png\) of tests.*not an image"):
        list(data.val_dataloader())
    with pytest.warns(UserWarning, match="1 unreadable images were replaced"):
        list(module(pets, "make_paths", skip_unreadable=True).val_dataloader())


def test_the_command_finds_a_module_of_the_current_folder(pets, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_pets.py").write_text(
        "from torchvision.datasets import ImageFolder\n\n\n"
        "def make_split(root, split):\n    return ImageFolder(root / split)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    options = "--model.model test_byobnet --data.batch_size 4 --data.input_size 32"
    quick = "--trainer.fast_dev_run true --trainer.accelerator cpu --data.num_workers 0"
    source = ["--data.dataset", "my_pets:make_split", "--data.root", str(pets)]
    main(["fit", *source, *options.split(), *quick.split()])
    assert "2 classes" in capsys.readouterr().out
    del sys.modules["my_pets"]
