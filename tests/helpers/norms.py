"""BatchNorms as training leaves them."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["randomize_bn"]


def randomize_bn(model):
    """Draw the running statistics and affine terms of a model's BatchNorms; returns the model.

    On fresh ones a folding that drops the running mean or the affine terms would still pass.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model
