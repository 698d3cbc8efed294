"""Figures of loss geometry: spectral densities with the largest eigenvalues, and velocities of tangent kernels.

A density is a sum of narrow Gaussians at the nodes of a Gauss quadrature, with its weights (Ghorbani et al. 2019).
"""

import itertools
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from src.curvature.results import SpectrumGroup, Velocities
from src.figures import COLORS, COLUMN, GRID, LIGHT, MARKERS, MUTED, PAGE, STYLE, shade

_FLOOR = 1e-7
"""Added to densities to bound their logarithm from below."""

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
            The text gives means and standard deviations over seeds, and the standard error of the trace estimate.
        title: What was measured.
    """
    spectra = [spectrum for group in groups for spectrum in group.spectra]
    ranges = [extent(spectrum.nodes) for spectrum in spectra]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    widths = [width(*r) for r in ranges]
    points = grid(low, high, min(widths), max(widths))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PAGE, 1.0 + 1.4 * len(groups)), layout="constrained")
        figure.suptitle(title)
        panels = figure.subplots(len(groups), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        known_errors = []
        for axes, group, color in zip(panels, groups, itertools.cycle(COLORS), strict=False):
            densities = [
                spectral_density(spectrum.nodes, spectrum.weights, points, width(*extent(spectrum.nodes)))
                for spectrum in group.spectra
            ]
            x, mean = _thin(points, np.mean(densities, axis=0) + _FLOOR)
            axes.fill_between(x, _FLOOR, mean, color=color, alpha=LIGHT, lw=0)
            axes.plot(x, mean, color=color, lw=0.8)
            tops = np.array([spectrum.eigenvalues[0] for spectrum in group.spectra])
            for top in tops:
                axes.axvline(top, ymax=0.6, color=color, lw=0.8, ls=(0, (4, 3)), zorder=1)
            traces, errors = (
                np.array([getattr(spectrum, name) for spectrum in group.spectra]) for name in ("trace", "trace_error")
            )
            text = rf"$\lambda_1$ = {_with_spread(tops)}"
            text += "" if np.isnan(traces).any() else f",  trace = {_with_spread(traces)}"
            # several seeds: the error of one seed's estimate, which explains a part of the spread over seeds
            known_errors.append(not np.isnan(traces + errors).any())
            text += "" if not known_errors[-1] else f" (SE {np.sqrt(np.mean(errors**2)):.2g})"
            seeds = f"{len(tops)} seeds" if len(tops) > 1 else "1 seed"
            axes.text(0.99, 0.97, f"{group.label} ({seeds})\n{text}", transform=axes.transAxes, ha="right", va="top",
                      color=color, linespacing=1.3,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2})  # fmt: skip
            axes.set_yscale("log")
            axes.grid(**GRID)
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.yaxis.set_minor_formatter(NullFormatter())
        margin = 0.03 * (high - low) + points[1] - points[0]
        panels[-1].set_xlim(min(low, 0) - margin, high + margin)
        panels[-1].set_ylim(_FLOOR)
        panels[-1].set_xlabel("Eigenvalue")
        figure.supylabel("Density (log scale)", fontsize=STYLE["axes.labelsize"])
        several = any(len(group.spectra) > 1 for group in groups)
        figure.legend(
            handles=[
                Patch(facecolor=MUTED, alpha=LIGHT, label="Density, mean over seeds" if several else "Density"),
                Line2D([], [], color=MUTED, lw=0.8, ls=(0, (4, 3)),
                       label=r"Largest eigenvalue $\lambda_1$" + " of each seed" * several),
            ],
            title="; ".join(["±: standard deviation over seeds"] * several
                            + ["SE: standard error of one estimate of the trace"] * any(known_errors)),
            loc="outside lower center", ncols=2,
        )  # fmt: skip
        return figure


def _with_spread(values: np.ndarray) -> str:
    """Format the mean and, for several values, the standard deviation."""
    return f"{values.mean():#.3g}" + (f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else "")


def _thin(points: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop interior points of flat segments, which a PDF does not need."""
    level = np.zeros(len(points), dtype=bool)
    level[1:-1] = (heights[1:-1] == heights[:-2]) & (heights[1:-1] == heights[2:])
    return points[~level], heights[~level]


def velocity_figure(
    panels: Sequence[tuple[str, Sequence[Velocities]]], title: str, *, logarithmic: bool = False
) -> Figure:
    """Plot velocity against the position of a group in score order.

    Args:
        panels: For each score, its symbol and its velocities, one per epoch.
        title: Model and data set.
        logarithmic: Whether to use a logarithmic velocity axis, which separates late epochs.
    """
    with matplotlib.rc_context(STYLE):
        width = COLUMN if len(panels) == 1 else max(PAGE, 2.2 * len(panels))
        figure = Figure(figsize=(width, 2.9), layout="constrained")
        figure.suptitle(title)
        axes_of = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        epochs = sorted({velocities.epoch for _, several in panels for velocities in several})
        counts = {len(velocities.seeds) for _, several in panels for velocities in several}
        for axes, (symbol, several) in zip(axes_of, panels, strict=True):
            for velocities in several:
                number = epochs.index(velocities.epoch)
                color = shade(number, len(epochs))
                mean = velocities.values.mean(0)
                label = f"Epoch {velocities.epoch}" + (f" ({_seeds(len(velocities.seeds))})" * (len(counts) > 1))
                style = {"marker": MARKERS[number % len(MARKERS)], "color": color, "label": label}
                axes.plot(velocities.positions, mean, **style)
                if len(velocities.seeds) > 1:
                    spread = velocities.values.std(0, ddof=1)
                    low = np.maximum(mean - spread, mean.min() / 10) if logarithmic else mean - spread
                    axes.fill_between(velocities.positions, low, mean + spread, color=color, alpha=LIGHT, lw=0)
            axes.grid(axis="y", **GRID)
            unit = "percentile" if all(v.in_percent for v in several) else "rank"
            axes.set_xlabel(f"Examples ordered by {symbol} ({unit})")
            if logarithmic:
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
        axes_of[0].set_ylabel("Kernel velocity")
        heading = f"Mean of {_seeds(min(counts))}" if len(counts) == 1 else "Mean over seeds"
        heading = "One seed" if counts == {1} else f"{heading}; band: ± one standard deviation"
        lines = {line.get_label(): line for axes in axes_of for line in axes.lines}
        columns = (4 if len(panels) == 1 else 8) // (1 if len(counts) == 1 else 2)  # what fits in the width
        figure.legend(
            handles=lines.values(), title=heading, loc="outside lower center", ncols=min(len(lines), columns),
            handlelength=1.2, columnspacing=1,
        )  # fmt: skip
        return figure


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"
