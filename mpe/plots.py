"""The figures of the Memory-Perturbation Equation, in the look of the paper (NeurIPS 2023).

Each function takes plain arrays and returns a figure. Figures are built on matplotlib's object interface: no global
state, no window, no back end to choose.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator, NullLocator

from mpe.figure_parts import Decimals, dense, keep_clear, number_markers

BINS = 100  # groups of examples along the axis of plot_evolving
ESTIMATES = {  # how estimates of leave-one-out cross-validation are told apart where several are drawn
    "diag": {"color": "black", "marker": "s"},
    "full": {"color": "tab:red", "marker": "o"},
    "woodbury": {"color": "tab:blue", "marker": "^"},
}
_GREY = "0.7"
_MARKERS = (("tab:red", "o"), ("tab:blue", "s"), ("tab:green", "^"), ("tab:orange", "D"), ("tab:purple", "v"))
_LEAST_SIZE = 12.0  # square points, of the marker of a class whose removal costs no accuracy
_PAPER = {"axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42, "axes.axisbelow": True}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def loo_iterations(epochs: np.ndarray, estimates: dict[str, np.ndarray], test_nlls: np.ndarray) -> Figure:
    """The leave-one-out estimate beside the test loss during training (Figs. 1b, 5, 8, 9, 10).

    Args:
        epochs: ``(k,)`` epochs from 1 at which the estimates were made, ascending.
        estimates: Names to ``(k,)`` estimated losses. Several are told apart by their names: the class covariances
            ``diag``, ``full``, ``woodbury``.
        test_nlls: ``(E,)`` test losses after each epoch.
    """
    with matplotlib.rc_context({**_PAPER, "font.size": 41, "xtick.labelsize": 39, "ytick.labelsize": 39}):
        figure, axes = _figure(11, 6.5)
        every = np.arange(1, len(test_nlls) + 1)
        marker = "o" if len(test_nlls) == 1 else None  # a line through one point would not be seen
        axes.plot(every, test_nlls, color=_GREY, lw=10, zorder=1, label="Test NLL", marker=marker, ms=16)
        curves = [dense(every, test_nlls)]
        for name, values in estimates.items():
            label = "LOO-CV" if len(estimates) == 1 else f"LOO-CV, {name}"
            style = {**ESTIMATES["diag" if len(estimates) == 1 else name], "lw": 11 if len(estimates) == 1 else 6}
            axes.plot(epochs, values, label=label, zorder=10, ms=23, mew=5, mfc="white", mec=style["color"], **style)
            curves.append(dense(epochs, values))
        axes.margins(y=0.09)  # room for the markers
        if len(test_nlls) == 1:
            axes.set_xlim(0, 2)
        axes.set_xlabel("Epochs", labelpad=15)
        axes.set_ylabel("NLL")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_formatter(Decimals())
        axes.tick_params(labelcolor="0.35")
        legend = axes.legend(loc="upper right", frameon=False, handlelength=1.6, labelspacing=0.3, borderaxespad=0)
        keep_clear(figure, axes, legend, curves, 14)
        return figure


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Means of each value and the ``window - 1`` before it, ``(n - window + 1,)``.

    Raises:
        ValueError: There are fewer than ``window`` values.
    """
    if not 1 <= window <= len(values):
        raise ValueError(f"a window of {window} does not fit {len(values)} values")
    return np.lib.stride_tricks.sliding_window_view(values, window).mean(axis=1)


