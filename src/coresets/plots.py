"""The figure that compares selection methods: accuracy against the amount of data kept.

Uses matplotlib's object-oriented interface: no global state, no window, and no backend to choose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from scipy.optimize import isotonic_regression

from src.coresets.registry import REFERENCE
from src.errors import ArgumentError
from src.figures import BLACK, COLORS, GRID, LIGHT, MARKERS, MUTED, PAGE, STYLE

_DASH_DOT = (0, (3, 1, 1, 1))  # short enough to be visible in the legend
_TEXT = STYLE["legend.fontsize"]  # font size of the labels next to the lines, in points
_GAP = 1.5 * _TEXT  # points between label centers
_HEIGHT = 3.2  # inches
_KEY = (1.02, 1.045, 1.07)  # start, marker and end of a label's line sample, in widths of the axes
_CROWDED = 0.12  # minimum distance between ticks, in widths of the axes


@dataclass(frozen=True)
class _Name:
    """A label next to the axes: its text, the accuracy at the line's end, and the line's style."""

    text: str
    end: float
    style: dict


def accuracy_figure(
    rows: Sequence[Mapping[str, Any]], *, title: str, full: float | None = None, full_std: float | None = None
) -> Figure:
    """Plot test accuracy against the fraction of examples kept, or against the examples kept per class.

    Each method is one line. Bands (error bars, if a line has one point) show one standard deviation over seeds in
    each direction; a single seed has none. Labels are next to the right ends of the lines, sorted by accuracy.

    Args:
        rows: Rows from :func:`src.coresets.grid.summarize`; those without a finished cell are left out.
        title: Model and data set.
        full: Mean accuracy of training on the full training set, in [0, 1], drawn as a dotted line.
        full_std: Its standard deviation.

    Raises:
        ArgumentError: Some rows use fractions and others use examples per class.
    """
    shots = {row["shots"] is not None for row in rows}
    if len(shots) > 1:
        raise ArgumentError("rows", ": fractions and examples per class need separate axes; draw two figures")
    key = "shots" if True in shots else "share"
    methods = list(dict.fromkeys(row["method"] for row in rows))
    styles = line_styles(methods)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(PAGE, max(_HEIGHT, 1.0 + (len(methods) + 1) * _GAP / 72)),
            layout=ConstrainedLayoutEngine(w_pad=0.1),
        )
        axes = figure.add_subplot()
        axes.set_title(f"{title}{_seeds(rows)}")
        axes.grid(axis="y", **GRID)
        names = []
        for method in methods:
            own = [row for row in rows if row["method"] == method and row["mean"] is not None]
            if own:
                names.append(_line(axes, sorted(own, key=lambda row: row[key]), key, method, styles[method]))
        axes.set_ylabel("Test accuracy (%)")
        axes.set_xlabel("Examples per class" if key == "shots" else "Fraction of examples kept")
        _ticks(axes, sorted({row[key] for row in rows}))
        if full is not None:
            style = {"color": MUTED, "linestyle": ":"}
            axes.axhline(100 * full, label="all examples", zorder=2, **style)
            if full_std is not None:
                band = 100 * (full - full_std), 100 * (full + full_std)
                axes.axhspan(*band, color=MUTED, alpha=0.1, lw=0, label="_all examples")
            names.append(_Name("all examples", 100 * full, style))
        _names(figure, axes, names)
        return figure


def _seeds(rows: Sequence[Mapping[str, Any]]) -> str:
    """Description of the lines and bands for the title; empty for a single seed."""
    counts = sorted({row["seeds"] for row in rows if row["mean"] is not None} or {0})
    if counts[-1] < 2:
        return ""
    several = f"{counts[-1]:.0f}" if len(counts) == 1 else f"{counts[0]:.0f} to {counts[-1]:.0f}"
    return f" (mean of {several} seeds; bands: ± one standard deviation)"


def line_styles(methods: Sequence[str]) -> dict[str, dict]:
    """Assign line styles: ``random`` is black and dashed; the other methods differ in color and marker.

    From the seventh method on, colors repeat with other markers, hollow, and dash-dotted lines.
    """
    styles = {REFERENCE: {"color": BLACK, "marker": "o", "markersize": 4, "linestyle": "--", "zorder": 4}}
    for index, method in enumerate(m for m in methods if m != REFERENCE):
        again = (index // len(COLORS)) % 2
        styles[method] = {
            "color": COLORS[index % len(COLORS)],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 5.5,
            "markeredgewidth": 0.5,
            "linestyle": _DASH_DOT if again else "-",
            "markerfacecolor": "white" if again else COLORS[index % len(COLORS)],
            "markeredgecolor": COLORS[index % len(COLORS)] if again else "white",
            "zorder": 3,
        }
    return {method: styles[method] for method in methods}


def _line(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, method: str, style: dict) -> _Name:
    """Draw a method's line, markers and band."""
    x = np.array([row[key] for row in rows], dtype=float)
    mean = 100 * np.array([row["mean"] for row in rows])
    std = 100 * np.array([np.nan if row["std"] is None else row["std"] for row in rows])
    axes.plot(x, mean, label=method, **style)
    if np.isnan(std).all():
        return _Name(method, mean[-1], style)
    if len(x) == 1:  # a band at a single point would have no width
        axes.errorbar(x, mean, std, color=style["color"], fmt="none", capsize=2, label=f"_{method}")
    else:
        axes.fill_between(
            x, mean - std, mean + std, color=style["color"], alpha=0.6 * LIGHT, lw=0, label=f"_{method}"
        )
    return _Name(method, mean[-1], style)


