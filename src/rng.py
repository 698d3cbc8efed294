"""Random generators for everything random within an epoch.

Random numbers are drawn for all examples at once, from a generator seeded by (seed, epoch, purpose), and indexed by
the example's original index. They therefore do not depend on the batch order, on interruptions, or on the number of
workers or ranks, and a resumed run needs no generator states.
"""

from __future__ import annotations

import hashlib

import numpy as np

from src.lazy import torch


def derived_seed(seed: int, epoch: int, purpose: str) -> int:
    """Return the 63-bit seed for (seed, epoch, purpose)."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """Return a CPU generator seeded by (seed, epoch, purpose).

    Args:
        seed: The run's seed.
        epoch: The epoch, from 1; 0 for draws made once per run.
        purpose: What is drawn, for example ``"order"`` or ``"crop"``.

    Returns:
        A fresh ``torch.Generator`` on the CPU.
    """
    return torch.Generator().manual_seed(derived_seed(seed, epoch, purpose))


def numpy_generator(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    """Return a NumPy generator seeded by (seed, epoch, purpose)."""
    return np.random.default_rng(derived_seed(seed, epoch, purpose))
