"""Random numbers that depend on what is drawn, not on who draws it."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch

__all__ = ["derive_seed", "isolated_rng", "resolve_seed"]


def derive_seed(*parts: int) -> int:
    """A 63-bit seed, a hash of ``parts``: neighbors such as (0, 1) and (1, 0) are unrelated."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def resolve_seed(*given: int | None) -> int:
    """The first seed that is given, else the run's (`seed_everything`), else 0."""
    known = [seed for seed in given if seed is not None]
    return known[0] if known else int(os.environ.get("PL_GLOBAL_SEED", 0))


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators for the block, then put them back.

    timm's augmentations draw from the first two, torchvision's from the third.
    """
    python_state, numpy_state, torch_state = (
        random.getstate(),
        np.random.get_state(),
        torch.default_generator.get_state(),
    )
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)
