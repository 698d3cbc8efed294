"""Figures of scores: distributions, comparisons by rank, and the examples with the lowest and the highest scores.

Figures are built on matplotlib's object interface: no global state, no window, no back end to choose.
"""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from src.errors import ArgumentError
from src.formatting import FIGURE_DPI, FIGURE_GRID, FIGURE_STYLE

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
    # as scipy.stats.gaussian_kde, whose import takes longer than all the rest here
    width = len(scores) ** -0.2 * np.sqrt(np.cov(centres[used], aweights=counts[used]))
    points = np.linspace(scores.min(), scores.max(), _KDE_POINTS)
    bumps = np.exp(-0.5 * ((points[:, None] - centres[used]) / width) ** 2)
    return points, bumps @ counts[used] / (len(scores) * width * np.sqrt(2 * np.pi))


def density(scores: np.ndarray, label: str, title: str) -> Figure:
    """A filled kernel density estimate of scores ``(n,)``.

    Raises:
        ArgumentError: All scores are equal: they have no density.
    """
    if len(scores) < 2 or np.ptp(scores) == 0:
        raise ArgumentError(
            "modes", f"{title}: the chosen scores are all equal, so they have no density; choose more examples"
        )
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


def share_figure(indices: np.ndarray, values: np.ndarray, label: str, title: str, plot: str = "scatter") -> Figure:
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


ROWS_PER_BLOCK = 25  # of the overview; more classes go into further blocks beside the first
CLASSES_PER_PAGE = 100


