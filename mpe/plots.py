"""The Memory-Perturbation Equation figures (NeurIPS 2023).

`StoredResult` reads an experiment's result file. Each plotting function takes plain arrays and returns a figure built
with matplotlib's object interface, without global state, windows, or a choice of backend.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import Formatter, LogFormatterSciNotation, LogLocator, MaxNLocator, NullLocator

from mpe.config import CLASS_COVARIANCES
from src.artifacts.io import read_pickle, save_figure
from src.artifacts.paths import PICKLES, pickle_path
from src.artifacts.store import check_consistent, checked_array
from src.errors import ArgumentError, FileError
from src.figures import BLUE, COLORS, COLUMN, GRAY, GRID, MARKERS, ORANGE, SMALL, STEPS, STYLE, shade

log = logging.getLogger(__name__)

# The script that writes {experiment}_{kind}.pkl.
SCRIPTS = {
    "iter": "1_loo_iterations.py",
    "cv": "2_loo_l2reg.py",
    "scores": "3_validation_sensitivities.py",
    "retrain": "3_validation_sensitivities.py",
    "evolving": "4_evolving_sensitivities.py",
    "leaveclassout": "5_loco.py",
    "group": "6_group_removal.py",
    "von": "7_von_logistic.py",
}


class StoredResult:
    """One result file of an experiment. Each value is checked when it is read.

    Args:
        folder: The results folder.
        name: The experiment's name.
        kind: A key of ``SCRIPTS``.

    Raises:
        FileError: The file is missing, damaged, or not a dictionary. Methods raise it if a value is invalid.
    """

    def __init__(self, folder: str | Path, name: str, kind: str) -> None:
        self.name, self.path, self.script = name, pickle_path(folder, name, kind), SCRIPTS[kind]
        self.command = f"python examples/{self.script} --name_exp {name}"
        if Path(folder).resolve() != PICKLES:
            self.command += f" --pickles_folder {folder}"
        if not self.path.exists():
            others = self.path.parent.glob(f"*_{kind}.pkl")
            names = sorted(other.name.removesuffix(f"_{kind}.pkl") for other in others)
            there = f" (existing: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""
            raise FileError(f"{self.path}: file not found; create it with: {self.command}{there}")
        self.values: dict[str, Any] = read_pickle(self.path)
        if not isinstance(self.values, dict):
            raise self.error("is not a dictionary of results")

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def error(self, what: str) -> FileError:
        """Build an error about this file, with the command that recreates it."""
        return FileError(f"{self.path}: {what}; recreate it with: {self.command}")

    def array(
        self, key: str, ndim: int = 1, *, low: float = -np.inf, high: float = np.inf, gaps: bool = False
    ) -> np.ndarray:
        """Read an array of at least one finite number within bounds. With ``gaps``, some values may be NaN.

        Returns:
            float64 array with ``ndim`` axes.
        """
        remedy = f"recreate it with: {self.command}"
        values = checked_array(self.path, self.values, key, ndim, finite=not gaps, remedy=remedy).astype(np.float64)
        known = values[~np.isnan(values)]
        if known.size == 0:
            raise self.error(f"array {key!r} has no values yet")
        if not np.isfinite(known).all():
            raise self.error(f"array {key!r} has infinite values")
        if known.min() < low or known.max() > high:
            raise self.error(
                f"array {key!r} ranges from {known.min():g} to {known.max():g}, expected {low:g} to {high:g}"
            )
        return values

    def integers(self, key: str, low: int, high: float = np.inf) -> np.ndarray:
        """Read integers within bounds, int64 ``(n,)``."""
        values = self.array(key, low=low, high=high)
        if (values != np.round(values)).any():
            raise self.error(f"array {key!r} has values that are not integers")
        return values.astype(np.int64)

    def same_length(self, **arrays: np.ndarray) -> None:
        """Check that all arrays have the same length."""
        if len({len(values) for values in arrays.values()}) > 1:
            raise self.error("lengths differ: " + ", ".join(f"{len(values)} {key}" for key, values in arrays.items()))

    def same_run(self, other: "StoredResult") -> None:
        """Check that another file of this experiment was made with the same settings, if both record them.

        They differ if a run that replaces an older one stopped before it wrote both files.
        """
        files = [(result.path, result.values.get("settings")) for result in (other, self)]
        check_consistent(
            [(path, settings) for path, settings in files if isinstance(settings, dict)],
            what="belongs to a different run than",
            remedy=f"run {self.script} to completion with the desired settings, --resume and --overwrite",
        )

    def is_empty(self, key: str) -> bool:
        """Whether an array exists but has no values yet."""
        values = self.values.get(key)
        return isinstance(values, (list, np.ndarray)) and np.asarray(values, dtype=object).size == 0

    def of(self, key: str, class_cov: str | None) -> str:
        """The key of the estimates ``key`` computed with a given covariance between classes.

        ``key`` itself has the estimates with the run's setting (``diag`` if the file does not record it);
        ``{key}_{class_cov}`` has those with another setting.

        Args:
            key: For example, ``estimated_nll``.
            class_cov: One of ``CLASS_COVARIANCES``; None for the run's setting.

        Raises:
            ArgumentError: The file has no such estimates.
        """
        own = self.setting("class_cov") or "diag"
        if class_cov in (None, own):
            return key
        if f"{key}_{class_cov}" not in self.values:
            others = [cov for cov in CLASS_COVARIANCES if cov != own and f"{key}_{cov}" in self.values]
            found = " and ".join([own, *others])
            raise ArgumentError(
                "class_cov",
                f"{class_cov}: {self.path} has no {key}_{class_cov}, only {found}; create it with: {self.command} "
                f"--class_cov {class_cov}",
            )
        return f"{key}_{class_cov}"

    def setting(self, flag: str) -> Any:
        """The value of a flag in the run that made the file; None if it is not stored."""
        args = self.values.get("args")
        return args.get(flag) if isinstance(args, dict) else None


_ANGLES = np.deg2rad(45 + np.array([0, -90, 90, 180, -45, 45, -135, 135, 22, -22, 67, -67, 112, -112, 157, -157]))
_REACHES = (1.5, 4, 8, 14, 22)  # points between a marker and its label


class Decimals(Formatter):
    """Tick labels with one decimal, or more if needed to distinguish the ticks."""

    def __init__(self, least: int = 1) -> None:
        self.least = self.count = least

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Format the label of one tick."""
        return f"{x:.{self.count}f}"

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """Format the labels of all ticks."""
        self.count = self.least
        while self.count < 8 and not np.allclose(np.round(values, self.count), values, rtol=0, atol=1e-10):
            self.count += 1
        return [self(value) for value in values]


