"""Epsilon-flatness (``eps``): how far adaptive SAM would move the weights for one example alone.

``e = rho * w^2 * g / (|| |w| * g || + 1e-12)`` for the gradient g of the example's loss (Kwon et al., "ASAM", ICML
2021, eq. for the perturbation with T_w = |w|); the score is ``||e||_2`` over all parameters, that is
``rho * sqrt(sum w^4 g^2) / (sqrt(sum w^2 g^2) + 1e-12)``. Both sums come from the same per-example gradients.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from src.datasets import Batch
from src.jacobians import SquaredNorms
from src.metrics.by_index import example_losses, scores_by_index

FLOOR = 1e-12
"""What SAM adds to the gradient's norm."""


def epsilon_flatness(
    model: nn.Module,
    batches: Iterable[Batch],
    rho: float = 0.05,
    *,
    total: int | None = None,
    memory_mb: float = 256.0,
    progress: bool = False,
) -> np.ndarray:
    """Epsilon-flatness of every example, in eval mode, over the parameters that require a gradient.

    Args:
        model: the trained network; left in the modes it was in, without gradients.
        batches: un-augmented batches on the model's device.
        rho: radius of the perturbation.
        total: length of the result; None: that of the whole part, ``batches.images.total``.
        memory_mb: how many MB of per-example gradients may be alive at a time.
        progress: whether to show a progress bar.

    Returns:
        (total,) float64 by original index, NaN where not visited. An example without gradient scores 0.

    Raises:
        ValueError: no parameter requires a gradient, a BatchNorm has no fixed statistics, or the model mixes the
            examples of a batch.
    """
    with SquaredNorms(model, memory_mb) as squared_norms:

        def score(batch: Batch) -> Tensor:
            norms, outputs = squared_norms(batch.images, batch.labels, _unit_losses, (_square, _fourth_power))
            gradient, perturbation = norms[:, 0].sqrt() * _error_norms(outputs, batch.labels)
            return rho * perturbation / (gradient + FLOOR)

        return scores_by_index(batches, score, total, "epsilon-flatness", progress)


def _square(name: str, w: Tensor) -> Tensor:
    return w.square()


def _fourth_power(name: str, w: Tensor) -> Tensor:
    return w.square().square()


def _error_norms(outputs: Tensor, labels: Tensor) -> Tensor:
    """``|| softmax(z) - onehot(y) ||_2``, the norm of the loss's gradient at the logits; (b,) float64."""
    onehot = labels.unsqueeze(-1) == torch.arange(outputs.shape[-1], device=outputs.device)
    return torch.linalg.vector_norm(outputs.detach().double().softmax(-1) - onehot.double(), dim=-1)


def _unit_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Losses divided by their error's norm, so that squares of tiny gradients stay above float32's floor."""
    return example_losses(outputs, labels) / _error_norms(outputs, labels).clamp_min(1e-300)
