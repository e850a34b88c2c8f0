"""Whether two trainings ended the same, bit for bit."""

import torch


def differing(found, expected):
    """Names of what is not the same bit for bit in two of Lightning's checkpoints."""
    wrong = [
        f"{part}/{name}"
        for part in ("state_dict", "current_model_state")
        for name, value in expected[part].items()
        if not torch.equal(value, found[part][name])
    ]
    moments = [end["optimizer_states"][0]["state"] for end in (found, expected)]
    wrong += [
        f"{name} {index}"
        for index, state in moments[1].items()
        for name, value in state.items()
        if not torch.equal(value, moments[0][index][name])
    ]
    return wrong + [k for k in ("lr_schedulers", "global_step", "epoch") if found[k] != expected[k]]
