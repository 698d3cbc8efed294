"""What the experiments share, in parts that need no run."""

import weakref
from types import SimpleNamespace

import torch

from mpe.experiment import Experiment


def test_prepared_images_are_held_once():
    """No batch outlives the next: joined parts would stand beside the whole."""
    parts = [torch.randn(size, 1, 3, 3, dtype=torch.float64) for size in (4, 4, 1)]
    alive: list[weakref.ref] = []

    class Tracked:
        def __iter__(self):
            for part in parts:
                copy = part.clone()
                alive.append(weakref.ref(copy))
                yield SimpleNamespace(images=copy)
                del copy
                assert sum(held() is not None for held in alive) <= 1

    found = Experiment.prepared(SimpleNamespace(batches=lambda images, size: Tracked()), range(9))
    assert torch.equal(found, torch.cat(parts))
    assert found.dtype == torch.float64
