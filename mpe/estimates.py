"""What would the network say about an example, had it not been trained on it? Closed forms, in float64.

With logits f, error ``e = p - onehot(y)``, covariance of the logits V, and ``Lambda = diag(p) - p p^T``
(Nickl et al. 2023, Eqs. 12, 13 and 15):

- ``diag``: ``df_c = V_cc e_c`` and ``dp_c = p_c (1 - p_c) V_cc e_c``, class by class, as the paper's experiments
  have it. It counts the variance of a shift of all logits, which no probability can see.
- ``full``: ``df = V e``, ``dp = Lambda V e``.
- ``woodbury``: one Newton step of the problem without the example, ``df = V (I - Lambda V)^-1 e``, exact for
  quadratic losses, and ``dp = softmax(f + df) - softmax(f)``. It holds where all eigenvalues of Lambda V are below 1,
  which the full GGN guarantees and its approximations do not; elsewhere ``full`` stands in.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from mpe.choices import CLASS_COVARIANCES
from mpe.predictions import EPS, Predictions, chunks, clamped_errors, clamped_nll, refuse_not_finite
from src.jacobians.ggn import root_of_softmax_covariance

log = logging.getLogger(__name__)

ENTRIES = 2**22
"""Numbers in a block of work, at most."""


@dataclass(frozen=True, eq=False)
class Estimates:
    """Estimated deviations of each example's outputs when it alone is left out of the training.

    Attributes:
        output_deviations: float64 (n, C), of the logits.
        probability_deviations: float64 (n, C).
        unstable: bool (n,), where ``woodbury`` does not hold and the first-order full form stands in.
    """

    output_deviations: Tensor
    probability_deviations: Tensor
    unstable: Tensor


def estimate(predictions: Predictions, class_cov: str = "diag", errors: Tensor | None = None) -> Estimates:
    """Estimate the deviations of all examples.

    Args:
        predictions: of n examples; ``full`` and ``woodbury`` need (n, C, C) variances, which serve ``diag`` too.
        class_cov: a name of ``CLASS_COVARIANCES``.
        errors: (n, C) in place of the prediction's own, for example `sampled_errors`. By default ``diag`` takes the
            clamped errors of the paper's experiments, the others the errors as they are, which sum to 0.

    Raises:
        ValueError: an unknown form, or one that needs covariances where there are only variances.
        MeasurementError: a deviation is not finite.
    """
    found = _estimate(predictions, class_cov, errors)
    refuse_not_finite(predictions.indices, found.output_deviations, found.probability_deviations)
    return found


def _estimate(predictions: Predictions, class_cov: str, errors: Tensor | None) -> Estimates:
    """The deviations, whatever they are."""
    if class_cov not in CLASS_COVARIANCES:
        raise ValueError(f"class_cov {class_cov!r} is not one of {', '.join(CLASS_COVARIANCES)}")
    p = predictions.probabilities
    stable = torch.zeros(len(predictions), dtype=torch.bool)
    if class_cov == "diag":
        shift = predictions.diagonal * (predictions.errors if errors is None else errors)
        return Estimates(shift, (p * (1.0 - p)).clamp(EPS, 1.0 - EPS) * shift, stable)
    if not predictions.full:
        raise ValueError(f"class_cov {class_cov!r} needs (n, C, C) covariances; predict with an engine of full=True")
    e = predictions.residuals if errors is None else errors
    shift = (predictions.variances @ e.unsqueeze(2)).squeeze(2)
    change = p * (shift - (p * shift).sum(1, keepdim=True))
    if class_cov == "full":
        return Estimates(shift, change, stable)
    unstable = stable
    for part in chunks(len(predictions), max(1, ENTRIES // p.shape[1] ** 2)):
        root = root_of_softmax_covariance(predictions.logits[part])
        found, largest = left_out_shift(predictions.variances[part], e[part], root)
        holds = largest < 1.0
        unstable[part] = ~holds
        shift[part] = torch.where(holds.unsqueeze(1), found, shift[part])
        moved = (predictions.logits[part] + shift[part]).softmax(1) - p[part]
        change[part] = torch.where(holds.unsqueeze(1), moved, change[part])
    if unstable.any():
        log.warning(
            "woodbury: Lambda V has an eigenvalue of 1 or more for %d of %d examples; for these the first-order "
            "full form stands",
            int(unstable.sum()),
            len(unstable),
        )
    return Estimates(shift, change, unstable)


def left_out_shift(variances: Tensor, errors: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """``V (I - Lambda V)^-1 e`` with ``Lambda = R^T R``: how outputs move when a Newton step leaves the example out.

    Computed as ``V (e + R^T (I - R V R^T)^-1 R V e)``, with a symmetric system. Exact for quadratic losses: with one
    output and ``Lambda = 1`` it is ``v e / (1 - v)``, the leave-one-out residual of ridge regression (PRESS).

    Args:
        variances: (n, C, C) V, symmetric.
        errors: (n, C) e, the loss's gradient by the outputs.
        root: (n, r, C) R.

    Returns:
        (n, C) shifts, 0 where they are not defined, and (n,) the largest eigenvalue of ``R V R^T`` (and of Lambda V),
        which must be below 1.
    """
    passed = root @ variances  # (n, r, C)
    inner = passed @ root.mT  # (n, r, r)
    inner = 0.5 * (inner + inner.mT)
    largest = torch.linalg.eigvalsh(inner)[:, -1]
    holds = (largest < 1.0).view(-1, 1, 1)
    system = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device) - torch.where(holds, inner, 0.0)
    e = errors.unsqueeze(2)
    solved = torch.linalg.solve(system, passed @ e)  # (n, r, 1)
    shift = variances @ (e + root.mT @ solved)
    return torch.where(holds, shift, 0.0).squeeze(2), largest


def sensitivity(estimates: Estimates) -> Tensor:
    """Float64 (n,): the L1 norm over classes of the estimated deviation of the probabilities (App. I.2)."""
    return estimates.probability_deviations.abs().sum(1)


def loo_losses(predictions: Predictions, estimates: Estimates, *, clamp: bool = True) -> Tensor:
    """Estimated leave-one-out losses ``-log softmax(f + df)[y]`` (Eq. 15; its mean is the experiments' LOO-NLL).

    Args:
        predictions: of n examples.
        estimates: of the same.
        clamp: whether a probability counts as 1e-10 at least, as in the paper's experiments.

    Returns:
        Float64 (n,).
    """
    moved = (predictions.logits + estimates.output_deviations).log_softmax(1)
    chosen = moved.gather(1, predictions.labels.unsqueeze(1)).squeeze(1)
    return clamped_nll(chosen) if clamp else -chosen


def sampled_errors(
    predictions: Predictions,
    *,
    samples: int = 150,
    generator: torch.Generator,
    chunk: int | None = None,
    correlated: bool = False,
) -> Tensor:
    """Errors of the mean probabilities over Gaussian samples of the logits: the expectation in Eq. 10, sampled.

    Args:
        predictions: of n examples.
        samples: how many for each example.
        generator: on the CPU. Every example draws ``samples * C`` numbers of its own, one example after the other.
        chunk: how many examples are worked on at a time; changes nothing but the memory.
        correlated: sample from the (C, C) covariances; by default each logit by itself, as the paper's experiments.

    Returns:
        Float64 (n, C): clamped like `Predictions.errors` by default, and as they are where correlated, so that they
        sum to 0 and nothing of what shifts all logits alike comes back through them.

    Raises:
        ValueError: no samples, or ``correlated`` without covariances.
    """
    if samples < 1 or (correlated and not predictions.full):
        raise ValueError(
            "sampled_errors needs (n, C, C) covariances to be correlated" if correlated else f"{samples} samples"
        )
    n, c = predictions.logits.shape
    found = torch.empty_like(predictions.logits)
    for part in chunks(n, chunk or max(1, ENTRIES // (samples * c))):
        noise = torch.empty(part.stop - part.start, samples, c, dtype=torch.float64)
        for own in noise:
            own.normal_(generator=generator)  # a draw of a fixed size: a larger one orders its numbers in another way
        if correlated:
            noise = noise @ _centred_root(predictions.variances[part])
        else:
            noise.mul_(predictions.diagonal[part].sqrt().unsqueeze(1))
        found[part] = noise.add_(predictions.logits[part].unsqueeze(1)).softmax(2).mean(1)
    found -= torch.nn.functional.one_hot(predictions.labels, c)
    return found if correlated else clamped_errors(found)


def _centred_root(variances: Tensor) -> Tensor:
    """Symmetric roots (n, C, C) of ``H V H`` with ``H = I - 11^T / C``: logits less their mean, the same softmax.

    Not a root of V itself, so that a variance of all logits alike changes no sample; and the symmetric one, which
    does not depend on the choice of eigenvectors.
    """
    centred = variances - variances.mean(1, keepdim=True)
    centred = centred - centred.mean(2, keepdim=True)
    values, vectors = torch.linalg.eigh(centred)
    return (vectors * values.clamp(min=0.0).sqrt().unsqueeze(1)) @ vectors.mT
