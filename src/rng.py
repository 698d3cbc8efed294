"""Random generators for everything random within an epoch.

Random numbers are drawn for all examples at once, from a generator seeded by (seed, epoch, purpose), and indexed by
the example's original index. They therefore do not depend on the batch order, on interruptions, or on the number of
workers or ranks, and a resumed run needs no generator states.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from src.lazy import torch


def derived_seed(seed: int, epoch: int, purpose: str) -> int:
    """Return the 63-bit seed for (seed, epoch, purpose)."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def global_generators(seed: int) -> Iterator[None]:
    """Seed the global CPU generators of torch, NumPy and Python, and restore their states afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


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
