"""Which training examples to use: ``--subset``, ``--exclude``, and the ten validation splits. Indices are kept."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from src.artifacts import paths
from src.artifacts.io import read_csv, read_index_file, read_text, write_text
from src.errors import ArgumentError, FileError

if TYPE_CHECKING:
    from src.datasets.files import Examples
    from src.datasets.registry import DataConfig

log = logging.getLogger(__name__)

SUBSET_SEED = 0  # independent of the run's seed, so that all runs use the same examples
COUNT = 10  # number of validation splits
ROUNDING = 1e-9  # tolerance for floating-point error: 0.55 * 6000 is slightly above 3300
ARGUMENT = "samis_validation_split_index"


def training_indices(config: DataConfig, examples: Examples) -> np.ndarray | None:
    """Return the training examples that a configuration selects.

    Examples drawn for testing are left out first, then those of ``exclude``. ``subset=N`` draws N of the remaining
    examples, and examples that a file of ``subset`` lists are left out if they do not remain.

    Args:
        config: The configuration with ``subset`` and ``exclude``.
        examples: All training examples.

    Returns:
        Original indices, int64 ``(m,)``, ascending; None for all examples.

    Raises:
        ArgumentError: ``subset`` is not from 1 to the number of remaining examples.
        FileError: A file is missing or lists unknown examples, or no example is left.
    """
    if config.subset is None and config.exclude is None and examples.drawn is None:
        return None
    total = len(examples.labels)
    kept = np.arange(total)
    if examples.drawn is not None:
        kept = np.setdiff1d(kept, examples.drawn)
    if config.exclude is not None:
        excluded = read_exclusions(config.exclude, examples)
        if not len(excluded) and config.subset is None and examples.drawn is None:
            return None
        before, kept = len(kept), np.setdiff1d(kept, excluded)
        log.info("excluded %d of %d training examples (--exclude %s)", before - len(kept), before, config.exclude)
        if ineffective := len(excluded) - (before - len(kept)):
            log.warning(
                "%s: %d of its examples were drawn for testing, and remain there", config.exclude, ineffective
            )
    if config.subset is not None:
        if _is_number(config.subset):
            kept = kept[parse_subset(config.subset, len(kept), examples.labels[kept])]
        else:
            kept = np.intersect1d(parse_subset(config.subset, total, examples.labels), kept)
        log.info("using %d of %d training examples (--subset)", len(kept), total)
    if not len(kept):
        where = config.exclude or config.subset
        raise FileError(f"{where}: leaves no training examples, apart from those drawn for testing; list others")
    return kept


def read_exclusions(path: str | Path, examples: Examples) -> np.ndarray:
    """Read the examples to exclude.

    Args:
        path: A text file with one index or file name per line, or a csv file with a column ``index``, or ``file``. A
            file name is relative to the data set's folder, as in our csv files, or any path of the file. A line of
            digits is an index.
        examples: All training examples.

    Returns:
        Original indices, int64 ``(m,)``, ascending and unique.

    Raises:
        FileError: The file is missing or empty, an index is out of range, or a name matches no training example.
    """
    path = Path(path).expanduser()
    rows = read_csv(path, stripped=False)
    total, files = len(examples.labels), examples.files
    columns = [cell.strip() for cell in rows[0]] if rows else []
    column = next((name for name in ("index", "file") if name in columns), None)
    if column is None:  # one per line, not split at commas, since names may contain commas and quotes
        lines = read_text(path).splitlines()
    else:
        at = columns.index(column)
        lines = [row[at] if at < len(row) else "" for row in rows[1:]]
    lines = [line for line in lines if line.strip() or column]
    if not lines and not column:  # a csv file without rows excludes nothing
        raise FileError(f"{path}: is empty; list one index or file name per line")
    numbers = {} if files is None or column == "index" else {name: index for index, name in enumerate(files)}
    found, unknown = set(), []
    for line in lines:
        if column != "file" and re.fullmatch(r"\d{1,18}", line.strip(), re.ASCII):
            if int(line) >= total:
                raise FileError(f"{path}: contains the index {line.strip()}; the training set has 0 to {total - 1}")
            found.add(int(line))
            continue
        names = (line, line.strip(), "" if files is None else files.relative(line.strip()))
        index = next((numbers[name] for name in names if name in numbers), None)
        if index is None:
            unknown.append(line.strip())
        else:
            found.add(index)
    if unknown:
        more = f" ({len(unknown)} lines do not)" if len(unknown) > 1 else ""
        known = (
            "list indices, because its images have no file names"
            if files is None
            else (f"names are relative to {files.root}, such as {files[0]}")
        )
        raise FileError(f"{path}: {unknown[0]!r} matches no training example of {examples.name}{more}; {known}")
    return np.array(sorted(found), dtype=np.int64)


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"\s*[+-]?\d+\s*", str(text)))


def parse_subset(text: str, total: int, labels: np.ndarray) -> np.ndarray:
    """Return the training examples selected by ``--subset``.

    A number N selects a fixed set of N examples with the same fraction of each class. Remainders go to the classes
    with the largest fractional parts, ties to the lower label. Anything else is a file with one index per line.

    Args:
        text: A number or a file.
        total: Number of training examples.
        labels: Labels of the training examples ``(total,)``.

    Returns:
        Indices, int64 ``(m,)``, ascending.

    Raises:
        ArgumentError: The number is below 1 or above ``total``.
        FileError: The file is missing, or contains an index that is out of range or repeated.
    """
    text = str(text).strip()
    if not text or re.fullmatch(r"[+-]?\d*\.\d*(e[+-]?\d+)?", text):
        raise ArgumentError("subset", f"{text!r}: give a whole number from 1 to {total}, or a file of indices")
    if not _is_number(text):
        path = Path(text).expanduser()
        positions = np.sort(read_index_file(path))
        twice = positions[1:][np.diff(positions) == 0]
        if positions[-1] >= total:
            raise FileError(f"{path}: contains the index {positions[-1]}; the training set has 0 to {total - 1}")
        if len(twice):
            raise FileError(f"{path}: contains the index {twice[0]} twice; list each index once")
        return positions
    count = int(text)
    if not 1 <= count <= total:
        raise ArgumentError("subset", f"{text}: must be from 1 to {total}, the number of training examples")
    labels = np.asarray(labels)
    classes, sizes = np.unique(labels, return_counts=True)
    budget, remainder = np.divmod(sizes * count, total)  # integer arithmetic, so that ties are exact
    budget[np.argsort(-remainder, kind="stable")[: count - budget.sum()]] += 1
    generator = np.random.RandomState(SUBSET_SEED)
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:share]
        for label, share in zip(classes, budget, strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def rounded_share(count: int, fraction: float) -> int:
    """Return ``fraction * count`` rounded half up, tolerating floating-point error."""
    return min(int(np.floor(fraction * count + 0.5 + ROUNDING)), count)


def make_splits(labels: np.ndarray, num_classes: int, seed: int) -> list[np.ndarray]:
    """Make ten disjoint stratified splits that cover the training set.

    Each of the first nine contains a tenth of each class, rounded down; the tenth contains the remaining examples.
    Identical to the SAMIS authors' splits: drawn with NumPy's RandomState, split by split and class by class.

    Args:
        labels: Labels of the full training set ``(n,)``.
        num_classes: Number of classes.
        seed: The run's seed.

    Returns:
        Ten int64 arrays of indices, grouped by class, in drawn order within each class.
    """
    generator = np.random.RandomState(seed)
    remaining = [np.flatnonzero(np.asarray(labels) == label) for label in range(num_classes)]
    sizes = [len(members) // COUNT for members in remaining]
    splits = []
    for number in range(1, COUNT + 1):
        parts = []
        for label, members in enumerate(remaining):
            size = sizes[label] if number < COUNT else len(members)
            # choice raises an error for an empty class, even for zero draws
            drawn = generator.choice(members, size, replace=False) if len(members) else members
            parts.append(drawn)
            remaining[label] = np.setdiff1d(members, drawn)
        splits.append(np.concatenate(parts).astype(np.int64))
    return splits


def validation_indices(
    splits_folder: str | Path, dataset: str, seed: int, index: int, labels: np.ndarray, num_classes: int
) -> np.ndarray:
    """Read the held-out indices of split ``index`` from its file. Missing files of the ten splits are written first.

    Several processes may call this at once; all write the same content.

    Args:
        splits_folder: The folder of splits.
        dataset: The data set's name in paths.
        seed: The run's seed.
        index: 1 to 10.
        labels: Labels of the full training set ``(n,)``.
        num_classes: Number of classes.

    Returns:
        Original indices in the file's order, int64 ``(m,)``.

    Raises:
        ArgumentError: ``index`` is not 1 to 10, or the split is empty because there are too few examples.
        FileError: A file is not a split of this training set, or cannot be written.
    """
    if not 1 <= index <= COUNT:
        raise ArgumentError(ARGUMENT, f"{index}: must be from 1 to {COUNT}, or all")
    sizes = np.bincount(labels, minlength=num_classes)
    if index < COUNT and sizes.max() < COUNT:
        raise ArgumentError(
            ARGUMENT,
            f"{index}: is empty, because no class of {dataset} has {COUNT} training examples; use split {COUNT}, or "
            "more data",
        )
    folder = paths.splits_folder(splits_folder, dataset, seed)
    files = [folder / f"val_{number}.txt" for number in range(1, COUNT + 1)]
    if not all(path.exists() for path in files):
        try:
            for path, split in zip(files, make_splits(labels, num_classes, seed), strict=True):
                if not path.exists():
                    write_text(path, "".join(f"{position}\n" for position in split.tolist()))
        except (OSError, FileError) as error:
            reason = getattr(error, "strerror", None) or getattr(error.__cause__, "strerror", None) or error
            raise FileError(
                f"{folder}: the validation splits could not be written ({reason}); set splits_folder to a writable "
                "folder"
            ) from error
    return _read_all(files, labels, sizes)[index - 1]


def _read_all(paths: list[Path], labels: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Read all splits, and check that they are disjoint and that each has the right number from each class."""
    owner = np.zeros(len(labels), dtype=np.int64)
    splits = []
    for number, path in enumerate(paths, start=1):
        share = sizes // COUNT if number < COUNT else sizes - (COUNT - 1) * (sizes // COUNT)
        remedy = f"delete {path.parent} to make all splits again"
        try:
            split = read_index_file(path) if share.sum() else np.zeros(0, dtype=np.int64)
        except FileError as error:
            raise FileError(f"{error}: {remedy}") from error
        fault = None
        if len(split) and split.max() >= len(labels):
            fault = f"contains the index {split.max()}"
        elif not np.array_equal(np.bincount(labels[split], minlength=len(sizes)), share):
            fault = f"contains {len(split)} indices, or the wrong classes, instead of {share.sum()} indices"
        elif len(np.unique(split)) < len(split):
            fault = "contains an index twice"
        elif owner[split].any():
            fault = f"shares an index with {paths[owner[split].max() - 1].name}"
        if fault:
            raise FileError(
                f"{path}: is not split {number} of these {len(labels)} training examples (it {fault}); {remedy}"
            )
        owner[split] = number
        splits.append(split)
    return splits
