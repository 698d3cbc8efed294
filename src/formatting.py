"""How amounts are written in log lines and messages, and how every figure looks."""

FIGURE_STYLE = {  # matplotlib settings
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
FIGURE_DPI = 200  # of PNG files, and of images in PDF files: that of print
FIGURE_GRID = {"color": "0.88", "linewidth": 0.8}  # lines of the grid


def gib(count: float) -> str:
    """Bytes in words."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 2**power:
            return f"{count / 2**power:.{1 if power == 30 else 0}f} {unit}"
    return f"{count / 2**10:.0f} KiB"


def duration(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.1f} s"


def literal(text: str) -> str:
    """A text that matplotlib draws as it is: without this, what is between two dollar signs would be a formula."""
    return text.replace("$", r"\$")
