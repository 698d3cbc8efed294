"""How every figure looks: sizes, type, colors.

Figures are drawn at the size at which a paper prints them, one column or one page wide, so that font sizes are those
of the printed page. All are built on matplotlib's object interface: no global state, no window, and no backend to
choose. This module does not import matplotlib, whose import takes longer than most scripts need to start.
"""

COLUMN, PAGE = 3.3, 7.0  # widths in inches
DPI = 300  # of PNG files, and of images in PDF files: the resolution of print

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""For categories: the palette of Okabe and Ito, safe for color-blind readers, without yellow, which is too light."""
BLUE, ORANGE = COLORS[:2]  # the first two: one series, and what is set against it
BLACK = "black"  # the reference that other lines are compared with
GRAY = "0.62"  # what is known without a method, such as the test loss
MUTED = "0.35"  # secondary text
SEQUENTIAL = "viridis"  # for ordered things, such as epochs
DIVERGING = "RdBu_r"  # for correlations
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d", "8", "H")
LIGHT = 0.25  # opacity of bands and fills

SMALL = 6.5  # points: the smallest type
STYLE = {
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
    "pdf.fonttype": 42,  # TrueType: text stays text, and journals accept it
}
STEPS = [1, 2, 2.5, 5, 10]  # between ticks, times a power of ten
GRID = {"color": "0.9", "linewidth": 0.6}


def shade(number: int, count: int) -> tuple[float, float, float, float]:
    """The color of one of several ordered series, dark to light; the lightest is still visible on white."""
    from matplotlib import colormaps

    return colormaps[SEQUENTIAL](0.85 * number / max(count - 1, 1))
