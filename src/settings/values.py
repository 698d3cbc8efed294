"""Kinds of value that flags take: each turns text into a value, or says in a line what would be right."""

import argparse
import difflib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from src.coresets import METHODS
from src.datasets import dataset_names


def number(
    kind: type,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
) -> Callable:
    """A type for finite numbers within bounds (a bound itself is excluded if it is open)."""

    def parse(text: str) -> Any:
        bounds = "an integer" if kind is int else "a finite number"
        if low is not None:
            bounds += f" {'above' if open_low else 'of at least'} {low}"
        if high is not None:
            bounds += f"{' and' if low is not None else ''} {'below' if open_high else 'at most'} {high}"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {bounds}") from None
        too_low = low is not None and (value <= low if open_low else value < low)
        too_high = high is not None and (value >= high if open_high else value > high)
        if not math.isfinite(value) or too_low or too_high:
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    return parse


def whole_number(low: int) -> Callable:
    """A type for counts, which the paper's commands may write as 100 or 100.0."""
    parse_any = number(float, low)

    def parse(text: str) -> int:
        value = parse_any(text)
        if value != int(value):
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {low}")
        return int(value)

    return parse


SEED = number(int, 0, 2**32 - 1)  # numpy's generators take no more


def dataset(text: str) -> str:
    """A type for ``--dataset``."""
    if text.split(":", 1)[0] in ("npz", "folder") and ":" in text:
        return text
    names = {name.lower(): name for name in dataset_names()}
    if text.lower() not in names:
        raise argparse.ArgumentTypeError(
            f"unknown data set {text!r}; choose from {', '.join(names)}, npz:FILE, folder:DIR"
        )
    return names[text.lower()]


def save_epochs(text: str) -> Any:
    """A type for ``--save_epochs``."""
    if text in ("all", "last"):
        return text
    try:
        epochs = sorted({int(part) for part in text.replace(",", " ").split()})
    except ValueError:
        epochs = []
    if not epochs or epochs[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not all, last, or epochs from 1 such as 10,11,40")
    return epochs


fraction = number(float, 0, 1, open_low=True)


def method_name(text: str) -> str:
    """A type for ``--coreset_func``; ``min_`` before a stored score's name is understood in both spellings."""
    names = {**{name: name for name in METHODS}, **{f"min_{m.needs.stored}": m.name for m in METHODS.values()}}
    if text not in names:
        close = difflib.get_close_matches(text, names, 1)
        hint = "several are separated by spaces; " if "," in text else f"did you mean {close[0]}? " if close else ""
        raise argparse.ArgumentTypeError(f"unknown method {text!r}; {hint}choose from {', '.join(METHODS)}")
    return names[text]


def device(text: str) -> str:
    """A type for ``--device``; whether the machine has it is seen when it is used."""
    if text not in ("cpu", "cuda") and not text.removeprefix("cuda:").isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; give cpu, cuda, or the index of a GPU")
    return text


def yes_or_no(text: str) -> bool:
    """A type for flags that take 1 or 0, or a word for it."""
    words = {"yes": True, "true": True, "t": True, "y": True, "1": True}
    words |= {"no": False, "false": False, "f": False, "n": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no; give 1 or 0")
    return words[text.lower()]


def file_name(text: str) -> str:
    """A type for the name of a file, without a folder."""
    if not text or text.startswith(".") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file; give one without folders")
    return text
