"""A whole training run: collapsed and branched training stay as close as rounding lets them."""

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from mobileone.collapsed import set_collapse

STEPS, BATCH = 200, 32


def digits():
    """The 1797 handwritten digits at 32 px: images (N, 3, 32, 32) and classes (N,)."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1), torch.tensor(
        data.target
    )


def train(mode, permuted=False):
    """Losses of 200 steps from one seed, and the accuracy on the digits held out.

    `permuted` turns the order of the images in every batch, which changes nothing but the order
    of the sums.
    """
    torch.manual_seed(0)
    model = timm.create_model("mobileone_mu1", num_classes=10)
    set_collapse(model, mode)
    images, classes = digits()
    order = torch.randperm(len(images))
    held_out, order = order[:297], order[297:]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        batch = order[torch.randint(len(order), (BATCH,))]
        if permuted:
            batch = batch.flip(0)
        loss = F.cross_entropy(model(images[batch]), classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        right = model.eval()(images[held_out]).argmax(1) == classes[held_out]
    return torch.tensor(losses), right.float().mean().item()


@pytest.mark.slow
def test_collapsed_training_is_the_same_training():
    losses, accuracy = train("never")
    permuted, permuted_accuracy = train("never", permuted=True)
    collapsed, collapsed_accuracy = train("auto")
    noise = (permuted - losses).abs()
    error = (collapsed - losses).abs()
    assert error[0] < 1e-5
    # a fresh network of this depth magnifies roundings: in float32 its first gradients, of either
    # form, are 3 % from float64's; the curves part as two orders of summation do, and not further
    assert error.mean() < 2 * noise.mean()
    assert abs(collapsed_accuracy - accuracy) <= abs(permuted_accuracy - accuracy) + 0.1
    assert collapsed_accuracy > 0.7
