"""Figures of kernel velocities: the legend fits in the figure."""

import numpy as np
import pytest

from src.curvature.plots import velocity_figure
from src.curvature.results import Velocities


@pytest.mark.parametrize("panels", [1, 2, 4])
@pytest.mark.parametrize("seeds", [(3, 3), (3, 1)], ids=["the same seeds", "other seeds"])
def test_the_legend_fits(panels, seeds):
    positions, epochs = np.linspace(1, 99, 20), (1, 10, 20, 100, 150, 159)
    several = [
        Velocities(epoch, tuple(range(count)), positions, positions, np.full((count, 20), 0.1), True)
        for epoch, count in zip(epochs, (seeds[0],) * 5 + (seeds[1],), strict=True)
    ]
    figure = velocity_figure([("$S_L(x_i)$", several)] * panels, "title", logarithmic=True)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert [text.get_text()[:5] for text in legend.get_texts()] == ["Epoch"] * 6