def _ticks(axes: Axes, values: Sequence[float]) -> None:
    """Set a tick at each value; use a logarithmic axis if the labels would otherwise overlap."""
    texts = [f"{value:g}" for value in values]
    if len(values) > 1:
        linear, logarithmic = (np.diff(v).min() / np.ptp(v) for v in (values, np.log(values)))
        if linear < min(_CROWDED, logarithmic):
            axes.set_xscale("log")
        axes.set_xticks(values, texts, rotation=0 if max(linear, logarithmic) >= _CROWDED / 2 else 45)
    else:
        axes.set_xticks(values, texts)
        axes.set_xlim(0.5 * values[0], 1.5 * values[0])
    axes.set_xticks([], minor=True)


def _names(figure: Figure, axes: Axes, names: Sequence[_Name]) -> None:
    """Write each label next to the end of its line, shifted vertically as little as possible to avoid overlap."""
    figure.draw_without_rendering()  # fixes the limits and heights
    low, high = axes.get_ylim()
    gap = _GAP / (axes.get_window_extent().height / figure.dpi * 72)
    names = sorted(names, key=lambda name: name.end)
    for name, height in zip(names, spread([(name.end - low) / (high - low) for name in names], gap), strict=True):
        axes.plot(_KEY, [height] * 3, transform=axes.transAxes, clip_on=False, markevery=[1], **name.style)
        weight = "bold" if name.text == REFERENCE else "normal"
        axes.text(
            _KEY[2] + 0.02,
            height,
            name.text,
            transform=axes.transAxes,
            fontsize=_TEXT,
            va="center_baseline",
            weight=weight,
        )


def spread(heights: Sequence[float], gap: float) -> np.ndarray:
    """The heights closest to the given ones (least squares) that are ``gap`` apart and within [0, 1].

    Args:
        heights: Ascending, ``(n,)``.
        gap: Minimum distance between neighbors; reduced if n labels do not fit.
    """
    count = len(heights)
    if count < 2:
        return np.clip(heights, 0, 1)
    steps = min(gap, 1 / (count - 1)) * np.arange(count)
    return np.clip(isotonic_regression(np.asarray(heights) - steps).x, 0, 1 - steps[-1]) + steps