def loo_l2reg(
    deltas: np.ndarray,
    estimated_nll: np.ndarray,
    test_nlls: np.ndarray,
    window: int = 4,
    test_errors: np.ndarray | None = None,
) -> Figure:
    """The leave-one-out estimate and the test loss against the L2 parameter (Fig. 4; with errors, Fig. 7).

    Curves are trailing moving averages; a mark stands where each has its minimum.

    Args:
        deltas: ``(n,)`` positive, ascending.
        estimated_nll: ``(n,)``.
        test_nlls: ``(n,)``.
        window: Width of the moving average.
        test_errors: ``(n,)`` shares of test examples that are misclassified, for a second axis.

    Raises:
        ValueError: There are fewer than ``window`` deltas.
    """
    x = deltas[window - 1 :]
    marker = "o" if len(x) == 1 else None
    with matplotlib.rc_context({**_PAPER, "font.size": 41, "axes.spines.right": test_errors is not None}):
        figure, axes = _figure(11 if test_errors is None else 12.5, 6 if test_errors is None else 6.6)
        series = {"Test NLL": (test_nlls, _GREY, 17.5, 1), "LOO-CV": (estimated_nll, "black", 7.5, 2)}
        curves, stems = [], []
        for label, (values, colour, width, zorder) in series.items():
            smooth = moving_average(values, window)
            axes.plot(x, smooth, color=colour, lw=width, zorder=zorder, label=label, marker=marker, ms=2 * width)
            stems.append((x[smooth.argmin()], smooth.min(), colour, width))
            curves.append(dense(x, smooth, log_x=True))
        handles = axes.get_legend_handles_labels()[0]
        _delta_axis(axes, x)
        axes.margins(y=0.2)  # below, room for the stems
        axes.set_ylabel("NLL")
        axes.yaxis.set_major_locator(MaxNLocator(2))
        axes.yaxis.set_major_formatter(Decimals())
        axes.tick_params(pad=10)
        right = axes.twinx() if test_errors is not None else None
        if right is not None:
            errors = 100 * moving_average(test_errors, window)
            handles += right.plot(x, errors, color="tab:red", lw=5, ls=(0, (3, 1)), marker=marker, label="Test error")
            _error_axis(right)
        small = {} if right is None else {"fontsize": 27, "ncols": 3, "columnspacing": 0.9}
        legend = (right or axes).legend(
            handles=handles, loc="upper center", frameon=False, handlelength=1.2, labelspacing=0.2, **small
        )
        keep_clear(figure, axes, legend, curves, 12)
        _stems(axes, stems)
        if right is not None:
            keep_clear(figure, right, legend, [dense(x, errors, log_x=True)], 6)
        return figure


def _error_axis(axes: Axes) -> None:
    """The second axis, at the right."""
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.set_ylabel("Error (%)", color="tab:red")
    axes.tick_params(axis="y", labelcolor="tab:red", pad=10)
    axes.spines["top"].set_visible(False)


def _stems(axes: Axes, stems: Sequence[tuple[float, float, str, float]]) -> None:
    """Mark minima ``(x, y, colour, width of the curve)`` by lines down to the axis."""
    low = axes.get_ylim()[0]
    for x, y, colour, width in stems:
        dotted = colour == "black"  # lets the one behind show
        axes.plot(
            [x, x], [low, y], color=colour, lw=width / 2, ls=(0, (1, 0.7)) if dotted else "-", zorder=3 + dotted
        )
    axes.set_ylim(bottom=low)


def _delta_axis(axes: Axes, x: np.ndarray) -> None:
    """A logarithmic axis of the L2 parameter, with labels also where it covers less than two powers of ten."""
    axes.set_xlabel(r"$\delta$")
    axes.set_xscale("log")
    if len(x) == 1:
        axes.set_xlim(x[0] / 3, x[0] * 3)
    low, high = np.log10(axes.get_xlim())
    if np.floor(high) - np.ceil(low) < 1:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=5))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_formatter(LogFormatterSciNotation())


def validation(true: np.ndarray, estimated: np.ndarray, text: str = "") -> Figure:
    """Estimated against true deviations (Fig. 2).

    Args:
        true: ``(m,)`` deviations after training without each example.
        estimated: ``(m,)``.
        text: For the upper left corner, such as their correlations.
    """
    with matplotlib.rc_context({**_PAPER, "font.size": 23}):
        figure, axes = _figure(7, 5.4)
        axes.grid(alpha=0.5)
        axes.scatter(true, estimated, s=75, facecolor="white", edgecolor="red", zorder=3, rasterized=len(true) > 5000)
        axes.set(xlabel="True Deviation", ylabel="Estimated Deviation")
        axes.autoscale_view()
        axes.set_autoscale_on(False)  # the identity line, up to the largest L1 deviation, does not move the limits
        axes.plot([0, 2], [0, 2], color="0.5", lw=5, ls="--", zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(3))
        if text:
            corner = axes.text(0.03, 0.98, text, transform=axes.transAxes, va="top", fontsize=16, zorder=4)
            corner.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2})
            keep_clear(figure, axes, corner, [(true, estimated)], 7)
        return figure


