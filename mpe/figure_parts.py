"""Parts of figures: tick labels that differ, room for a legend, places for many labels, a window."""

import logging
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter

log = logging.getLogger(__name__)

_ANGLES = np.deg2rad(45 + np.array([0, -90, 90, 180, -45, 45, -135, 135, 22, -22, 67, -67, 112, -112, 157, -157]))
_REACHES = (2, 8, 16, 28, 44)  # points between a marker and its label


class Decimals(Formatter):
    """Tick labels with one decimal, or as many more as tell the ticks apart."""

    def __init__(self, least: int = 1) -> None:
        self.least = self.count = least

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of one tick."""
        return f"{x:.{self.count}f}"

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """The labels of all ticks."""
        self.count = self.least
        while self.count < 8 and not np.allclose(np.round(values, self.count), values, rtol=0, atol=1e-10):
            self.count += 1
        return [self(value) for value in values]


def keep_clear(figure: Figure, axes: Axes, corner: Artist, points: Sequence[tuple], pad: float) -> None:
    """Raise the upper end of a linear y axis until nothing lies behind an artist that hangs from the axes' top.

    Args:
        figure: The figure.
        axes: The axes to stretch.
        corner: A legend or text at the top.
        points: Pairs of arrays x and y in data coordinates; those of lines close together.
        pad: Points that must be free around each.
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
    """Points along the line through ``x`` (ascending) and ``y``, for :func:`keep_clear`."""
    at = np.geomspace(x[0], x[-1], 500) if log_x else np.linspace(x[0], x[-1], 500)
    return at, np.interp(np.log(at), np.log(x), y) if log_x else np.interp(at, x, y)


def place_labels(points: np.ndarray, radii: np.ndarray, sizes: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Centres for labels beside round markers: near their own, and off other markers and labels.

    Labels are placed one after the other, the most crowded first, each where it covers least.

    Args:
        points: ``(n, 2)`` centres of markers, in printer's points as everything here.
        radii: ``(n,)`` of the markers.
        sizes: ``(n, 2)`` widths and heights of the labels.
        frame: ``(2, 2)`` lower left and upper right corner that labels should not cross.

    Returns:
        ``(n, 2)`` centres.
    """
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    order = np.argsort(-(distances < 40).sum(axis=1), kind="stable")
    centres = np.full_like(points, np.nan)
    for i in order:
        direction = np.column_stack([np.cos(_ANGLES), np.sin(_ANGLES)])
        reach = radii[i] + np.asarray(_REACHES, dtype=float)
        offsets = (
            reach[:, None, None] * direction + np.clip(1.42 * direction, -1, 1) * sizes[i] / 2
        )  # (reaches, angles, 2)
        spots = (points[i] + offsets).reshape(-1, 2)
        low, high = spots - sizes[i] / 2, spots + sizes[i] / 2
        nearest = np.clip(points, low[:, None], high[:, None])  # (spots, n, 2)
        covered = np.linalg.norm(nearest - points, axis=2) < radii + 1
        done = ~np.isnan(centres[:, 0])
        apart = np.abs(spots[:, None] - centres[done]) - (sizes[i] + sizes[done]) / 2
        crossed = (apart < 0).all(axis=2).sum(axis=1)
        outside = ((low < frame[0]) | (high > frame[1])).any(axis=1)
        far = np.repeat(np.asarray(_REACHES) / 20, len(_ANGLES))
        turned = np.tile(np.arange(len(_ANGLES)) / 100, len(_REACHES))
        centres[i] = spots[np.argmin(3 * covered.sum(axis=1) + 6 * crossed + 6 * outside + far + turned)]
    return centres


def number_markers(
    figure: Figure, axes: Axes, data: np.ndarray, areas: np.ndarray, texts: list[str], colours: list[str]
) -> None:
    """Write each class's number beside its marker, with a thin line to it where they stand apart.

    Args:
        figure: The figure.
        axes: Its axes, with limits as they stay.
        data: ``(n, 2)`` centres of markers in data coordinates.
        areas: ``(n,)`` square points, of the markers.
        texts: n numbers.
        colours: n colours.
    """
    font = 20 if len(data) <= 10 else 15 if len(data) <= 40 else 8
    figure.draw_without_rendering()  # settles the limits
    scale = 72 / figure.dpi
    points = axes.transData.transform(data) * scale
    frame = axes.get_window_extent().get_points() * scale
    sizes = np.array([(0.62 * font * len(text), 0.8 * font) for text in texts])
    radii = np.sqrt(areas) / 2 + 1
    centres = place_labels(points, radii, sizes, frame)
    for xy, point, centre, text, colour, radius in zip(data, points, centres, texts, colours, radii, strict=True):
        far = np.linalg.norm(centre - point) > radius + 1.4 * font
        arrow = {"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkA": 0, "shrinkB": 3} if far else None
        style = {"fontsize": font, "color": colour, "ha": "center", "va": "center", "zorder": 4, "arrowprops": arrow}
        axes.annotate(text, xy, centre - point, textcoords="offset points", annotation_clip=False, **style)


def show(figure: Figure) -> None:
    """Open a window with a figure and wait until it closes; where there is no display, say so and go on."""
    from matplotlib import pyplot
    from matplotlib.backends import BackendFilter, backend_registry

    interactive = {name.lower() for name in backend_registry.list_builtin(BackendFilter.INTERACTIVE)}
    if pyplot.get_backend().lower() not in interactive:
        log.warning("--show: matplotlib finds no display (back end %s); see the files", matplotlib.get_backend())
        return
    pyplot.figure(figure)
    pyplot.show()
