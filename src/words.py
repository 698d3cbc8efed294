"""Amounts in words, for log lines and messages."""


def gib(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.1f} s"