def keep_clear(figure: Figure, axes: Axes, corner: Artist, points: Sequence[tuple], pad: float) -> None:
    """Raise the upper limit of a linear y axis until no data is behind a legend or text at the top of the axes.

    Args:
        figure: The figure.
        axes: The axes to adjust.
        corner: A legend or text at the top.
        points: Pairs of arrays x and y in data coordinates, densely sampled for lines.
        pad: Clearance around each data point, in typographic points.
    """
    figure.draw_without_rendering()
    frame, box = axes.get_window_extent(), corner.get_window_extent()
    room = pad * figure.dpi / 72
    x, y = (np.concatenate(parts) for parts in zip(*points, strict=True))
    across = axes.transData.transform(np.column_stack([x, y]))[:, 0]
    below = (across > box.x0 - room) & (across < box.x1 + room)
    low, high = axes.get_ylim()
    free = (box.y0 - room - frame.y0) / frame.height
    if below.any() and free > 0.1:
        axes.set_ylim(low, max(high, low + (y[below].max() - low) / free))


def dense(x: np.ndarray, y: np.ndarray, *, log_x: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Sample points along the line through ``x`` (ascending) and ``y``, for :func:`keep_clear`."""
    at = np.geomspace(x[0], x[-1], 500) if log_x else np.linspace(x[0], x[-1], 500)
    return at, np.interp(np.log(at), np.log(x), y) if log_x else np.interp(at, x, y)


def place_labels(points: np.ndarray, radii: np.ndarray, sizes: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Choose centers for labels next to round markers: close to their marker, and clear of other markers and labels.

    Labels are placed one at a time, starting with the most crowded, each at the position with the
    least overlap. All lengths are in typographic points.

    Args:
        points: ``(n, 2)`` centers of the markers.
        radii: ``(n,)`` radii of the markers.
        sizes: ``(n, 2)`` widths and heights of the labels.
        frame: ``(2, 2)`` lower-left and upper-right corners of the area in which labels should stay.

    Returns:
        ``(n, 2)`` centers.
    """
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    order = np.argsort(-(distances < 20).sum(axis=1), kind="stable")
    centers = np.full_like(points, np.nan)
    for i in order:
        direction = np.column_stack([np.cos(_ANGLES), np.sin(_ANGLES)])
        reach = radii[i] + np.asarray(_REACHES, dtype=float)
        offsets = reach[:, None, None] * direction + np.clip(1.42 * direction, -1, 1) * sizes[i] / 2
        spots = (points[i] + offsets).reshape(-1, 2)  # flattened from (reaches, angles, 2)
        low, high = spots - sizes[i] / 2, spots + sizes[i] / 2
        nearest = np.clip(points, low[:, None], high[:, None])  # (spots, n, 2)
        covered = np.linalg.norm(nearest - points, axis=2) < radii + 1
        done = ~np.isnan(centers[:, 0])
        apart = np.abs(spots[:, None] - centers[done]) - (sizes[i] + sizes[done]) / 2
        crossed = (apart < 0).all(axis=2).sum(axis=1)
        outside = ((low < frame[0]) | (high > frame[1])).any(axis=1)
        far = np.repeat(np.asarray(_REACHES) / 10, len(_ANGLES))
        turned = np.tile(np.arange(len(_ANGLES)) / 100, len(_REACHES))
        centers[i] = spots[np.argmin(3 * covered.sum(axis=1) + 6 * crossed + 6 * outside + far + turned)]
    return centers


def number_markers(
    figure: Figure, axes: Axes, data: np.ndarray, areas: np.ndarray, texts: list[str], colors: list[str]
) -> None:
    """Write each class number next to its marker, with a thin connecting line if they are far apart.

    Args:
        figure: The figure.
        axes: Its axes, with their final limits.
        data: ``(n, 2)`` centers of the markers, in data coordinates.
        areas: ``(n,)`` areas of the markers, in square points.
        texts: The n class numbers.
        colors: The n colors.
    """
    font = 8 if len(data) <= 20 else SMALL if len(data) <= 40 else 5
    figure.draw_without_rendering()  # finalizes the limits
    scale = 72 / figure.dpi
    points = axes.transData.transform(data) * scale
    frame = axes.get_window_extent().get_points() * scale
    sizes = np.array([(0.62 * font * len(text), 0.8 * font) for text in texts])
    radii = np.sqrt(areas) / 2 + 1
    centers = place_labels(points, radii, sizes, frame)
    for xy, point, center, text, color, radius in zip(data, points, centers, texts, colors, radii, strict=True):
        far = np.linalg.norm(center - point) > radius + 1.4 * font
        arrow = {"arrowstyle": "-", "color": color, "lw": 0.5, "shrinkA": 0, "shrinkB": 3} if far else None
        style = {"fontsize": font, "color": color, "ha": "center", "va": "center", "zorder": 4, "arrowprops": arrow}
        axes.annotate(text, xy, center - point, textcoords="offset points", annotation_clip=False, **style)


def save_and_show(figure: Figure, stem: Path, window: bool) -> None:
    """Save a figure as PNG and PDF and print the paths. If ``window`` is set, show it until the window is closed."""
    print(*save_figure(figure, stem), sep="\n")  # noqa: T201
    if not window:
        return
    from matplotlib import pyplot
    from matplotlib.backends import BackendFilter, backend_registry

    interactive = {name.lower() for name in backend_registry.list_builtin(BackendFilter.INTERACTIVE)}
    if pyplot.get_backend().lower() not in interactive:
        log.warning("--show: no display found (matplotlib backend %s); open the files", matplotlib.get_backend())
        return
    pyplot.figure(figure)
    pyplot.show()


_BINS = 100  # number of groups of examples on the x axis of `evolving`
_ESTIMATES = dict(zip(("diag", "full", "woodbury"), zip(COLORS, MARKERS, strict=False), strict=False))
"""Color and marker of each leave-one-out estimate."""
_LEAST_SIZE = 4.0  # marker area in square points for a class whose removal costs no accuracy


def _figure(height: float, *, grid: str = "y") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis=grid, **GRID)
    return figure, axes


