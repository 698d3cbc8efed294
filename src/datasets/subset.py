"""``--subset N|FILE``: part of the training examples, with their original indices."""

import re
from pathlib import Path

import numpy as np

from src import artifacts
from src.errors import ArgumentError, FileError

SUBSET_SEED = 0  # the same examples whatever the run's seed


def parse_subset(text: str, total: int, labels: np.ndarray) -> np.ndarray:
    """The examples that ``--subset`` names.

    A number takes that many, the same share of each class (remainders go to the classes with the largest
    fraction, the lower label first), always the same ones. Anything else is a file with one index per line.

    Args:
        text: The flag's value.
        total: Number of training examples.
        labels: Their labels ``(total,)``.

    Returns:
        int64 ``(m,)``, ascending.

    Raises:
        ArgumentError: The number is below 1 or above ``total``.
        FileError: The file is missing, or holds an index out of range or twice.
    """
    text = str(text).strip()
    if not text or re.fullmatch(r"[+-]?\d*\.\d*(e[+-]?\d+)?", text):
        raise ArgumentError("subset", f"{text!r}: give a whole number from 1 to {total}, or a file of indices")
    if not re.fullmatch(r"[+-]?\d+", text):
        return _from_file(Path(text).expanduser(), total)
    count = int(text)
    if not 1 <= count <= total:
        raise ArgumentError("subset", f"{text}: must be from 1 to {total}, the number of training examples")
    return _stratified(count, np.asarray(labels))


def _from_file(path: Path, total: int) -> np.ndarray:
    positions = np.sort(artifacts.read_index_file(path))
    if positions[-1] >= total:
        raise FileError(f"{path}: holds the index {positions[-1]}; the training part has 0 to {total - 1}")
    twice = positions[1:][positions[1:] == positions[:-1]]
    if len(twice):
        raise FileError(f"{path}: holds the index {twice[0]} twice; each may stand there once")
    return positions


def _stratified(count: int, labels: np.ndarray) -> np.ndarray:
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * count  # in units of 1 / len(labels): whole numbers, so that ties are exact
    budget, remainder = np.divmod(exact, len(labels))
    for place in np.argsort(-remainder, kind="stable")[: count - budget.sum()]:
        budget[place] += 1
    generator = np.random.RandomState(SUBSET_SEED)
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:share]
        for label, share in zip(classes, budget, strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)
