"""A small model for the tests of retraining and resuming."""

import numpy as np
import torch

from mpe.retraining import RetrainSettings, retrain
from src.models import build_model

N, CLASSES, SIZE = 22, 3, 5
REMOVED = [[], [4], [9], [0, 1, 2, 3, 5, 6, 7, 8], [21]]
SETTINGS = RetrainSettings(epochs=3, batch_size=4, learning_rate=0.1, lr_min=0.01, delta=2.0, seed=3)


def material(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    model = build_model("small_mlp", CLASSES, 1, SIZE, seed=0).to(dtype)
    return model, torch.randn(N, 1, SIZE, SIZE, generator=draw).to(dtype), torch.arange(N) % CLASSES


def logits_of(images):
    def measure(ensemble, numbers):
        assert len(ensemble) == len(numbers)
        return {"logits": ensemble.logits(images).numpy(), "number": np.array(numbers)}

    return measure


def run(settings=SETTINGS, *, removed=REMOVED, dtype=torch.float64, model=None, **kwargs):
    base, images, labels = material(dtype)
    kwargs = {"measure": logits_of(images), "chunk": 2, "save_seconds": 0.0, **kwargs}
    return retrain(model or base, images, labels, removed, settings, **kwargs)