def loo_iterations(epochs: np.ndarray, estimates: dict[str, np.ndarray], test_nlls: np.ndarray) -> Figure:
    """Plot the leave-one-out estimate and the test loss during training (Figs. 1b, 5, 8, 9, 10).

    Args:
        epochs: ``(k,)`` epochs (from 1) of the estimates, ascending.
        estimates: Maps names to ``(k,)`` estimated losses. If there are several, the names must be the class
            covariances ``diag``, ``full``, and ``woodbury``.
        test_nlls: ``(E,)`` test losses after each epoch.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(2.2)
        every = np.arange(1, len(test_nlls) + 1)
        marker = "o" if len(test_nlls) == 1 else None  # a line through a single point is invisible
        axes.plot(every, test_nlls, color=GRAY, lw=2.5, zorder=1, label="Test NLL", marker=marker)
        curves = [dense(every, test_nlls)]
        for name, values in estimates.items():
            label = "LOO estimate" if len(estimates) == 1 else f"LOO estimate, {name}"
            color, marker = _ESTIMATES["diag" if len(estimates) == 1 else name]
            axes.plot(epochs, values, label=label, zorder=3, color=color, marker=marker, mfc="white")
            curves.append(dense(epochs, values))
        axes.margins(y=0.06)  # room for the markers
        if len(test_nlls) == 1:
            axes.set_xlim(0, 2)
        axes.set_xlabel("Epoch")
        axes.set_ylabel("NLL")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        axes.yaxis.set_major_formatter(Decimals())
        legend = axes.legend(loc="upper right", borderaxespad=0)
        keep_clear(figure, axes, legend, curves, 4)
        return figure


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and the ``window - 1`` values before it, ``(n - window + 1,)``."""
    return np.lib.stride_tricks.sliding_window_view(values, window).mean(axis=1)


