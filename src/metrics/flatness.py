"""Flatness scores of a trained model, one pass over a data set: epsilon-flatness and input curvature.

Epsilon-flatness (``eps``): how far adaptive SAM would move the weights for one example alone. ``e = rho * w^2 * g /
(|| |w| * g || + 1e-12)`` for the gradient g of the example's loss (Kwon et al., "ASAM", ICML 2021, eq. for the
perturbation with T_w = |w|); the score is ``||e||_2`` over all parameters, that is ``rho * sqrt(sum w^4 g^2) /
(sqrt(sum w^2 g^2) + 1e-12)``. Both sums come from the same per-example gradients.

Input curvature (``flat``): how much the loss's gradient at an image changes along its own sign. CURE
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
    """Cross-entropy of each example, in float64 so that the error of a confident output is not rounded away.

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
    """Score every batch and put the values at the examples' original positions.

    Args:
        batches: un-augmented batches.
        score: batch -> (b,) values.
        total: length of the result; None: ``batches.images.total``.
        title: the progress bar's label.
        progress: whether to show one.

    Returns:
        (total,) float64, NaN where no batch came by.
    """
    length = batches.images.total if total is None else total
    scores = np.full(length, np.nan)
    for batch in tqdm(batches, desc=title, leave=False, disable=None if progress else True):
        if not len(batch.labels):  # a rank without a share
            continue
        scores[batch.indices.cpu().numpy()] = score(batch).to("cpu", torch.float64).numpy()
    return scores


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
        model: the trained model; left in the modes it was in, without gradients.
        batches: un-augmented batches on the model's device.
        rho: radius of the perturbation.
        total: length of the result; None: the size of the full training set, ``batches.images.total``.
        memory_mb: how many MB of per-example gradients may be alive at a time.
        progress: whether to show a progress bar.

    Returns:
        (total,) float64 by original index, NaN where not visited. An example without gradient scores 0.

    Raises:
        ValueError: no parameter requires a gradient, a BatchNorm has no fixed statistics, or the model mixes the
            examples of a batch.
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
    """``|| softmax(z) - onehot(y) ||_2``, the norm of the loss's gradient at the logits; (b,) float64."""
    onehot = labels.unsqueeze(-1) == torch.arange(outputs.shape[-1], device=outputs.device)
    return torch.linalg.vector_norm(outputs.detach().double().softmax(-1) - onehot.double(), dim=-1)


def _unit_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Losses divided by their error's norm, so that squares of tiny gradients stay above float32's floor."""
    return example_losses(outputs, labels) / _error_norms(outputs, labels).clamp_min(1e-300)


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
        model: the trained model; left in the modes it was in, without gradients.
        batches: un-augmented batches on the model's device.
        h: length of the step, in units of the normalised pixels.
        total: length of the result; None: the size of the full training set, ``batches.images.total``.
        progress: whether to show a progress bar.

    Returns:
        (total,) float64 by original index, NaN where not visited.

    Raises:
        ValueError: a BatchNorm has no fixed statistics, or the model mixes the examples of a batch.
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
    """Gradient of each example's loss at its image; no gradient of a parameter is computed.

    Args:
        model: the model, in eval mode.
        images: (b, c, h, w).
        labels: (b,).
        check: whether to make sure, with two more backward passes, that the examples are independent.

    Returns:
        (b, c, h, w).
    """
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        leaf = images.detach().requires_grad_()
        # a copy: a model may open with an in-place operation, which a leaf does not allow
        losses = example_losses(model(leaf.clone()), labels)
        if check:
            from src.jacobians import refuse_mixing

            refuse_mixing(losses.unsqueeze(0), leaf)
        (gradients,) = torch.autograd.grad(losses.sum(), leaf)
    return gradients


def _norms(values: Tensor) -> Tensor:
    """(b, 1, 1, 1) norms over all axes but the first."""
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
        seed_file="hessian_flat_train.pkl",
    ),
)
