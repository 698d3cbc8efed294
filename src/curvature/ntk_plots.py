"""Figures of kernel velocities: one panel per score, one line per epoch, a band over seeds."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from src.artifacts.figures import FIGURE_GRID, FIGURE_STYLE
from src.curvature.ntk_velocities import Velocities

COLOURS = matplotlib.colormaps["viridis"]
MARKERS = "osD^vP*X"


def velocity_figure(
    panels: Sequence[tuple[str, Sequence[Velocities]]], title: str, *, logarithmic: bool = False
) -> Figure:
    """Velocity against the place of a group in the order of a score.

    Args:
        panels: For each score its symbol and its velocities, one per epoch.
        title: What was trained, and on which data.
        logarithmic: Whether the velocities' axis is logarithmic, which tells late epochs apart.
    """
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(1.5 + 5.8 * len(panels), 5.6), layout="constrained")
        figure.suptitle(title, fontsize=16)
        axes_of = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        epochs = sorted({velocities.epoch for _, several in panels for velocities in several})
        for axes, (symbol, several) in zip(axes_of, panels, strict=True):
            for velocities in several:
                place = epochs.index(velocities.epoch)
                colour = COLOURS(0.9 * place / max(len(epochs) - 1, 1))
                mean, spread = velocities.values.mean(0), velocities.values.std(0)
                label = f"epoch {velocities.epoch}"
                axes.plot(
                    velocities.places,
                    mean,
                    f"{MARKERS[place % len(MARKERS)]}-",
                    color=colour,
                    ms=6,
                    lw=2,
                    label=label,
                )
                if len(velocities.seeds) > 1:
                    low = np.maximum(mean - spread, mean.min() / 10) if logarithmic else mean - spread
                    axes.fill_between(velocities.places, low, mean + spread, color=colour, alpha=0.2, lw=0)
            axes.grid(axis="y", **FIGURE_GRID)
            unit = "percentile" if all(v.in_percent for v in several) else "rank"
            axes.set_xlabel(f"examples in the order of {symbol} ({unit})")
            if logarithmic:
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
        axes_of[0].set_ylabel("kernel velocity")
        axes_of[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=13)
        return figure
