"""Formatting of quantities in log lines and messages."""


def gib(count: float) -> str:
    """Format a number of bytes, e.g. ``"1.5 GiB"``."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 2**power:
            return f"{count / 2**power:.{1 if power == 30 else 0}f} {unit}"
    return f"{count / 2**10:.0f} KiB"


def duration(seconds: float) -> str:
    """Format a number of seconds, e.g. ``"3.2 s"`` or ``"5 min"``."""
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.1f} s"


def literal(text: str) -> str:
    """Escape dollar signs, so that matplotlib does not render the text between them as a formula."""
    return text.replace("$", r"\$")
