"""What a batch holds, and the seeds that make it the same wherever it is made."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class BatchPlan(NamedTuple):
    """Which images form a batch, or one process's part of it, and the seed of their augmentation."""

    indices: Tensor
    seed: int
    first: int = 0
    """Place of this part's first image in the batch of all processes."""


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several small numbers, the same on every machine."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = ((state ^ (part + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9) % 2**64
        state ^= state >> 31
    return state >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch (CPU), and give them their old states back.

    An accelerator's generators are left alone: ``torch.manual_seed`` would seed them too.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (timm draws from it)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
