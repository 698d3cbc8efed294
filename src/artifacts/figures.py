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


def literal(text: str) -> str:
    """A name of the user's own, drawn as it is: matplotlib reads what is between two dollar signs as a formula."""
    return text.replace("$", r"\$")
