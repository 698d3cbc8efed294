"""Spectral densities: quadratures of a spectrum, drawn with a little width."""

from collections.abc import Sequence

import numpy as np

POINTS = 10_000
"""Least number of points of a grid."""
VARIANCE = 1e-5
"""Variance of the Gaussian at each node, where the spectrum's range is below 1; else times the range."""
MOST_POINTS = 1_000_000
"""Most points of a grid, however narrow a Gaussian and however wide the range."""
_PER_WIDTH = 4  # points of the grid per standard deviation, so that no node falls between two
_LEAST_WIDTH = 2  # steps of the grid to which narrower Gaussians are widened, for the same reason


def width(low: float, high: float, variance: float = VARIANCE) -> float:
    """Standard deviation of the Gaussians for a spectrum from ``low`` to ``high``."""
    return float(np.sqrt(variance * max(1.0, high - low)))


def grid(low: float, high: float, narrow: float, wide: float | None = None) -> np.ndarray:
    """Points over spectra and their Gaussians' tails.

    Args:
        low: The smallest eigenvalue.
        high: The largest.
        narrow: The smallest standard deviation of a Gaussian, which says how close points must be.
        wide: The largest, which says how far they must reach; default the same.
    """
    margin = max(0.01, 6 * (wide or narrow))
    low, high = low - margin, high + margin
    wanted = int(np.ceil(_PER_WIDTH * (high - low) / narrow)) + 1
    return np.linspace(low, high, min(max(POINTS, wanted), MOST_POINTS))


def extent(nodes: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean smallest and mean largest node of several quadratures."""
    return float(np.mean([min(run) for run in nodes])), float(np.mean([max(run) for run in nodes]))


def density(
    nodes: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], points: np.ndarray, sigma: float
) -> np.ndarray:
    """The mean over quadratures of Gaussians at their nodes, scaled to an area of 1.

    Args:
        nodes: Per quadrature (one per start vector) its nodes.
        weights: Their weights.
        points: Where the density is wanted, evenly spaced, ``(g,)``.
        sigma: Standard deviation of each Gaussian; at least two steps between points are taken.

    Returns:
        ``(g,)``.
    """
    sigma = max(sigma, _LEAST_WIDTH * (points[1] - points[0]))
    total = np.zeros(len(points))
    reach = 9 * sigma  # beyond it a Gaussian is below what is drawn
    for run_nodes, run_weights in zip(nodes, weights, strict=True):
        for node, weight in zip(run_nodes, run_weights, strict=True):
            part = slice(*np.searchsorted(points, [node - reach, node + reach]))
            total[part] += weight * np.exp(-0.5 * ((points[part] - node) / sigma) ** 2)
    area = total.sum() * (points[1] - points[0])
    return total / area if area > 0 else total


def moment(nodes: Sequence[float], weights: Sequence[float], power: int) -> float:
    """The quadrature of ``x ** power``."""
    return float(np.dot(weights, np.power(nodes, power)))
