"""The images of highest loss are found over all batches."""

import torch

from callbacks.report.worst_images import WorstImages


def test_the_worst_of_all_batches_are_kept():
    logits, targets = torch.randn(40, 5), torch.randint(5, (40,))
    images = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 3, 2, 2)
    worst = WorstImages(7)
    for at in range(0, 40, 6):
        worst.add(images[at : at + 6], targets[at : at + 6], logits[at : at + 6])
    losses, kept, _, probabilities = worst.found()
    expected = -torch.log_softmax(logits, dim=1)[torch.arange(40), targets]
    order = expected.argsort(descending=True)[:7]
    assert torch.allclose(losses, expected[order])
    assert kept[:, 0, 0, 0].tolist() == order.tolist()
    assert torch.allclose(probabilities, logits.softmax(dim=1)[order])


def test_fewer_images_than_asked_for():
    worst = WorstImages(9)
    assert worst.found() is None
    worst.add(torch.zeros(2, 3, 2, 2), torch.tensor([0, 1]), torch.zeros(2, 4))
    assert len(worst.found()[0]) == 2
