"""Flatness scores of a trained model, each in one pass over a data set: epsilon-flatness and input curvature.

Epsilon-flatness (``eps``): how far adaptive SAM would perturb the weights for a single example. The perturbation is
``e = rho * w^2 * g / (|| |w| * g || + 1e-12)`` for the gradient g of the example's loss (Kwon et al., "ASAM", ICML
2021, eq. for the perturbation with T_w = |w|). The score is ``||e||_2`` over all parameters, or ``rho * sqrt(sum w^4
g^2) / (sqrt(sum w^2 g^2) + 1e-12)``. Both sums use the same per-example gradients.

Input curvature (``flat``): how much the gradient of the loss with respect to an image changes along its sign. CURE
(Moosavi-Dezfooli et al., "Robustness via curvature regularization, and vice versa", CVPR 2019) in the form of
SLo-Curve (Garg and Roy, "Samples with low loss curvature improve data efficiency", CVPR 2023): ``s = sign(grad_x
l)``, ``z = (s + 1e-7) / (||s|| + 1e-7)``, ``gamma = || grad_x l(x + h z) - grad_x l(x) ||_2``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from src.lazy import torch
from src.metrics.score import Score

if TYPE_CHECKING:
    from torch import Tensor, nn

    from src.datasets import Batch


def example_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Per-example cross-entropy in float64, which keeps the loss of a confident prediction from rounding to zero.

    Args:
        outputs: (b, c) logits.
        labels: (b,).

    Returns:
        (b,) float64 losses, differentiable.
    """
    return torch.nn.functional.cross_entropy(outputs.double(), labels, reduction="none")


def scores_by_index(
    batches: Iterable[Batch], score: Callable[[Batch], Tensor], total: int | None, title: str, progress: bool
) -> np.ndarray:
    """Score every batch and store the values by original index.

    Args:
        batches: batches without augmentation.
        score: maps a batch to (b,) values.
        total: length of the result; None for ``batches.images.total``.
        title: the progress bar's label.
        progress: whether to show a progress bar.

    Returns:
        (total,) float64, NaN for examples in no batch.
    """
    length = batches.images.total if total is None else total
    scores = np.full(length, np.nan)
    for batch in tqdm(batches, desc=title, leave=False, disable=None if progress else True):
        if not len(batch.labels):  # a rank without examples
            continue
        scores[batch.indices.cpu().numpy()] = score(batch).to("cpu", torch.float64).numpy()
    return scores


FLOOR = 1e-12
"""The constant that SAM adds to the gradient norm."""


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
        model: the trained model; its train/eval modes are restored and no gradients are stored.
        batches: batches without augmentation, on the model's device.
        rho: radius of the perturbation.
        total: length of the result; None for the size of the full training set, ``batches.images.total``.
        memory_mb: upper limit on the per-example gradients in memory at a time, in MB.
        progress: whether to show a progress bar.

    Returns:
        (total,) float64 by original index, NaN for examples in no batch. An example with zero gradient scores 0.

    Raises:
        ValueError: no parameter requires a gradient, a BatchNorm layer has no running statistics, or the model mixes
            the examples of a batch.
    """
    from src.jacobians import SquaredNorms

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
    """Norm of the loss's gradient with respect to the logits, ``|| softmax(z) - onehot(y) ||_2``; (b,) float64."""
    onehot = labels.unsqueeze(-1) == torch.arange(outputs.shape[-1], device=outputs.device)
    return torch.linalg.vector_norm(outputs.detach().double().softmax(-1) - onehot.double(), dim=-1)


def _unit_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Losses divided by their error norms, which keeps the squares of tiny gradients from underflowing in float32."""
    return example_losses(outputs, labels) / _error_norms(outputs, labels).clamp_min(1e-300)


OFFSET = 1e-7
"""Added to the signs and to their norm."""
TRIED = 8
"""Number of examples used to check that the model processes examples independently."""


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
        model: the trained model; its train/eval modes are restored and no gradients are stored.
        batches: batches without augmentation, on the model's device.
        h: step length, in units of normalized pixels.
        total: length of the result; None for the size of the full training set, ``batches.images.total``.
        progress: whether to show a progress bar.

    Returns:
        (total,) float64 by original index, NaN for examples in no batch.

    Raises:
        ValueError: a BatchNorm layer has no running statistics, or the model mixes the examples of a batch.
    """
    from src.jacobians import refuse_batch_statistics
    from src.models.base import eval_mode

    tried = False
    with eval_mode(model):
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
    """Gradient of each example's loss with respect to its image; parameter gradients are not computed.

    Args:
        model: the model, in eval mode.
        images: (b, c, h, w).
        labels: (b,).
        check: whether to check, with two extra backward passes, that the model processes examples independently.

    Returns:
        (b, c, h, w).
    """
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        leaf = images.detach().requires_grad_()
        # clone: a model may start with an in-place operation, which autograd forbids on a leaf
        losses = example_losses(model(leaf.clone()), labels)
        if check:
            from src.jacobians import refuse_mixing

            refuse_mixing(losses.unsqueeze(0), leaf)
        (gradients,) = torch.autograd.grad(losses.sum(), leaf)
    return gradients


def _norms(values: Tensor) -> Tensor:
    """Norms (b, 1, 1, 1) over all axes except the first."""
    axes = tuple(range(1, values.ndim))
    return torch.linalg.vector_norm(values, dim=axes, keepdim=True)


END_SCORES = (
    Score(
        "eps",
        r"$\epsilon(x_i)$",
        "epsilon-flatness",
        source="end",
        folder="flatness",
        cost="SGD run + 1 pass",
        paper="SAMIS",
        compute=epsilon_flatness,
        passes=1,
        assumes_learned=True,
        seed_file="epsilon_flat_train.pkl",
    ),
    Score(
        "flat",
        r"$\gamma(x_i)$",
        "input curvature",
        source="end",
        folder="flatness",
        cost="SGD run + 2 passes",
        paper="Garg and Roy 2023",
        compute=input_curvature,
        passes=2,
        seed_file="hessian_flat_train.pkl",
    ),
)
