"""Figures of scores: distributions, comparisons by rank, and the examples with the lowest and the highest scores.

Figures are built with matplotlib's object interface, without global state, windows, or a choice of backend.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from src.datasets.files import short_name
from src.errors import ArgumentError
from src.figures import BLUE, COLUMN, DIVERGING, DPI, GRID, LIGHT, MUTED, PAGE, SMALL, STYLE
from src.formatting import literal

BINS = 50
_KDE_BINS, _KDE_POINTS = 2048, 512


def _figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title[:1].upper() + title[1:])
    axes.grid(axis="y", **GRID)
    return figure, axes


def histogram(scores: np.ndarray, label: str, title: str) -> Figure:
    """Plot a histogram with 50 bins. The count axis is logarithmic if one bin has more than half of the examples.

    Args:
        scores: ``(n,)``.
        label: The score's symbol.
        title: The names of the score and the data set.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(COLUMN, 2.2, f"{title} ({len(scores):,} examples)")
        counts, edges = np.histogram(scores, bins=BINS)
        axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=BLUE, edgecolor="white", lw=0.3)
        if counts.max() > len(scores) / 2:
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.7)
            axes.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel(label)
        axes.set_ylabel("Examples per bin")
        axes.margins(x=0.01)
        return figure


def kernel_density(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute a Gaussian kernel density estimate over the range of the scores (Scott's rule), with area 1.

    Kernels are reflected at the minimum and maximum score. Without reflection, kernel mass outside the range would be
    lost, and the density at 0, where many scores have most of their examples, would be too low by half. Scores are
    first put into fine bins, so the cost hardly depends on the number of scores.

    Args:
        scores: ``(n,)``, not all equal.

    Returns:
        Points and densities, ``(512,)`` each.
    """
    counts, edges = np.histogram(scores, bins=_KDE_BINS)
    centers = (edges[:-1] + edges[1:]) / 2
    used = counts > 0
    # The same bandwidth as scipy.stats.gaussian_kde, whose import takes longer than the rest of this function.
    width = len(scores) ** -0.2 * np.sqrt(np.cov(centers[used], aweights=counts[used]))
    points = np.linspace(scores.min(), scores.max(), _KDE_POINTS)
    heights = np.zeros(_KDE_POINTS)
    for mirrored in (centers, 2 * points[0] - centers, 2 * points[-1] - centers):
        kernels = np.exp(-0.5 * ((points[:, None] - mirrored[used]) / width) ** 2)
        heights += kernels @ counts[used]
    return points, heights / np.trapezoid(heights, points)


def density(scores: np.ndarray, label: str, title: str) -> Figure:
    """Plot a filled kernel density estimate of scores ``(n,)``.

    Raises:
        ArgumentError: All scores are equal, so they have no density.
    """
    if len(scores) < 2 or np.ptp(scores) == 0:
        raise ArgumentError(
            "modes", f"{title}: the selected scores are all equal, so they have no density; select more examples"
        )
    points, heights = kernel_density(scores)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(COLUMN, 2.2, f"{title} ({len(scores):,} examples)")
        axes.fill_between(points, heights, color=BLUE, alpha=LIGHT, lw=0)
        axes.plot(points[[0, *range(len(points)), -1]], [0, *heights, 0], color=BLUE, clip_on=False)
        axes.set_xlabel(label)
        axes.set_ylabel("Density")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.02)
        return figure


def share_figure(indices: np.ndarray, values: np.ndarray, label: str, title: str, plot: str = "scatter") -> Figure:
    """Plot each example's fraction of the sum of all scores against its index.

    Args:
        indices: ``(m,)`` original indices.
        values: ``(m,)`` fractions of the sum.
        label: The score's symbol.
        title: The names of the score and the data set.
        plot: ``"scatter"`` or ``"line"``.

    Raises:
        ArgumentError: ``plot`` is neither ``"scatter"`` nor ``"line"``.
    """
    if plot not in ("scatter", "line"):
        raise ArgumentError("plot", f"{plot!r}: unknown; choose scatter or line")
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(PAGE, 2.4, f"{title} ({len(indices):,} examples)")
        style = {"s": 4, "lw": 0} if plot == "scatter" else {"lw": 0.5}
        draw = axes.scatter if plot == "scatter" else axes.plot
        # A PDF with tens of thousands of vector markers would be too slow to display.
        draw(indices, values, color=BLUE, alpha=0.55, rasterized=True, **style)
        axes.set_xlabel("Index of the example")
        axes.set_ylabel(f"Share of the sum of {label}")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        return figure


def _heat_map(axes: Axes, matrix: np.ndarray, columns: Sequence[str], title: str) -> None:
    """Plot a matrix of correlations with its values. The distributions next to it name the rows."""
    axes.imshow(matrix, cmap=DIVERGING, vmin=-1, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(matrix):
        color = "white" if abs(value) > 0.65 else "black"
        text = "–" if np.isnan(value) else f"{value:.2f}"
        axes.text(j, i, text, ha="center", va="center", color=color, fontsize=SMALL)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title)


def _ridges(axes: Axes, scores: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """Plot one distribution per row: log counts of the scores, which are scaled to [0, 1]."""
    for row, values in enumerate(scores):
        values = values[~np.isnan(values)]
        spread = np.ptp(values) or 1.0
        counts, edges = np.histogram((values - values.min()) / spread, bins=60, range=(0, 1))
        heights = np.log1p(counts) / np.log1p(counts.max()) * 0.85
        top, bottom = row + 0.45 - heights, row + 0.45
        axes.stairs(top, edges, baseline=bottom, fill=True, color=BLUE, alpha=LIGHT, lw=0)
        axes.stairs(top, edges, baseline=None, color=BLUE, lw=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelsize=STYLE["axes.labelsize"])
    axes.spines[["left"]].set_visible(False)
    axes.set_xlim(0, 1)
    axes.set_xlabel("Score, scaled to [0, 1]")
    axes.set_title("Distribution (log counts)")


def comparison(
    scores: Sequence[np.ndarray],
    names: Sequence[str],
    columns: Sequence[str],
    matrices: dict[str, np.ndarray],
    title: str,
) -> Figure:
    """Plot several scores side by side: their distributions, and one heat map per correlation matrix.

    Args:
        scores: k arrays ``(n,)``; NaN is skipped.
        names: The symbols of the k rows.
        columns: The symbols of the c columns.
        matrices: Maps a heading to ``(k, c)`` correlations, in plotting order.
        title: The title of the figure.
    """
    ridges, names_width = 1.9, 0.5  # inches
    cell = np.clip((PAGE - ridges - names_width) / (len(matrices) * max(len(columns), 3)), 0.32, 0.45)
    map_width = max(cell * len(columns), 1.2)  # leaves room for the heading
    widths = [ridges, *[map_width] * len(matrices)]
    size = (names_width + sum(widths) + 0.2, 0.32 * max(len(names), 3) + 1.1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        _ridges(axes[0], scores, names)
        for place, (heading, matrix) in zip(axes[1:], matrices.items(), strict=True):
            _heat_map(place, matrix, columns, heading)
        figure.suptitle(title)
        return figure


ROWS_PER_BLOCK = 25  # in the overview; additional classes form additional blocks to the right
CLASSES_PER_PAGE = 100


def extremes(
    scores: np.ndarray, labels: np.ndarray, indices: np.ndarray, n: int
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Find the n examples with the lowest and the n with the highest scores in each class, with a single sort.

    Args:
        scores: ``(total,)`` by original index; NaN is skipped.
        labels: ``(m,)`` classes of the examples.
        indices: ``(m,)`` original indices of the examples.
        n: Number of examples; fewer if a class has fewer.

    Returns:
        Maps a class to the positions in ``labels`` of the lowest scores (ascending) and of the highest scores
        (descending). Ties are broken by index.
    """
    own = scores[indices]
    order = np.lexsort((indices, own, labels))
    order = order[~np.isnan(own[order])]
    sorted_labels = labels[order]
    result = {}
    for c in np.unique(labels):
        start, stop = np.searchsorted(sorted_labels, [c, c + 1])
        members = order[start:stop]
        result[int(c)] = (members[:n], members[::-1][:n].copy())  # torch does not support negative strides
    return result


def mosaic(images: np.ndarray, columns: int, gap_y: int, gap_x: int, split: int | None = None) -> np.ndarray:
    """Arrange images in rows on a white canvas.

    Args:
        images: uint8 ``(rows, columns, c, h, w)`` with c = 1 or 3.
        columns: Number of columns.
        gap_y: Pixels below each row, for a caption.
        gap_x: Pixels between columns.
        split: A column preceded by an additional gap of half an image width.

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


SMOOTH = 24
"""Images narrower than this many pixels are enlarged smoothly: an 8 x 8 digit is unrecognizable as squares."""
_CLASS_SIDE, _OVERVIEW_SIDE = 0.8, 0.41  # approximate inches per image


def image_grid(
    images: Sequence[np.ndarray],
    captions: Sequence[Sequence[str]],
    row_labels: Sequence[str],
    title: str,
    note: str = "",
) -> Figure:
    """Plot one row of images per score, with a caption below each image.

    Args:
        images: One uint8 array ``(n_r, c, h, w)`` per row.
        captions: One text of two or three lines per image.
        row_labels: The scores' symbols.
        title: The title of the figure.
        note: An explanation of the captions, in small type below the title.
    """
    columns, rows = max(map(len, images)), len(images)
    grid = np.full((rows, columns, *images[0].shape[1:]), 255, dtype=np.uint8)
    for r, row in enumerate(images):
        grid[r, : len(row)] = row
    grid, per_inch, smooth = _enlarged(grid, _CLASS_SIDE)
    h, w = grid.shape[-2:]
    lines = 1 + max(caption.count("\n") for row in captions for caption in row)
    gap_y, gap_x = round((0.07 + 0.11 * lines) * per_inch), max(1, round(0.04 * w))
    canvas = mosaic(grid, columns, gap_y, gap_x)
    left, top = 0.75, 0.45  # inches, for the row labels and for the title
    width, height = canvas.shape[1] / per_inch, canvas.shape[0] / per_inch
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width + left + 0.1, height + top + 0.05))
        axes = _bare_axes(figure, left, 0.05, width, height, canvas)
        for r in range(rows):
            middle = r * (h + gap_y) + h / 2
            axes.text(-0.08 * w, middle, row_labels[r], ha="right", va="center", fontsize=10)
            for k, caption in enumerate(captions[r]):
                at = (k * (w + gap_x) + w / 2 - 0.5, r * (h + gap_y) + h - 0.5 + 0.02 * per_inch)
                axes.text(*at, caption, ha="center", va="top", fontsize=SMALL, linespacing=1.1)
        _heading(figure, title, " ".join(filter(None, (note, smooth))))
        return figure


def overview(classes: Sequence[tuple[str, np.ndarray, np.ndarray]], n: int, symbol: str, title: str) -> list[Figure]:
    """Plot all classes, each with the n lowest-scored examples on the left and the n highest-scored on the right.

    Args:
        classes: Per class, its name and uint8 images ``(<= n, c, h, w)`` with the lowest and the highest scores.
        n: Number of images on each side.
        symbol: The score's symbol.
        title: The title of the figure.

    Returns:
        One figure per hundred classes.
    """
    pages = range(0, len(classes), CLASSES_PER_PAGE)
    return [_overview_page(classes[start : start + CLASSES_PER_PAGE], n, symbol, title) for start in pages]


def _overview_page(classes: Sequence[tuple[str, np.ndarray, np.ndarray]], n: int, symbol: str, title: str) -> Figure:
    top, apart = 0.65, 0.15  # inches
    names = 0.2 + min(0.9, 0.07 * max(len(name) for name, _, _ in classes))  # fits the longest name, up to a limit
    blocks = -(-len(classes) // ROWS_PER_BLOCK)
    rows = -(-len(classes) // blocks)
    grid = np.full((blocks * rows, 2 * n, *classes[0][1].shape[1:]), 255, dtype=np.uint8)
    for r, (_, low, high) in enumerate(classes):
        grid[r, : len(low)] = low
        grid[r, n : n + len(high)] = high[::-1]  # the most extreme examples are at the outer edges
    grid, per_inch, smooth = _enlarged(grid, _OVERVIEW_SIDE)
    h, w = grid.shape[-2:]
    gap = max(1, round(0.05 * w))
    block_width = (2 * n * (w + gap) - gap + w // 2) / per_inch
    height = rows * (h + gap) / per_inch
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(blocks * (names + block_width + apart), height + top))
        for b in range(blocks):
            canvas = mosaic(grid[b * rows : (b + 1) * rows], 2 * n, gap, gap, split=n)
            x = names + b * (names + block_width + apart)
            axes = _bare_axes(figure, x, 0.0, block_width, height, canvas)
            for r, (name, _, _) in enumerate(classes[b * rows : (b + 1) * rows]):
                size = _fitting(name, names - 0.1, 8)
                axes.text(-0.12 * w, r * (h + gap) + h / 2, name, ha="right", va="center", fontsize=size)
            middle = n * (w + gap) / 2
            for at, text in ((middle, f"Lowest {symbol}"), (canvas.shape[1] - middle, f"Highest {symbol}")):
                size = _fitting("Highest S(x_i)", n * w / per_inch + 0.15, 8)
                axes.text(at, -0.1 * h, text, ha="center", va="bottom", fontsize=size)
        _heading(figure, title, smooth)
        return figure


def _bare_axes(figure: Figure, x: float, y: float, width: float, height: float, canvas: np.ndarray) -> Axes:
    """Add axes without ticks at a position in inches, and show a canvas in them pixel by pixel."""
    total_width, total_height = figure.get_size_inches()
    axes = figure.add_axes((x / total_width, y / total_height, width / total_width, height / total_height))
    rows, columns = canvas.shape[:2]
    image = _Mosaic(axes, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5), origin="upper")
    image.set_data(canvas)
    axes.add_image(image)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.set_axis_off()
    return axes


def _enlarged(grid: np.ndarray, inches: float) -> tuple[np.ndarray, float, str]:
    """Enlarge images to print resolution: each pixel becomes a square, or tiny images are enlarged smoothly.

    Images with a higher resolution than the print are unchanged and resampled when they are drawn.

    Args:
        grid: uint8 ``(rows, columns, c, h, w)``.
        inches: Approximate printed width of each image.

    Returns:
        uint8 ``(rows, columns, c, times * h, times * w)``, their pixels per printed inch, and a note for the reader.
    """
    rows, columns, c, h, w = grid.shape
    times = round(inches * DPI / w) if inches * DPI >= w else 0
    if times == 0:
        return grid, w / inches, ""
    if w >= SMOOTH:
        return grid.repeat(times, axis=-2).repeat(times, axis=-1), DPI, ""
    size, smooth = (times * w, times * h), np.empty((rows * columns * c, times * h, times * w), dtype=np.uint8)
    for channel, enlarged in zip(grid.reshape(-1, h, w), smooth, strict=True):
        enlarged[:] = Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC)
    return smooth.reshape(rows, columns, c, *smooth.shape[1:]), DPI, f"{h} × {w} pixels, enlarged smoothly."


class _Mosaic(AxesImage):
    """An image that fills its axes. It is not resampled if it has as many pixels as the axes, in PNG and in PDF."""

    def make_image(self, renderer: Any, magnification: float = 1.0, unsampled: bool = False) -> tuple:
        """Return the pixels, their position, and their transform; see matplotlib's ``AxesImage.make_image``."""
        rows, columns = self._A.shape[:2]
        box = self.axes.bbox
        if (rows, columns) != (round(magnification * box.height), round(magnification * box.width)):
            return super().make_image(renderer, magnification, unsampled)
        opaque = np.full((rows, columns, 1), 255, dtype=np.uint8)
        return np.concatenate([self._A, opaque], axis=2)[::-1], box.x0, box.y0, None


def _heading(figure: Figure, title: str, note: str = "") -> None:
    width, height = figure.get_size_inches()
    for text, below, largest, color in ((title, 0.07, 9, "black"), (note, 0.24, SMALL, MUTED)):
        size = _fitting(text, width - 0.1, largest)
        figure.text(0.5, 1 - below / height, text, ha="center", va="top", fontsize=size, color=color)


def _fitting(text: str, inches: float, largest: float) -> float:
    """The font size, at most ``largest``, at which a text fits into ``inches`` (a letter is 0.6 em wide)."""
    return min(largest, 72 * inches / (0.6 * max(len(text), 1)))


def class_grids(
    fetch: Callable[[np.ndarray], np.ndarray],
    positions: Sequence[np.ndarray],
    indices: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
    row_labels: Sequence[str],
    title: str,
    files: Sequence[str] | None = None,
) -> Figure:
    """Plot the lowest or the highest scores of one class, with one row per score.

    Args:
        fetch: Maps positions ``(m,)`` to uint8 images ``(m, c, h, w)``.
        positions: Per row, the positions of its images.
        indices: Per row, the original indices of its images.
        scores: Per row, the scores of its images.
        row_labels: The scores' symbols.
        title: The title of the figure.
        files: The file of each example of the full set, by original index; None if there are none.
    """
    lengths = np.cumsum([len(row) for row in positions])[:-1]
    images = np.split(fetch(np.concatenate(positions)), lengths)
    captions = [
        [
            f"{index}\n{value:#.3g}" + ("" if files is None else f"\n{literal(short_name(files[index]))}")
            for index, value in zip(*row, strict=True)
        ]
        for row in zip(indices, scores, strict=True)
    ]
    shown = "index and score" if files is None else "index, score and file name"
    return image_grid(images, captions, row_labels, title, f"Below each image: {shown}.")


def agreement_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Plot each score's agreement with a reference against its cost, with intervals and the Pareto front.

    Scores of unknown cost are in a separate panel on the right. Each label is next to its point, shifted vertically
    as little as possible to avoid overlap.

    Args:
        rows: Rows of ``evaluation.evaluate``; those whose agreement is undefined are left out.
        title: The title of the figure.
    """
    measure = "auroc" if any(row["auroc"] is not None for row in rows) else "spearman"
    rows = [row for row in rows if row[measure] is not None]
    known = [row for row in rows if row["cost"] is not None]
    unknown = [row for row in rows if row["cost"] is None]
    panels = [panel for panel in (known, unknown) if panel]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PAGE, 3.6), layout="constrained")
        widths = [1 if panel is unknown and known else 4 for panel in panels] or [1]
        grid = figure.subplots(1, max(len(panels), 1), width_ratios=widths, sharey=True, squeeze=False)[0]
        figure.suptitle(title[:1].upper() + title[1:])
        grid[0].set_ylabel("AUROC" if measure == "auroc" else "Spearman's rank correlation")
        for axes, panel in zip(grid, panels, strict=False):
            axes.grid(axis="y", **GRID)
            costs = [0.5 if row["cost"] is None else row["cost"] for row in panel]
            for row, cost in zip(panel, costs, strict=True):
                best = row["pareto"]
                values = row[measure], row[f"{measure}_low"], row[f"{measure}_high"]
                low, high = (abs(values[0] - (values[0] if end is None else end)) for end in values[1:])
                color = BLUE if best else MUTED
                style: dict[str, Any] = {"fmt": "o", "zorder": 3} if best else {"fmt": "s", "zorder": 2}
                axes.errorbar(cost, values[0], [[low], [high]], color=color, lw=0.8, ms=4, **style)
            if panel is unknown:
                axes.set_xticks([])
                axes.set_xlim(0, 3 if known else 9)
                axes.set_xlabel("Cost unknown")
                continue
            front = sorted((row["cost"], row[measure]) for row in panel if row["pareto"])
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda cost, _: f"{cost:,g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("Cost (passes over the training set, forward and backward)")
            span = min(costs) / 1.6, max(costs) * 2.2
            axes.set_xlim(span)
            steps = [(x, y) for x, y in front] + [(span[1], front[-1][1])]
            axes.plot(
                *zip(*steps, strict=True), drawstyle="steps-post", color=BLUE, lw=1, zorder=1, label="Pareto front"
            )
            axes.legend(loc="lower right")
        figure.draw_without_rendering()  # fixes the limits, which the labels' positions depend on
        for axes, panel in zip(grid, panels, strict=False):
            _label_points(axes, panel, measure)
        return figure


def _label_points(axes: Axes, rows: Sequence[Mapping[str, Any]], measure: str) -> None:
    """Write each score's name to the right of its point; labels of the same column are moved apart vertically."""
    points = 72 / axes.figure.dpi
    places = np.array([(0.5 if row["cost"] is None else row["cost"], row[measure]) for row in rows], dtype=float)
    places = axes.transData.transform(places.reshape(-1, 2)) * points
    order = np.argsort(places[:, 1])
    heights, gap, width = places[:, 1].copy(), 1.15 * SMALL, 5.0 * SMALL
    for _ in range(200):  # push overlapping neighbors apart in equal parts
        moved = False
        for a, b in itertools.combinations(order, 2):
            near = abs(places[a, 0] - places[b, 0]) < width
            overlap = gap - (heights[b] - heights[a])
            if near and overlap > 0.05:
                heights[a] -= overlap / 2
                heights[b] += overlap / 2
                moved = True
        if not moved:
            break
    for row, y, height in zip(rows, places[:, 1], heights, strict=True):
        axes.annotate(
            row["score"],
            (0.5 if row["cost"] is None else row["cost"], row[measure]),
            (9, height - y),
            textcoords="offset points",
            fontsize=SMALL,
            va="center",
            color=BLUE if row["pareto"] else MUTED,
            bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8},
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "0.7", "shrinkA": 0, "shrinkB": 2},
        )
