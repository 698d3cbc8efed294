"""Data attribution with the Memory-Perturbation Equation: how each training example changes test predictions.

Removing example i changes the weights by ``S J_i^T e_i`` and the logits of a test example t by ``J_t S J_i^T e_i``:
the cross-covariance of the two examples' logits, times the error ``e_i = p_i - onehot(y_i)`` (Nickl et al. 2023,
Eqs. 10 and 12 for another example's output). ``J_i^T e_i`` is the gradient of the example's loss.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor, nn

from src.jacobians import Posterior, gradient_covariances


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
