"""Data attribution with the Memory-Perturbation Equation: how each training example changes test predictions.

Removing example i changes the weights by ``S J_i^T e_i`` and the logits of a test example t by ``J_t S J_i^T e_i``:
the cross-covariance of the two examples' logits, times the error ``e_i = p_i - onehot(y_i)`` (Nickl et al. 2023,
Eqs. 10 and 12 for another example's output). ``J_i^T e_i`` is the gradient of the example's loss.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mpe.posterior import chunks, laplace_posterior
from src.context import RunContext
from src.jacobians import Posterior, gradient_covariances

_BATCH = 250
_GRADIENTS = 2**31  # bytes of the test examples' gradients in memory at a time


def margins(outputs: Tensor, labels: Tensor) -> Tensor:
    """Log-odds of the label, ``log p_y - log(1 - p_y)`` (TRAK's output function), from logits (b, C); (b,)."""
    own = outputs.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = outputs.scatter(1, labels.unsqueeze(1), float("-inf"))
    return own - others.logsumexp(1)


def _losses(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels, reduction="none")


def predicted_contributions(
    model: nn.Module,
    posterior: Posterior,
    test: Iterable[Sequence[Tensor]],
    train: Iterable[Sequence[Tensor]],
    *,
    memory_mb: float = 256.0,
) -> np.ndarray:
    """Predict how much each training example contributes to the margin of each test example.

    Args:
        model: the model, at the posterior's mean; unchanged.
        posterior: the covariance S of its weights.
        test: batches ``(images, labels, ...)`` of t test examples; their margins' gradients are kept in memory.
        train: the same for n training examples.
        memory_mb: memory limit of temporary per-example gradients, in MiB.

    Returns:
        float64 (t, n), minus the predicted change of the margin if the training example were removed.
    """
    return -gradient_covariances(model, posterior, (test, margins), (train, _losses), memory_mb=memory_mb).numpy()


def contributions_from_checkpoint(
    context: RunContext, path: Path, chosen: np.ndarray, delta: float | None = None
) -> tuple[np.ndarray, float | None]:
    """Predict the contributions of all training examples with the Laplace posterior (KFAC) of a trained model.

    Args:
        context: device and data.
        path: checkpoint of a model trained on the full training set.
        chosen: indices (t,) of the test examples.
        delta: prior precision; None for the weight decay times the number of training examples, or 1 without it.

    Returns:
        The contributions, float64 (t, n), and the cost of training, GGN and gradients in epoch-equivalents (None if
        the checkpoint does not record its own).

    Raises:
        FileError: the checkpoint is damaged, or was not trained on this full training set.
    """
    model, state = context.load_model(path, subset=None, validation_split=None)
    n, classes = len(context.full_train), context.entry.num_classes
    if delta is None:
        delta = n * state["settings"].get("weight_decay", 0.0) or 1.0
    look = {"normalization": state["normalisation"]}
    train = context.batches(context.full_train, _BATCH, **look)
    posterior = laplace_posterior(model, train, delta, progress=True)
    assert isinstance(posterior, Posterior)  # KFAC
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    parts = [
        predicted_contributions(
            model,
            posterior,
            context.batches(context.test.subset(torch.from_numpy(chosen[part])), _BATCH, **look),
            train,
        )
        for part in chunks(len(chosen), max(1, _GRADIENTS // (2 * size)))
    ]
    passes = (1 + 2 * (classes - 1)) / 3 + len(parts) + len(chosen) / n
    return np.concatenate(parts), None if state.get("cost") is None else state["cost"] + passes