def ranked_bins(sensitivities: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Mean sensitivities of equally large groups of examples, ranked by the last checkpoint, highest first.

    Args:
        sensitivities: ``(K, N)``, a row per checkpoint.
        bins: Number of groups; N where that is less. Their sizes differ by one where it does not divide N.

    Returns:
        ``(K, bins)``.
    """
    order = np.argsort(-sensitivities[-1], kind="stable")
    parts = np.array_split(sensitivities[:, order], min(bins, len(order)), axis=1)
    return np.stack([part.mean(axis=1) for part in parts], axis=1)


def evolving(sensitivities: np.ndarray, labels: Sequence[str]) -> Figure:
    """How sensitivities are spread over the examples at several checkpoints of training (Figs. 3b, 11).

    Args:
        sensitivities: ``(K, N)``, a row per checkpoint.
        labels: The K checkpoints.
    """
    curves = ranked_bins(sensitivities)
    place = np.linspace(0, 3, len(curves)) if len(curves) > 1 else [3]
    with matplotlib.rc_context({**_PAPER, "font.size": 16}):
        figure, axes = _figure(6, 6)
        at = np.arange(1, curves.shape[1] + 1)
        for row, label, p in zip(curves, labels, place, strict=True):
            grey = np.interp(p, range(4), (0.6, 0.45, 0.25, 0.1))
            marker = "o" if len(at) == 1 else None
            axes.plot(at, row, color=f"{grey:.3f}", lw=7 - p, label=label, marker=marker, solid_capstyle="round")
        axes.invert_xaxis()  # the most sensitive to the right
        axes.set_xticks(at, minor=True)
        axes.xaxis.set_major_locator(NullLocator())
        axes.tick_params(axis="x", which="minor", labelbottom=False)
        axes.grid(ls="--", color="0.85")
        axes.set(xlabel="Example", ylabel="Sensitivity")
        axes.set_ylim(bottom=min(0, curves.min()))
        size = np.interp(len(curves), (6, 14), (16, 10))
        columns = 1 if len(curves) <= 14 else -(-len(curves) // 14)
        legend = axes.legend(
            title="Training checkpoints", loc="upper left", fontsize=size, title_fontsize=size, ncols=columns
        )
        keep_clear(figure, axes, legend, [dense(at, row) for row in curves], 6)
        return figure


@dataclass(frozen=True)
class LeaveClassOut:
    """One experiment of :func:`loco`: what the legend calls it, and arrays ``(c,)`` over classes."""

    label: str
    classes: np.ndarray
    test_nlls: np.ndarray
    estimated_nll: np.ndarray
    accuracy_drops: np.ndarray


def loco(experiments: Sequence[LeaveClassOut]) -> Figure:
    """Estimated loss of each class against the test loss after training without it (Figs. 3a, 11d).

    Numbers are classes; the larger a marker, the more test accuracy goes with its class.

    Args:
        experiments: At least one.
    """
    with matplotlib.rc_context({**_PAPER, "font.size": 15}):
        figure, axes = _figure(6, 6)
        handles, points, areas, texts, colours = [], [], [], [], []
        for k, experiment in enumerate(experiments):
            colour, marker = _MARKERS[k % len(_MARKERS)]
            hollow = (k + k // len(_MARKERS)) % 2 == 1
            face = "none" if hollow else colour
            size = np.maximum(10 + 1800 * experiment.accuracy_drops, _LEAST_SIZE)
            axes.scatter(
                experiment.test_nlls, experiment.estimated_nll, size, marker=marker, facecolor=face, edgecolor=colour,
                alpha=0.8, linewidth=2, zorder=3,
            )  # fmt: skip
            key = {"marker": marker, "color": colour, "markerfacecolor": face, "markersize": 12, "markeredgewidth": 2}
            handles.append(Line2D([], [], ls="", label=experiment.label, **key))
            points.append(np.column_stack([experiment.test_nlls, experiment.estimated_nll]))
            areas.append(size)
            texts += map(str, experiment.classes)
            colours += [colour] * len(size)
        axes.set(xlabel="Test Neg. Log-Likelihood (NLL)", ylabel="Estimated NLL with MPE")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(ls="--", color="0.9")
        axes.margins(0.12)
        legend = axes.legend(handles=handles, loc="upper left", handletextpad=0.2)
        everything = np.concatenate(points)
        keep_clear(figure, axes, legend, [tuple(everything.T)], 12)
        number_markers(figure, axes, everything, np.concatenate(areas), texts, colours)
        return figure
