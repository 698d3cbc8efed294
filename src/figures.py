"""The style of all figures: sizes, fonts, and colors.

Figures are drawn at print size (one column or one page wide), so font sizes are the printed sizes. This
module does not import matplotlib at its top level, because that would slow the start of every script.
"""

from typing import Any

COLUMN, PAGE = 3.3, 7.0  # widths in inches
DPI = 300  # print resolution of PNG files and of images in PDF files

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Categorical colors: the color-blind-safe palette of Okabe and Ito, without yellow, which is too light on white."""
BLUE, ORANGE = COLORS[:2]  # the first two, by name
BLACK = "black"  # the reference method
GRAY = "0.62"  # reference curves, such as the test loss
MUTED = "0.35"  # secondary text
SEQUENTIAL = "viridis"  # colormap for ordered series, such as epochs
DIVERGING = "RdBu_r"  # colormap for correlations
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d", "8", "H")
LIGHT = 0.25  # opacity of bands and filled areas

SMALL = 6.5  # smallest font size, in points
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "mathtext.fontset": "dejavusans",
    "pdf.fonttype": 42,  # TrueType: text stays text, and journals accept the file
}
STEPS = [1, 2, 2.5, 5, 10]  # allowed steps between ticks, times a power of ten
GRID: dict[str, Any] = {"color": "0.9", "linewidth": 0.6}


def shade(number: int, count: int) -> tuple[float, float, float, float]:
    """The color of one of ``count`` ordered series, from dark to light; the lightest is still visible on white."""
    from matplotlib import colormaps

    return colormaps[SEQUENTIAL](0.85 * number / max(count - 1, 1))
