"""Folders of checkpoints and their artifacts, as trainings of a `ScoredClassifier` leave them."""

import torch

from callbacks.artifacts.callback import ReparameterizeOnSave
from mobileone import MobileOneBlock
from mobileone.export import load_torchscript_artifact
from tests.helpers import trainer

__all__ = [
    "STEPS",
    "assert_artifact_is_of",
    "contents",
    "expected",
    "fit",
    "name",
    "outputs",
    "saver",
    "targets",
]

STEPS = 4  # training batches an epoch


def saver(folder, **options):
    """The callback that saves into a folder, with artifacts of TorchScript."""
    return ReparameterizeOnSave(**{"dirpath": str(folder), "formats": ["torchscript"], **options})


def fit(module, callback, folder, *, resume=None, callbacks=(), **options):
    """Train with the callback, or without checkpoints if it is None; returns the trainer."""
    callbacks = [*([callback] if callback else []), *callbacks]
    return trainer.fit(folder, module, None, *callbacks, ckpt_path=resume, **options)


def name(epoch):
    """The name that the files of an epoch have."""
    return f"epoch={epoch:03d}-step={(epoch + 1) * STEPS:06d}"


def contents(folder):
    return {p.name for p in folder.iterdir()}


def expected(*epochs):
    """The contents of a folder with checkpoints and artifacts of these epochs."""
    return {"last", "last.ckpt", "best", "best.ckpt"} | {
        f"{name(e)}{end}" for e in epochs for end in ("", ".ckpt")
    }


def targets(folder):
    """Each link and what it points to."""
    links = [p for p in folder.iterdir() if p.is_symlink()]
    return {link.name: str(link.readlink()) for link in links}


def outputs(module, x):
    with torch.no_grad():
        return module.eval()(x)


def assert_artifact_is_of(checkpoint):
    """The artifact's outputs are those of the checkpoint's branches, run one by one."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    block = MobileOneBlock(3, 8, stride=2, num_conv_branches=2).eval()
    block.load_state_dict({k[8:]: v for k, v in state.items() if k.startswith("model.0.")})
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        y = torch.relu(sum(branch(x) for branch in [*block.conv_kxk, block.conv_scale]))
        want = y.mean((2, 3)) @ state["model.3.weight"].T + state["model.3.bias"]
    artifact, manifest = load_torchscript_artifact(str(checkpoint).removesuffix(".ckpt"))
    assert torch.allclose(outputs(artifact, x), want, rtol=1e-4, atol=1e-5)
    assert manifest.training.checkpoint == checkpoint.name
