"""Whether two trainings ended the same, bit for bit."""

import torch

_ABSENT = object()


def differing(found, expected):
    """Names of what is not the same bit for bit in two of Lightning's checkpoints."""
    wrong = [k for k in ("lr_schedulers", "global_step", "epoch") if found[k] != expected[k]]
    for part in ("state_dict", "current_model_state"):
        wrong += _unlike(part, found[part], expected[part])
    pairs = zip(found["optimizer_states"], expected["optimizer_states"], strict=True)
    for ours, theirs in pairs:
        assert theirs["state"], "the optimizer has no state to compare"
        wrong += _unlike("optimizer", _flat(ours), _flat(theirs))
    return wrong


def _flat(optimizer):
    states = optimizer["state"].items()
    return {f"{index}/{name}": value for index, s in states for name, value in s.items()}


def _unlike(part, found, expected):
    names = sorted(found.keys() | expected.keys())
    pairs = ((found.get(name, _ABSENT), expected.get(name, _ABSENT)) for name in names)
    return [f"{part}/{n}" for n, pair in zip(names, pairs, strict=True) if not _same(*pair)]


def _same(found, expected):
    if not (isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor)):
        return found is expected or bool(found == expected)
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (found, expected)]
    return torch.equal(*bits)
