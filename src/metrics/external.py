"""Read per-example scores from the file formats of other projects."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from src.artifacts.io import read_csv, read_json, read_npy, read_npz, read_pickle
from src.errors import FileError

FORMATS = (
    ".npy, .npz (one array, or one named scores), .csv (columns index,score, or one column), .json or .pkl (list or "
    "dict)"
)


def read_external(path: str | Path, n: int) -> np.ndarray:
    """Read the scores in a file of another project. The format follows from the file name's extension.

    A list, an array, or a csv file with one column has one score for each of the ``n`` examples, in the order of the
    training set. A dict, or a csv file with the columns index and score, may leave examples out. A pickle may contain
    only plain values and is interpreted without running code.

    Args:
        path: A file in one of ``FORMATS``.
        n: The number of examples in the training set.

    Returns:
        float64 ``(n,)``, as in the file; NaN for examples that the file leaves out.

    Raises:
        FileError: The file is missing, damaged, in another format, or does not fit ``n`` examples, or a score is not
            a finite number.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise FileError(f"{path}: its extension is not that of a score file; give {FORMATS}")
    content = _READERS[suffix](path)
    if isinstance(content, dict):
        return _by_index(path, content.items(), n)
    values: np.ndarray | None
    try:
        array = np.asarray(content)
        values = array.astype(np.float64) if array.dtype.kind in "biuf" else None
    except (ValueError, OverflowError):  # ragged lists, or huge integers
        values = None
    if values is None:
        raise FileError(f"{path}: does not contain one number per example; give {FORMATS}")
    if values.shape != (n,):
        size = f"{len(values)} scores" if values.ndim == 1 else f"an array of shape {values.shape}"
        raise FileError(
            f"{path}: has {size}, but the training set has {n} examples; give one score per example in the order of "
            "the training set, or index and score of some"
        )
    return _finite(path, values, np.arange(n))


def read_numbers(path: str | Path) -> np.ndarray:
    """Read a list of numbers of any length, such as indices, a mask, or labels; of a data set file, ``y_train``.

    Returns:
        bool, integers, or float64, ``(m,)``.

    Raises:
        FileError: The file is missing, damaged, or does not contain a list of numbers.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise FileError(f"{path}: its extension is not that of a list of numbers; give .npy, .npz, .csv or .json")
    content = read_npz(path, ("y_train",)).get("y_train") if suffix == ".npz" else None
    try:
        values = np.asarray(_READERS[suffix](path) if content is None else content)
    except (ValueError, OverflowError):  # ragged lists, or huge integers
        values = np.array(None)
    if values.ndim != 1 or not values.size or values.dtype.kind not in "biuf":
        raise FileError(f"{path}: does not contain a list of numbers; give one index, bool or label per entry")
    return values


def _read_npz(path: Path) -> np.ndarray:
    arrays = read_npz(path)
    if "scores" in arrays:
        return arrays["scores"]
    if len(arrays) != 1:
        names = ", ".join(sorted(arrays)[:10]) or "none"
        raise FileError(f"{path}: has {len(arrays)} arrays ({names}), expected one; save the scores alone")
    return next(iter(arrays.values()))


def _read_csv(path: Path) -> Any:
    """Return a list of scores, or a dict of the text of each index and score. A header line is optional."""
    rows = read_csv(path)
    header = [cell.lower() for cell in rows[0]] if rows and not _is_number(rows[0][-1]) else None
    lines = rows[1:] if header else rows
    if not lines:
        raise FileError(f"{path}: has no scores; give {FORMATS}")
    width = len(rows[0])
    if uneven := [number for number, row in enumerate(rows, 1) if len(row) != width]:
        raise FileError(f"{path}: row {uneven[0]} has {len(rows[uneven[0] - 1])} columns, expected {width}")
    columns = (0, 1)
    if header and width > 1:
        missing = [name for name in ("index", "score") if header.count(name) != 1]
        if missing:
            raise FileError(f"{path}: has no single column {missing[0]!r}; name the columns index and score")
        columns = (header.index("index"), header.index("score"))
    elif width > 2:
        raise FileError(f"{path}: has {width} columns and no header; name the columns index and score")
    scores = [row[columns[1] if width > 1 else 0] for row in lines]
    if wrong := [text for text in scores if not _is_number(text)]:
        raise FileError(f"{path}: the score {wrong[0]!r} is not a number; correct it, or leave this example out")
    if width == 1:
        return [float(text) for text in scores]
    indices = [row[columns[0]] for row in lines]
    if len(set(indices)) < len(indices):
        twice = next(text for text in indices if indices.count(text) > 1)
        raise FileError(f"{path}: lists index {twice} more than once; keep one row per example")
    return {index: float(text) for index, text in zip(indices, scores, strict=True)}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _by_index(path: Path, items: Iterable[tuple[Any, Any]], n: int) -> np.ndarray:
    """Convert pairs of index (an integer, or its text) and score to an array."""
    pairs = list(items)
    try:
        # json has only text as keys
        keys = [int(key) for key, _ in pairs]
        whole = all(isinstance(key, str) or key == number for (key, _), number in zip(pairs, keys, strict=True))
        values = np.array([float(value) for _, value in pairs], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not pairs or not whole:
        raise FileError(f"{path}: does not map indices (integers from 0) to numbers; give {FORMATS}")
    if wrong := [key for key in keys if not 0 <= key < n]:
        raise FileError(f"{path}: has index {wrong[0]}, but the training set has examples 0 to {n - 1}")
    if len(set(keys)) < len(keys):
        raise FileError(f"{path}: lists an index more than once; keep one score per example")
    scores = np.full(n, np.nan)
    scores[keys] = _finite(path, values, np.array(keys))
    return scores


def _finite(path: Path, values: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return the scores after checking that each is finite."""
    if not (good := np.isfinite(values)).all():
        first = np.flatnonzero(~good)[0]
        raise FileError(
            f"{path}: the score of example {indices[first]} is {values[first]}; correct it, or leave this example "
            "out in a csv file with the columns index,score"
        )
    return values


_READERS = {
    ".npy": read_npy,
    ".npz": _read_npz,
    ".csv": _read_csv,
    ".json": read_json,
    ".pkl": read_pickle,
    ".pickle": read_pickle,
}
