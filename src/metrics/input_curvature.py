"""Input curvature (``flat``): how much the loss's gradient at an image turns along its own sign.

CURE (Moosavi-Dezfooli et al., "Robustness via curvature regularization, and vice versa", CVPR 2019) in the form of
SLo-Curve (Garg and Roy, "Samples with low loss curvature improve data efficiency", CVPR 2023):
``s = sign(grad_x l)``, ``z = (s + 1e-7) / (||s|| + 1e-7)``, ``gamma = || grad_x l(x + h z) - grad_x l(x) ||_2``.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from src.datasets import Batch
from src.jacobians import refuse_batch_statistics, refuse_mixing
from src.metrics.by_index import example_losses, scores_by_index
from src.models.modes import evaluating

OFFSET = 1e-7
"""Added to signs and to their norm."""
TRIED = 8
"""Examples on which it is tried whether the model keeps examples apart."""


def input_curvature(
    model: nn.Module,
    batches: Iterable[Batch],
    h: float = 3.0,
    *,
    total: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Input curvature of every example, in eval mode.

    Args:
        model: the trained network; left in the modes it was in, without gradients.
        batches: un-augmented batches on the model's device.
        h: length of the step, in units of the normalised pixels.
        total: length of the result; None: that of the whole part, ``batches.images.total``.
        progress: whether to show a progress bar.

    Returns:
        (total,) float64 by original index, NaN where not visited.

    Raises:
        ValueError: a BatchNorm has no fixed statistics, or the model mixes the examples of a batch.
    """
    tried = False
    with evaluating(model):
        refuse_batch_statistics(model)

        def score(batch: Batch) -> Tensor:
            nonlocal tried
            images, labels = batch.images.detach(), batch.labels
            if not tried and len(images) > 1:
                input_gradients(model, images[:TRIED], labels[:TRIED], check=True)
                tried = True
            before = input_gradients(model, images, labels)
            signs = before.sign()
            directions = (signs + OFFSET) / (_norms(signs) + OFFSET)
            after = input_gradients(model, images + h * directions, labels)
            return _norms(after.double() - before.double()).flatten()

        return scores_by_index(batches, score, total, "input curvature", progress)


def input_gradients(model: nn.Module, images: Tensor, labels: Tensor, check: bool = False) -> Tensor:
    """Gradient of each example's loss at its image; no gradient of a parameter is computed.

    Args:
        model: the network, in eval mode.
        images: (b, c, h, w).
        labels: (b,).
        check: whether to make sure, with two more backward passes, that the examples are independent.

    Returns:
        (b, c, h, w).
    """
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        leaf = images.detach().requires_grad_()
        # a copy: a network may open with an in-place operation, which a leaf does not allow
        losses = example_losses(model(leaf.clone()), labels)
        if check:
            refuse_mixing(losses.unsqueeze(0), leaf)
        (gradients,) = torch.autograd.grad(losses.sum(), leaf)
    return gradients


def _norms(values: Tensor) -> Tensor:
    """(b, 1, 1, 1) norms over all axes but the first."""
    axes = tuple(range(1, values.ndim))
    return torch.linalg.vector_norm(values, dim=axes, keepdim=True)
