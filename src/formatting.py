"""Amounts in words, for log lines and messages."""


def gib(count: float) -> str:
    """Bytes in words."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 2**power:
            return f"{count / 2**power:.{1 if power == 30 else 0}f} {unit}"
    return f"{count / 2**10:.0f} KiB"


def duration(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.1f} s"
