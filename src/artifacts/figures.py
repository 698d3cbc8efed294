"""How every figure looks: matplotlib settings, and the lines of the grid."""

FIGURE_STYLE = {
    "font.size": 15,
    "axes.titlesize": 16,
    "axes.labelsize": 17,
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "pdf.fonttype": 42,
}
FIGURE_GRID = {"color": "0.88", "linewidth": 0.8}
