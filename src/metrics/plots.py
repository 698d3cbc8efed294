"""Figures of scores: one mode's distribution, and several modes compared by rank.

Figures are built on matplotlib's object interface: no global state, no window, no back end to choose.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import gaussian_kde

from src.errors import ArgumentError, FlagError
from src.formatting import FIGURE_GRID, FIGURE_STYLE

BINS = 50
PASTEL = matplotlib.colormaps["tab20"].colors[1::2]  # ten light colours
INK = "#1f4e79"
_KDE_BINS, _KDE_POINTS = 2048, 512


def _figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.grid(axis="y", **FIGURE_GRID)
    return figure, axes


def histogram(scores: np.ndarray, label: str, title: str) -> Figure:
    """A histogram of 50 bins; its counts are logarithmic if one bin holds most examples.

    Args:
        scores: ``(n,)``.
        label: The score's symbol.
        title: What it is, and of which data.
    """
    with matplotlib.rc_context(FIGURE_STYLE):
        figure, axes = _figure(10, 6, f"{title} ({len(scores):,} examples)")
        counts, edges = np.histogram(scores, bins=BINS)
        colours = [PASTEL[i % len(PASTEL)] for i in range(BINS)]
        axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=colours, edgecolor="white", lw=0.5)
        if counts.max() > len(scores) / 2:
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.7)
        axes.set_xlabel(label)
        axes.set_ylabel("examples per bin")
        axes.margins(x=0.01)
        return figure


def kernel_density(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A Gaussian kernel density estimate over the range of the scores (Scott's rule).

    Scores are binned finely first, so that a million of them cost as much as a thousand.

    Args:
        scores: ``(n,)``, not all equal.

    Returns:
        Points and densities, ``(512,)`` each.
    """
    counts, edges = np.histogram(scores, bins=_KDE_BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    used = counts > 0
    estimate = gaussian_kde(centres[used], bw_method=len(scores) ** -0.2, weights=counts[used])
    points = np.linspace(scores.min(), scores.max(), _KDE_POINTS)
    return points, estimate(points)


def density(scores: np.ndarray, label: str, title: str) -> Figure:
    """A filled kernel density estimate of scores ``(n,)``.

    Raises:
        FlagError: All scores are equal: they have no density.
    """
    if len(scores) < 2 or np.ptp(scores) == 0:
        raise FlagError(f"{title}: the chosen scores are all equal, so they have no density; choose more examples")
    points, heights = kernel_density(scores)
    with matplotlib.rc_context(FIGURE_STYLE):
        figure, axes = _figure(10, 6, f"{title} ({len(scores):,} examples)")
        axes.fill_between(points, heights, color=PASTEL[0], alpha=0.8, lw=0)
        axes.plot(points, heights, color=INK, lw=2)
        axes.set_xlabel(label)
        axes.set_ylabel("density")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        return figure


def shares(indices: np.ndarray, values: np.ndarray, label: str, title: str, plot: str = "scatter") -> Figure:
    """Each example's share of the sum of all scores, against its index.

    Args:
        indices: ``(m,)`` original indices.
        values: ``(m,)`` shares.
        label: The score's symbol.
        title: What it is, and of which data.
        plot: ``"scatter"`` or ``"line"``.

    Raises:
        ArgumentError: ``plot`` is neither.
    """
    if plot not in ("scatter", "line"):
        raise ArgumentError("plot", f"{plot!r}: unknown; choose scatter or line")
    with matplotlib.rc_context(FIGURE_STYLE):
        figure, axes = _figure(12, 6, f"{title} ({len(indices):,} examples)")
        style = {"s": 9, "lw": 0} if plot == "scatter" else {"lw": 0.6}
        draw = axes.scatter if plot == "scatter" else axes.plot
        # tens of thousands of vector marks would make the PDF unusable
        draw(indices, values, color=INK, alpha=0.55, rasterized=True, **style)
        axes.set_xlabel("index of the example")
        axes.set_ylabel(f"share of the sum of {label}")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        return figure


def _heat_map(axes: Axes, matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str) -> None:
    """A matrix of correlations with its numbers."""
    axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, aspect="equal")
    for (i, j), value in np.ndenumerate(matrix):
        colour = "white" if abs(value) > 0.65 else "black"
        text = "–" if np.isnan(value) else f"{value:.2f}"
        axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=13)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, labelsize=15)
    axes.spines[:].set_visible(False)
    axes.set_title(title, pad=12)


def _ridges(axes: Axes, scores: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """One distribution per row: the logarithm of the counts of the scores scaled to [0, 1]."""
    for row, values in enumerate(scores):
        values = values[~np.isnan(values)]
        spread = np.ptp(values) or 1.0
        counts, edges = np.histogram((values - values.min()) / spread, bins=60, range=(0, 1))
        heights = np.log1p(counts) / np.log1p(counts.max()) * 0.85
        axes.stairs(row + 0.45 - heights, edges, baseline=row + 0.45, fill=True, color=PASTEL[row % len(PASTEL)])
        axes.stairs(row + 0.45 - heights, edges, baseline=None, color=INK, lw=0.9)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelsize=15)
    axes.spines[["left"]].set_visible(False)
    axes.set_xlim(0, 1)
    axes.set_xlabel("score, scaled to [0, 1]")
    axes.set_title("distribution (log counts)", pad=12)


def comparison(
    scores: Sequence[np.ndarray],
    names: Sequence[str],
    columns: Sequence[str],
    matrices: dict[str, np.ndarray],
    title: str,
) -> Figure:
    """Several scores beside each other: their distributions and one heat map per correlation matrix.

    Args:
        scores: k arrays ``(n,)``; NaN is left out.
        names: The k rows' symbols.
        columns: The c columns' symbols.
        matrices: Heading to ``(k, c)`` correlations, in the order in which they are drawn.
        title: What is compared.
    """
    cell = 0.72
    height = cell * max(len(names), 3) + 2.4
    map_width = max(cell * len(columns) + 1.6, 3.0)  # room for its heading
    widths = [4.6, *[map_width] * len(matrices)]
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(sum(widths), height), layout="constrained")
        axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        _ridges(axes[0], scores, names)
        for place, (heading, matrix) in zip(axes[1:], matrices.items(), strict=True):
            _heat_map(place, matrix, names, columns, heading)
        figure.suptitle(title)
        return figure
