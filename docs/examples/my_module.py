"""A loss; `mobileone fit --model my_module.Focal`."""

from torch.nn.functional import cross_entropy

from lightning_modules import ImageClassifier


class Focal(ImageClassifier):
    def __init__(self, *args, gamma: float = 2.0, **kwargs):
        super().__init__(*args, **kwargs)

    def make_loss(self):  # -> a function of logits and targets to the loss of each image (N,)
        gamma = self.hparams["gamma"]

        def focal(logits, targets):
            losses = cross_entropy(logits, targets, reduction="none")
            return (1 - (-losses).exp()) ** gamma * losses

        return focal
