"""The trace of a matrix known by its products, from random probes, with its standard error."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from src.curvature.hessian import CurvatureOperator, dot
from src.curvature.lanczos import rademacher

LEAST_PROBES = 10
"""A standard error of fewer is not worth stopping for."""


@dataclass
class TraceEstimate:
    """Hutchinson's estimate: ``v^T H v`` averages to the trace over vectors v of random signs.

    Its variance is twice the sum of the squared off-diagonal entries, which the few largest eigenvalues dominate.
    Where Ritz vectors V near their eigenvectors are known, ``V^T v`` says what they add to each probe, without
    another product: the remainder ``u^T H u``, ``u = v - V V^T v``, plus the Ritz values' sum has the same mean and
    varies far less
    (the idea of Hutch++, Meyer et al. 2021, with vectors that are there already).

    Attributes:
        samples: ``v^T H v`` of each probe.
        deflated: The same with the known part taken exactly; empty where no vectors are known.
    """

    samples: list[float] = field(default_factory=list)
    deflated: list[float] = field(default_factory=list)

    @property
    def best(self) -> list[float]:
        """The samples that vary less."""
        return self.deflated or self.samples

    def is_done(self, probes: int, tolerance: float) -> bool:
        """Whether there are ``probes`` samples, or the standard error is within ``tolerance`` of the mean."""
        if len(self.samples) >= probes:
            return True
        if len(self.samples) < LEAST_PROBES:
            return False
        mean, error = mean_and_error(self.best)
        return error <= tolerance * abs(mean)


def mean_and_error(samples: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; NaN where there are too few samples."""
    count = len(samples)
    mean = float(np.mean(samples)) if count else float("nan")
    return mean, float(np.std(samples, ddof=1) / count**0.5) if count > 1 else float("nan")


def add_probe(
    estimate: TraceEstimate, operator: CurvatureOperator, seed: int, known: tuple[np.ndarray, Tensor] | None = None
) -> None:
    """Add the next probe's sample: one product.

    Args:
        estimate: Changed in place.
        operator: The matrix.
        seed: Seed of all probes; each has a generator of its own.
        known: Ritz values ``(m,)`` and their orthonormal vectors ``(m, P)``, converged or not.

    Raises:
        MeasurementError: The product is not finite.
    """
    probe = rademacher(operator.size, seed, len(estimate.samples), "trace").to(operator.device, operator.dtype)
    product = operator @ probe
    sample = dot(probe, product)
    estimate.samples.append(sample)
    if known is None:
        return
    values, vectors = known
    c, d = ((vectors @ x).double().cpu().numpy() for x in (probe, product))  # V^T v and V^T H v
    # u^T H u = v^T H v - 2 c^T (V^T H v) + c^T (V^T H V) c, and V^T H V is the diagonal of Ritz values
    estimate.deflated.append(float(sample - 2 * c @ d + c * c @ values + values.sum()))
