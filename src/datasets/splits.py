"""Parts of a training set: the ten validation splits, and ``--subset N|FILE``; both keep the original indices."""

import re
from pathlib import Path

import numpy as np

from src import artifacts
from src.errors import ArgumentError, FileError, FlagError

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


COUNT = 10
FLAG = "--samis_validation_split_index"


def make_splits(labels: np.ndarray, num_classes: int, seed: int) -> list[np.ndarray]:
    """Ten disjoint stratified splits that cover the training part.

    Each of the first nine takes a tenth (rounded down) of each class; the tenth takes what remains. Bit-identical
    to the SAMIS authors' splits: numpy's RandomState, drawn split by split and class by class.

    Args:
        labels: Labels of the whole training part ``(n,)``.
        num_classes: Number of classes.
        seed: The run's seed.

    Returns:
        Ten int64 arrays of positions, grouped by class, in drawn order inside a class.
    """
    generator = np.random.RandomState(seed)
    remaining = [np.flatnonzero(np.asarray(labels) == label) for label in range(num_classes)]
    sizes = [len(members) // COUNT for members in remaining]
    splits = []
    for number in range(1, COUNT + 1):
        parts = []
        for label, members in enumerate(remaining):
            size = sizes[label] if number < COUNT else len(members)
            # choice refuses an empty class even for no draws
            drawn = generator.choice(members, size, replace=False) if len(members) else members
            parts.append(drawn)
            remaining[label] = np.setdiff1d(members, drawn)
        splits.append(np.concatenate(parts).astype(np.int64))
    return splits


def split_path(splits_folder: str | Path, dataset: str, seed: int, index: int) -> Path:
    """The file of validation split ``index``."""
    return artifacts.splits_folder(splits_folder, dataset, seed) / f"val_{index}.txt"


def validation_indices(
    splits_folder: str | Path, dataset: str, seed: int, index: int, labels: np.ndarray, num_classes: int
) -> np.ndarray:
    """The held-out positions of split ``index``, from its file; all ten files are made if it is missing.

    Several processes may call this at once: all write the same content.

    Args:
        splits_folder: The folder of splits.
        dataset: Name in paths.
        seed: The run's seed.
        index: 1 to 10.
        labels: Labels of the whole training part ``(n,)`` (of the whole, not of a subset).
        num_classes: Number of classes.

    Returns:
        int64 ``(m,)``, original positions in the file's order.

    Raises:
        FlagError: ``index`` is not 1 to 10, or there are too few examples for it.
        FileError: A file is not a split of these data, or could not be written.
    """
    if not 1 <= index <= COUNT:
        raise FlagError(f"{FLAG} {index}: must be from 1 to {COUNT}, or all")
    labels = np.asarray(labels)
    if index < COUNT and not (np.bincount(labels, minlength=num_classes) >= COUNT).any():
        raise FlagError(
            f"{FLAG} {index}: is empty, as no class of {dataset} has {COUNT} training examples; "
            f"take split {COUNT}, or more data"
        )
    folder = artifacts.splits_folder(splits_folder, dataset, seed)
    paths = [split_path(splits_folder, dataset, seed, number) for number in range(1, COUNT + 1)]
    if not all(path.exists() for path in paths):
        _write(folder, paths, make_splits(labels, num_classes, seed))
    return _checked(paths, index, labels, num_classes)


def partition(indices: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions within a set to train on and to leave out.

    Args:
        indices: Original positions of the set's examples ``(n,)``.
        held_out: Original positions of the split.

    Returns:
        Two ascending int64 arrays that together are 0 to n-1.
    """
    inside = np.isin(np.asarray(indices), held_out)
    return np.flatnonzero(~inside), np.flatnonzero(inside)


def _write(folder: Path, paths: list[Path], splits: list[np.ndarray]) -> None:
    """Write the missing files."""
    try:
        for path, split in zip(paths, splits, strict=True):
            if not path.exists():
                artifacts.write_text(path, "".join(f"{position}\n" for position in split.tolist()))
    except (OSError, FileError) as error:
        reason = getattr(error, "strerror", None) or getattr(error.__cause__, "strerror", None) or error
        raise FileError(
            f"{folder}: the validation splits could not be written ({reason}); give --splits_folder, a folder that "
            "can be written"
        ) from error


def _checked(paths: list[Path], index: int, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Read all splits, check that each has its share of each class and that they are disjoint; return one."""
    sizes = np.bincount(labels, minlength=num_classes)
    tenth = sizes // COUNT
    owner = np.zeros(len(labels), dtype=np.int64)
    wanted = None
    for number, path in enumerate(paths, start=1):
        share = tenth if number < COUNT else sizes - (COUNT - 1) * tenth
        try:
            split = artifacts.read_index_file(path) if share.sum() else np.zeros(0, dtype=np.int64)
        except FileError as error:
            raise FileError(f"{error}: delete {path.parent} to make all splits anew") from error
        mend = f"{path}: is not split {number} of these {len(labels)} training examples"
        advice = f"; delete {path.parent} to make the splits anew"
        if len(split) and split.max() >= len(labels):
            raise FileError(f"{mend} (it holds the index {split.max()}){advice}")
        if not np.array_equal(np.bincount(labels[split], minlength=num_classes), share):
            raise FileError(f"{mend} (it holds {len(split)} indices, or other classes, not {share.sum()}){advice}")
        if len(np.unique(split)) < len(split) or owner[split].any():
            other = owner[split][owner[split] > 0]
            where = f"in {paths[other[0] - 1].name} too" if len(other) else "there twice"
            raise FileError(f"{mend} (an index stands {where}){advice}")
        owner[split] = number
        if number == index:
            wanted = split
    return wanted
