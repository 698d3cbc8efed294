"""Generators for everything random in an epoch.

A draw is made for all examples of a part at once and indexed by the example's original position, from a
generator seeded by (seed, epoch, purpose). So the order of batches, an interruption, and the number of
workers or ranks change nothing, and a resumed run needs no generator states.
"""

from __future__ import annotations

import hashlib

import numpy as np

from src.lazy import torch


def derived_seed(seed: int, epoch: int, purpose: str) -> int:
    """The 63-bit seed that belongs to (seed, epoch, purpose)."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by (seed, epoch, purpose).

    Args:
        seed: The run's seed.
        epoch: The epoch, from 1; 0 for draws that are made once.
        purpose: What is drawn, for example ``"order"`` or ``"crop"``.

    Returns:
        A fresh ``torch.Generator`` on the CPU.
    """
    return torch.Generator().manual_seed(derived_seed(seed, epoch, purpose))


def numpy_generator(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    """The same for numpy."""
    return np.random.default_rng(derived_seed(seed, epoch, purpose))
