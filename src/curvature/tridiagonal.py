"""What a Lanczos run's tridiagonal matrix T says: Ritz values, their residuals, and a quadrature of the spectrum.

Everything here is numpy in float64: the matrices have a few hundred rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal

from src.curvature.choices import ORDERS


class Tridiagonal(NamedTuple):
    """T after k steps: its diagonal ``alphas`` (k,), and ``betas`` (k,) beside it, whose last one leads out of T."""

    alphas: np.ndarray
    betas: np.ndarray


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenvalues, in the order that was asked for.

    Attributes:
        values: ``(m,)``.
        residuals: Norms ``|H x - value x|`` of their unit vectors x, ``(m,)``.
        weights: Columns ``(k, m)``: how each x is combined from the Lanczos vectors.
    """

    values: np.ndarray
    residuals: np.ndarray
    weights: np.ndarray

    def relative_residuals(self) -> np.ndarray:
        """Residuals over the absolute eigenvalues; infinite where only the eigenvalue is zero."""
        size = np.abs(self.values)
        return np.divide(self.residuals, size, out=np.where(self.residuals > 0, np.inf, 0.0), where=size > 0)

    def converged(self, tolerance: float) -> bool:
        """Whether every relative residual is within ``tolerance``."""
        return bool((self.relative_residuals() <= tolerance).all())


def ritz(matrix: Tridiagonal, count: int, order: str = "largest", *, ghosts_of: float | None = None) -> Ritz:
    """The first eigenvalues of T and their residuals ``beta_k |s_k|`` (s_k: last components of T's eigenvectors).

    Args:
        matrix: T.
        count: How many are wanted; there may be fewer.
        order: A name of ``ORDERS``.
        ghosts_of: Where the Lanczos vectors were not re-orthogonalised, the rounding unit of their arithmetic: copies
            of eigenvalues, and values that only rounding made, are then left out by Cullum and Willoughby's test
            ("Lanczos algorithms for large symmetric eigenvalue computations", 1985): a single eigenvalue of T that T
            without its first row and column has too is spurious; of several that agree one is kept.
    """
    values, vectors = eigh_tridiagonal(matrix.alphas, matrix.betas[:-1])
    residuals = matrix.betas[-1] * np.abs(vectors[-1])
    keep = np.arange(len(values))
    if ghosts_of is not None:
        keep = _without_ghosts(matrix, values, residuals, ghosts_of)
    keep = keep[np.argsort(ORDERS[order](values[keep]), kind="stable")][:count]
    return Ritz(values[keep], residuals[keep], vectors[:, keep])


def _without_ghosts(matrix: Tridiagonal, values: np.ndarray, residuals: np.ndarray, unit: float) -> np.ndarray:
    """Positions of the genuine ones among the ascending eigenvalues of T; of copies the most accurate."""
    k = len(values)
    if k == 1:
        return np.zeros(1, dtype=int)
    tolerance = 10 * unit * np.sqrt(k) * np.abs(values).max()
    groups = np.split(np.arange(k), 1 + np.flatnonzero(np.diff(values) > tolerance))
    other = eigvalsh_tridiagonal(matrix.alphas[1:], matrix.betas[1:-1])
    kept = []
    for group in groups:
        near = np.abs(other - values[group[0]]).min() <= tolerance
        if len(group) > 1 or not near:
            kept.append(group[residuals[group].argmin()])
    return np.array(kept, dtype=int)


def quadrature(matrix: Tridiagonal) -> tuple[np.ndarray, np.ndarray]:
    """Gauss quadrature of the spectrum as the start vector sees it (Golub and Meurant; Ubaru, Chen and Saad 2017).

    ``sum_j weights_j f(nodes_j)`` equals ``v^T f(H) v`` for every polynomial f of a degree below 2k, v being the
    unit start vector; its mean over random v is ``trace f(H) / P``.

    Args:
        matrix: T.

    Returns:
        Nodes (k,) ascending and weights (k,), non-negative and of sum 1.
    """
    nodes, vectors = eigh_tridiagonal(matrix.alphas, matrix.betas[:-1])
    weights = vectors[0] ** 2
    return nodes, weights / weights.sum()
