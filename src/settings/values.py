"""Kinds of value that flags take: each turns text into a value, or says in a line what would be right."""

import argparse
import difflib
from typing import Any

from src.cli import SEED, file_name, fraction, number, whole_number, yes_or_no
from src.coresets import METHODS
from src.datasets import dataset_names


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


__all__ = [
    "SEED",
    "dataset",
    "device",
    "file_name",
    "fraction",
    "method_name",
    "number",
    "save_epochs",
    "whole_number",
    "yes_or_no",
]
