"""Figures of loss geometry: spectral densities with the largest eigenvalues, and velocities of tangent kernels.

A density is a sum of narrow Gaussians at the nodes of a Gauss quadrature, with its weights (Ghorbani et al. 2019).
"""

import itertools
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from src.curvature.results import SpectrumGroup, Velocities
from src.formatting import FIGURE_GRID, FIGURE_STYLE

_FLOOR = 1e-7
"""Added to densities to bound their logarithm from below."""
_COLORS = ("#c0392b", "#1f4e79", "#2e8b57", "#b8860b", "#6a4c93", "#444444")

_LEAST_POINTS = 10_000  # minimum grid size
_VARIANCE = 1e-5  # variance of the Gaussian at each node, times the spectrum's range if that exceeds 1
MOST_POINTS = 1_000_000
"""Maximum grid size, for any Gaussian width and spectrum range."""
_PER_WIDTH = 4  # grid points per standard deviation, so that no node is missed between two points
_LEAST_WIDTH = 2  # minimum standard deviation in grid steps, for the same reason


def width(low: float, high: float) -> float:
    """Standard deviation of the Gaussians for a spectrum from ``low`` to ``high``."""
    return float(np.sqrt(_VARIANCE * max(1.0, high - low)))


def grid(low: float, high: float, narrow: float, wide: float | None = None) -> np.ndarray:
    """Evenly spaced points that cover the spectra and their Gaussians' tails.

    Args:
        low: The smallest eigenvalue.
        high: The largest eigenvalue.
        narrow: The smallest standard deviation of a Gaussian, which determines the spacing.
        wide: The largest standard deviation, which determines the margin; ``narrow`` by default.
    """
    margin = max(0.01, 6 * (wide or narrow))
    low, high = low - margin, high + margin
    wanted = int(np.ceil(_PER_WIDTH * (high - low) / narrow)) + 1
    return np.linspace(low, high, min(max(_LEAST_POINTS, wanted), MOST_POINTS))