def loo_l2reg(
    deltas: np.ndarray,
    estimated_nll: np.ndarray,
    test_nlls: np.ndarray,
    window: int = 4,
    test_errors: np.ndarray | None = None,
) -> Figure:
    """Plot the leave-one-out estimate and the test loss against the L2 parameter (Fig. 4; with errors, Fig. 7).

    Curves are trailing moving averages. Their minima are marked.

    Args:
        deltas: ``(n,)`` positive, ascending.
        estimated_nll: ``(n,)``.
        test_nlls: ``(n,)``.
        window: Width of the moving average.
        test_errors: ``(n,)`` test error rates as fractions, for a second axis.
    """
    x = deltas[window - 1 :]
    marker = "o" if len(x) == 1 else None
    with matplotlib.rc_context({**STYLE, "axes.spines.right": test_errors is not None}):
        figure, axes = _figure(2.2)
        series = {"Test NLL": (test_nlls, GRAY, 2.5, 1), "LOO estimate": (estimated_nll, BLUE, 1.3, 2)}
        curves, stems = [], []
        for label, (values, color, width, zorder) in series.items():
            smooth = moving_average(values, window)
            axes.plot(x, smooth, color=color, lw=width, zorder=zorder, label=label, marker=marker)
            stems.append((x[smooth.argmin()], smooth.min(), color, width))
            curves.append(dense(x, smooth, log_x=True))
        handles = axes.get_legend_handles_labels()[0]
        _delta_axis(axes, x)
        axes.margins(y=0.2)  # room for the stems below the curves
        axes.set_ylabel("NLL")
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        axes.yaxis.set_major_formatter(Decimals())
        right = axes.twinx() if test_errors is not None else None
        if right is not None:
            errors = 100 * moving_average(test_errors, window)
            handles += right.plot(x, errors, color=ORANGE, ls=(0, (3, 1)), marker=marker, label="Test error")
            right.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
            right.set_ylabel("Test error (%)", color=ORANGE)
            right.tick_params(axis="y", labelcolor=ORANGE)
            right.spines["top"].set_visible(False)
        legend = (right or axes).legend(
            handles=handles, loc="upper center", ncols=3, columnspacing=0.9, handlelength=1.2, borderaxespad=0
        )
        keep_clear(figure, axes, legend, curves, 4)
        low = axes.get_ylim()[0]
        for at, least, color, width in stems:  # vertical lines from the minima to the axis
            line = "-" if color == GRAY else (0, (1, 0.7))  # dotted, so that an overlapping line stays visible
            axes.plot([at, at], [low, least], color=color, lw=width / 2, ls=line, zorder=3 if color == GRAY else 4)
        axes.set_ylim(bottom=low)
        if right is not None:
            keep_clear(figure, right, legend, [dense(x, errors, log_x=True)], 3)
        return figure