def extremes(
    scores: np.ndarray, labels: np.ndarray, indices: np.ndarray, n: int
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The n lowest and n highest scored examples of each class, from one sort.

    Args:
        scores: ``(total,)`` by original index; NaN is left out.
        labels: ``(m,)`` classes of the examples at hand.
        indices: ``(m,)`` their original indices.
        n: How many; fewer where a class has fewer.

    Returns:
        Class to (positions of the lowest, ascending; positions of the highest, descending), positions in ``labels``.
        Ties are broken by index.
    """
    own = scores[indices]
    order = np.lexsort((indices, own, labels))
    order = order[~np.isnan(own[order])]
    sorted_labels = labels[order]
    result = {}
    for c in np.unique(labels):
        start, stop = np.searchsorted(sorted_labels, [c, c + 1])
        members = order[start:stop]
        result[int(c)] = (members[:n], members[::-1][:n].copy())  # torch takes no negative strides
    return result


def mosaic(images: np.ndarray, columns: int, gap_y: int, gap_x: int, split: int | None = None) -> np.ndarray:
    """Place images in rows on a white canvas.

    Args:
        images: uint8 ``(rows, columns, c, h, w)`` with c = 1 or 3.
        columns: How many columns.
        gap_y: Pixels below each row, room for a caption.
        gap_x: Pixels between columns.
        split: A column before which the gap is as wide as half an image.

    Returns:
        uint8 ``(H, W, 3)``.
    """
    rows, _, _, h, w = images.shape
    extra = w // 2 if split is not None else 0
    canvas = np.full((rows * (h + gap_y), columns * (w + gap_x) - gap_x + extra, 3), 255, dtype=np.uint8)
    for r in range(rows):
        for k in range(columns):
            left = k * (w + gap_x) + (extra if split is not None and k >= split else 0)
            canvas[r * (h + gap_y) : r * (h + gap_y) + h, left : left + w] = images[r, k].transpose(1, 2, 0)
    return canvas


def image_grid(
    images: Sequence[np.ndarray], captions: Sequence[Sequence[str]], row_labels: Sequence[str], title: str
) -> Figure:
    """One row of images per score, each with its score below it.

    Args:
        images: One uint8 array ``(n_r, c, h, w)`` per row.
        captions: One text per image.
        row_labels: The scores' symbols.
        title: What is shown.
    """
    columns, rows = max(map(len, images)), len(images)
    c, h, w = images[0].shape[1:]
    grid = np.full((rows, columns, c, h, w), 255, dtype=np.uint8)
    for r, row in enumerate(images):
        grid[r, : len(row)] = row
    gap_y, gap_x = max(1, round(0.2 * h)), max(1, round(0.04 * w))
    canvas = mosaic(grid, columns, gap_y, gap_x)
    side, left, top = _whole_pixels(1.15, w), 1.5, 0.55  # inches per image, for the row labels, for the title
    width, height = side * canvas.shape[1] / w, side * canvas.shape[0] / w
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(width + left + 0.1, height + top + 0.05))
        axes = _bare_axes(figure, left, 0.05, width, height, canvas)
        for r in range(rows):
            middle = r * (h + gap_y) + h / 2
            axes.text(-0.08 * w, middle, row_labels[r], ha="right", va="center", fontsize=20)
            for k, caption in enumerate(captions[r]):
                at = (k * (w + gap_x) + w / 2 - 0.5, r * (h + gap_y) + h - 0.5 + gap_y * 0.46)
                axes.text(*at, caption, ha="center", va="center", fontsize=10)
        _heading(figure, title)
        return figure


def overview(classes: Sequence[tuple[str, np.ndarray, np.ndarray]], n: int, symbol: str, title: str) -> list[Figure]:
    """All classes at a glance: per class the n lowest scored examples on the left, the n highest on the right.

    Args:
        classes: Name, and uint8 images ``(<= n, c, h, w)`` of the lowest and of the highest, per class.
        n: Images on each side.
        symbol: The score's symbol.
        title: What is shown.

    Returns:
        One figure per hundred classes.
    """
    pages = range(0, len(classes), CLASSES_PER_PAGE)
    return [_overview_page(classes[start : start + CLASSES_PER_PAGE], n, symbol, title) for start in pages]


def _overview_page(classes: Sequence[tuple[str, np.ndarray, np.ndarray]], n: int, symbol: str, title: str) -> Figure:
    top, apart = 0.95, 0.25  # inches
    names = 0.35 + min(1.4, 0.1 * max(len(name) for name, _, _ in classes))  # room for the longest, within reason
    blocks = -(-len(classes) // ROWS_PER_BLOCK)
    rows = -(-len(classes) // blocks)
    c, h, w = classes[0][1].shape[1:]
    side = _whole_pixels(0.62, w)
    gap = max(1, round(0.05 * w))
    block_width = side * (2 * n * (w + gap) - gap + w // 2) / w
    height = side * rows * (h + gap) / w
    with matplotlib.rc_context(FIGURE_STYLE):
        width = blocks * (names + block_width + apart)
        figure = Figure(figsize=(width, height + top))
        for b in range(blocks):
            part = classes[b * rows : (b + 1) * rows]
            grid = np.full((rows, 2 * n, c, h, w), 255, dtype=np.uint8)
            for r, (_, low, high) in enumerate(part):
                grid[r, : len(low)] = low
                grid[r, n : n + len(high)] = high[::-1]  # the most extreme examples stand at the outer edges
            canvas = mosaic(grid, 2 * n, gap, gap, split=n)
            x = names + b * (names + block_width + apart)
            axes = _bare_axes(figure, x, 0.0, block_width, height, canvas)
            for r, (name, _, _) in enumerate(part):
                size = _fitting(name, names - 0.2, 12)
                axes.text(-0.15 * w, r * (h + gap) + h / 2, name, ha="right", va="center", fontsize=size)
            middle = n * (w + gap) / 2
            for at, text in ((middle, f"lowest {symbol}"), (canvas.shape[1] - middle, f"highest {symbol}")):
                size = _fitting("highest S(x_i)", n * side + 0.25, 14)
                axes.text(at, -0.12 * h, text, ha="center", va="bottom", fontsize=size)
        _heading(figure, title)
        return figure


def _bare_axes(figure: Figure, x: float, y: float, width: float, height: float, canvas: np.ndarray) -> Axes:
    """Axes without ticks at a place in inches, showing a canvas pixel by pixel."""
    total_width, total_height = figure.get_size_inches()
    axes = figure.add_axes((x / total_width, y / total_height, width / total_width, height / total_height))
    rows, columns = canvas.shape[:2]
    image = _Mosaic(axes, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5), origin="upper")
    times = max(1, round(width * FIGURE_DPI / columns))
    image.set_data(canvas.repeat(times, axis=0).repeat(times, axis=1))
    axes.add_image(image)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.set_axis_off()
    return axes


def _whole_pixels(inches: float, pixels: int) -> float:
    """The width, about so many inches, at which each pixel of an image becomes a square of pixels in print.

    Images that are larger than their print are drawn with those inches, and resampled.
    """
    times = inches * FIGURE_DPI / pixels
    return inches if times < 1 else round(times) * pixels / FIGURE_DPI


class _Mosaic(AxesImage):
    """An image that fills its axes; it is not resampled where it has as many pixels as these, in PNG as in PDF."""

    def make_image(self, renderer: Any, magnification: float = 1.0, unsampled: bool = False) -> tuple:
        """The pixels, where they are drawn, and how they are scaled; see matplotlib."""
        rows, columns = self._A.shape[:2]
        box = self.axes.bbox
        if (rows, columns) != (round(magnification * box.height), round(magnification * box.width)):
            return super().make_image(renderer, magnification, unsampled)
        opaque = np.full((rows, columns, 1), 255, dtype=np.uint8)
        return np.concatenate([self._A, opaque], axis=2)[::-1], box.x0, box.y0, None


def _heading(figure: Figure, title: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(0.5, 1 - 0.12 / height, title, ha="center", va="top", fontsize=_fitting(title, width - 0.2, 16))


def _fitting(text: str, inches: float, largest: float) -> float:
    """The font size, at most ``largest``, at which a text is no wider than so many inches (a letter is 0.6 high)."""
    return min(largest, 72 * inches / (0.6 * max(len(text), 1)))


def class_grids(
    fetch: Callable[[np.ndarray], np.ndarray],
    positions: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
    row_labels: Sequence[str],
    title: str,
) -> Figure:
    """The grid of one class and one end: one row per score.

    Args:
        fetch: Positions ``(m,)`` to uint8 images ``(m, c, h, w)``.
        positions: Per row, the positions of its images.
        scores: Per row, their scores.
        row_labels: The scores' symbols.
        title: What is shown.
    """
    lengths = np.cumsum([len(row) for row in positions])[:-1]
    images = np.split(fetch(np.concatenate(positions)), lengths)
    return image_grid(images, [[f"{value:.3g}" for value in row] for row in scores], row_labels, title)