def extent(nodes: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean smallest and mean largest node of several quadratures."""
    return float(np.mean([min(run) for run in nodes])), float(np.mean([max(run) for run in nodes]))


def spectral_density(
    nodes: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], points: np.ndarray, sigma: float
) -> np.ndarray:
    """Average over quadratures of Gaussians at their nodes, normalized to area 1.

    Args:
        nodes: The nodes of each quadrature (one per start vector).
        weights: Their weights.
        points: Evenly spaced points at which to evaluate the density, ``(g,)``.
        sigma: Standard deviation of each Gaussian; at least two grid steps.

    Returns:
        ``(g,)``.
    """
    sigma = max(sigma, _LEAST_WIDTH * (points[1] - points[0]))
    total = np.zeros(len(points))
    reach = 9 * sigma  # beyond this, a Gaussian is too small to be visible
    for run_nodes, run_weights in zip(nodes, weights, strict=True):
        for node, weight in zip(run_nodes, run_weights, strict=True):
            part = slice(*np.searchsorted(points, [node - reach, node + reach]))
            total[part] += weight * np.exp(-0.5 * ((points[part] - node) / sigma) ** 2)
    area = total.sum() * (points[1] - points[0])
    return total / area if area > 0 else total


def spectrum_figure(groups: Sequence[SpectrumGroup], title: str) -> Figure:
    """Plot densities on a logarithmic axis, one panel per kind of run, with shared axes.

    Args:
        groups: One per panel. The mean over its seeds is filled; dashed lines mark each seed's largest eigenvalue.
        title: What was measured.
    """
    spectra = [spectrum for group in groups for spectrum in group.spectra]
    ranges = [extent(spectrum.nodes) for spectrum in spectra]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    widths = [width(*r) for r in ranges]
    points = grid(low, high, min(widths), max(widths))
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(9, 1.1 + 2.5 * len(groups)), layout="constrained")
        figure.suptitle(title, fontsize=16)
        panels = figure.subplots(len(groups), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, group, color in zip(panels, groups, itertools.cycle(_COLORS), strict=False):
            densities = [
                spectral_density(spectrum.nodes, spectrum.weights, points, width(*extent(spectrum.nodes)))
                for spectrum in group.spectra
            ]
            x, mean = _thin(points, np.mean(densities, axis=0) + _FLOOR)
            axes.fill_between(x, _FLOOR, mean, color=color, alpha=0.35, lw=0)
            axes.plot(x, mean, color=color, lw=1.1)
            tops = np.array([spectrum.eigenvalues[0] for spectrum in group.spectra])
            for top in tops:
                axes.axvline(top, ymax=0.6, color=color, lw=1.2, ls=(0, (4, 3)), zorder=1)
            traces = np.array([spectrum.trace for spectrum in group.spectra])
            text = rf"$\lambda_1$ = {_with_spread(tops)}"
            text += "" if np.isnan(traces).any() else f",  trace = {_with_spread(traces)}"
            seeds = f" ({len(tops)} seeds)" if len(tops) > 1 else ""
            axes.text(0.985, 0.95, f"{group.label}{seeds}\n{text}", transform=axes.transAxes, ha="right", va="top",
                      fontsize=13, color=color, linespacing=1.4,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 3})  # fmt: skip
            axes.set_yscale("log")
            axes.grid(**FIGURE_GRID)
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.yaxis.set_minor_formatter(NullFormatter())
        margin = 0.03 * (high - low) + points[1] - points[0]
        panels[-1].set_xlim(min(low, 0) - margin, high + margin)
        panels[-1].set_ylim(_FLOOR)
        panels[-1].set_xlabel("Eigenvalue")
        figure.supylabel("Density (Log Scale)", fontsize=17)
        return figure


def _with_spread(values: np.ndarray) -> str:
    """Format the mean and, for several values, the standard deviation."""
    return f"{values.mean():.3g}" + (f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else "")


def _thin(points: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop interior points of flat segments, which a PDF does not need."""
    level = np.zeros(len(points), dtype=bool)
    level[1:-1] = (heights[1:-1] == heights[:-2]) & (heights[1:-1] == heights[2:])
    return points[~level], heights[~level]


_MARKERS = "osD^vP*X"


def velocity_figure(
    panels: Sequence[tuple[str, Sequence[Velocities]]], title: str, *, logarithmic: bool = False
) -> Figure:
    """Plot velocity against the position of a group in score order.

    Args:
        panels: For each score, its symbol and its velocities, one per epoch.
        title: Model and data set.
        logarithmic: Whether to use a logarithmic velocity axis, which separates late epochs.
    """
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(1.5 + 5.8 * len(panels), 5.6), layout="constrained")
        figure.suptitle(title, fontsize=16)
        axes_of = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        epochs = sorted({velocities.epoch for _, several in panels for velocities in several})
        for axes, (symbol, several) in zip(axes_of, panels, strict=True):
            for velocities in several:
                number = epochs.index(velocities.epoch)
                color = matplotlib.colormaps["viridis"](0.9 * number / max(len(epochs) - 1, 1))
                mean, spread = velocities.values.mean(0), velocities.values.std(0)
                style = {"marker": _MARKERS[number % len(_MARKERS)], "ms": 6, "lw": 2, "color": color}
                axes.plot(velocities.positions, mean, label=f"epoch {velocities.epoch}", **style)
                if len(velocities.seeds) > 1:
                    low = np.maximum(mean - spread, mean.min() / 10) if logarithmic else mean - spread
                    axes.fill_between(velocities.positions, low, mean + spread, color=color, alpha=0.2, lw=0)
            axes.grid(axis="y", **FIGURE_GRID)
            unit = "percentile" if all(v.in_percent for v in several) else "rank"
            axes.set_xlabel(f"examples ordered by {symbol} ({unit})")
            if logarithmic:
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
        axes_of[0].set_ylabel("kernel velocity")
        axes_of[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=13)
        return figure