def _delta_axis(axes: Axes, x: np.ndarray) -> None:
    """Set up a logarithmic axis for the L2 parameter that has labels even if it spans less than two decades."""
    axes.set_xlabel(r"L2 parameter $\delta$ (vertical lines: minima)")
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
    """Plot estimated against true deviations (Fig. 2).

    Args:
        true: ``(m,)`` deviations after retraining without each example.
        estimated: ``(m,)`` estimated deviations.
        text: Text for the upper-left corner, such as the correlations.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(2.6, grid="both")
        style = {"s": 14, "facecolor": "white", "edgecolor": BLUE, "linewidth": 0.8}
        axes.scatter(true, estimated, zorder=3, rasterized=len(true) > 5000, **style)
        axes.set(xlabel="True deviation (dashed: estimated = true)", ylabel="Estimated deviation")
        axes.autoscale_view()
        # The identity line, up to the largest L1 deviation, must not change the limits.
        axes.set_autoscale_on(False)
        axes.plot([0, 2], [0, 2], color=GRAY, lw=1.3, ls="--", zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        if text:
            corner = axes.text(0.02, 0.99, text, transform=axes.transAxes, va="top", fontsize=SMALL, zorder=4)
            corner.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})
            keep_clear(figure, axes, corner, [(true, estimated)], 3)
        return figure


def group_removal(true: np.ndarray, estimates: dict[str, np.ndarray]) -> Figure:
    """Plot estimated against true deviations of groups of examples, one panel per estimate (Fig. 6).

    Args:
        true: ``(G,)`` deviations after retraining without each group, positive.
        estimates: Maps titles of panels to estimated deviations ``(G,)``, positive.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(COLUMN * max(1.0, len(estimates) / 2), 2.2), layout="constrained")
        panels = figure.subplots(1, len(estimates), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (title, estimated) in zip(panels, estimates.items(), strict=True):
            axes.scatter(true, estimated, 14, "white", edgecolor=BLUE, linewidth=0.8, zorder=3)
            axes.axline((1, 1), (2, 2), color=GRAY, lw=1.3, ls="--", zorder=1)
            axes.grid(**GRID)
            axes.set_title(title)
        panels[0].set(xscale="log", yscale="log", ylabel="Estimated deviation")
        figure.supxlabel("True deviation (dashed: estimated = true)", fontsize=matplotlib.rcParams["axes.labelsize"])
        return figure


def ranked_bins(sensitivities: np.ndarray, bins: int = _BINS) -> np.ndarray:
    """Mean sensitivity of equal-size groups of examples, ranked by the last checkpoint, highest first.

    Args:
        sensitivities: ``(K, N)``, one row per checkpoint.
        bins: Number of groups, at most N. Group sizes differ by one if ``bins`` does not divide N.

    Returns:
        ``(K, bins)``.
    """
    order = np.argsort(-sensitivities[-1], kind="stable")
    parts = np.array_split(sensitivities[:, order], min(bins, len(order)), axis=1)
    return np.stack([part.mean(axis=1) for part in parts], axis=1)


def evolving(sensitivities: np.ndarray, labels: Sequence[str], bins: int = _BINS) -> Figure:
    """Plot the distribution of sensitivities over examples at several training checkpoints (Figs. 3b, 11).

    Args:
        sensitivities: ``(K, N)``, one row per checkpoint.
        labels: Names of the K checkpoints.
        bins: Number of groups of examples; see :func:`ranked_bins`.
    """
    curves = ranked_bins(sensitivities, bins)
    curves = curves[:, ::-1]  # most sensitive examples on the right
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(2.6)
        at = 100 * (np.arange(curves.shape[1]) + 0.5) / curves.shape[1]
        for k, (row, label) in enumerate(zip(curves, labels, strict=True)):
            marker = "o" if len(at) == 1 else None
            axes.plot(at, row, color=shade(len(curves) - 1 - k, len(curves)), label=label, marker=marker)
        axes.set_xlim(0, 100)
        axes.set(xlabel="Examples ranked by final sensitivity (percentile)", ylabel="Sensitivity")
        axes.set_ylim(bottom=min(0, curves.min()))
        many = {"ncols": -(-len(curves) // 9), "fontsize": SMALL, "handlelength": 1, "columnspacing": 0.8}
        legend = axes.legend(title="Checkpoint", loc="upper left", **(many if len(curves) > 6 else {}))
        keep_clear(figure, axes, legend, [dense(at, row) for row in curves], 2)
        return figure


@dataclass(frozen=True)
class LeaveClassOut:
    """One experiment of :func:`loco`: its name in the legend, and arrays ``(c,)`` over classes."""

    label: str
    classes: np.ndarray
    test_nlls: np.ndarray
    estimated_nll: np.ndarray
    accuracy_drops: np.ndarray


def loco(experiments: Sequence[LeaveClassOut]) -> Figure:
    """Plot the estimated loss of each class against the test loss after retraining without it (Figs. 3a, 11d).

    Numbers denote classes. The marker size shows the drop in test accuracy if the class is removed.

    Args:
        experiments: At least one experiment.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(3.3, grid="both")
        handles, points, areas, texts, colors = [], [], [], [], []
        for k, experiment in enumerate(experiments):
            color, marker = COLORS[k % len(COLORS)], MARKERS[k % len(COLORS)]
            hollow = (k + k // len(COLORS)) % 2 == 1
            face = "none" if hollow else color
            size = np.maximum(4 + 500 * experiment.accuracy_drops, _LEAST_SIZE)
            axes.scatter(
                experiment.test_nlls, experiment.estimated_nll, size, marker=marker, facecolor=face, edgecolor=color,
                alpha=0.8, linewidth=1, zorder=3,
            )  # fmt: skip
            key: dict[str, Any] = {
                "marker": marker,
                "color": color,
                "markerfacecolor": face,
                "markersize": 6,
                "markeredgewidth": 1,
            }
            handles.append(Line2D([], [], ls="", label=experiment.label, **key))
            points.append(np.column_stack([experiment.test_nlls, experiment.estimated_nll]))
            areas.append(size)
            texts += map(str, experiment.classes)
            colors += [color] * len(size)
        axes.set(xlabel="Test NLL after training without the class", ylabel="Estimated NLL")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        axes.margins(0.12)
        note = "Numbers: classes\nMarker area: loss of test accuracy"
        legend = axes.legend(
            handles=handles, title=note, title_fontsize=SMALL, alignment="left", loc="upper left", handletextpad=0.2
        )
        everything = np.concatenate(points)
        keep_clear(figure, axes, legend, [tuple(everything.T)], 12)
        number_markers(figure, axes, everything, np.concatenate(areas), texts, colors)
        return figure
