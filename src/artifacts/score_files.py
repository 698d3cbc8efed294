"""Averaged score files: a pickle ``{index: score}`` in the published format, and a json that says how it was made.

The format: protocol 4, plain int keys in ascending order, float values, nothing that is not finite. A file that was
made on a subset holds the scored examples only, and its json gives the size of the whole part as ``total``. The json
also has the sha256 of the pickle, so that neither is ever read with another one's counterpart.
"""

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from src.artifacts.io import file_digest, read_json, read_npz, read_pickle, write_json, write_with
from src.artifacts.io import label_hash as hash_labels
from src.artifacts.store import check_settings_match
from src.errors import FileError

DERIVED = ("n", "total", "sha256")
"""What a record says of the scores themselves: how many there are, of how many examples, and their file's digest."""


def sidecar_path(path: str | Path) -> Path:
    """The json beside a score file."""
    return Path(path).with_suffix(".json")


def read_sidecar(path: str | Path) -> dict[str, Any]:
    """How a score file was made; empty where nothing is known (as for the published files).

    Raises:
        FileError: The json is damaged.
    """
    beside = sidecar_path(path)
    if not beside.exists():
        return {}
    record = read_json(beside)
    if not isinstance(record, dict):
        raise FileError(f"{beside}: holds no settings; delete it, or make the scores anew")
    return record


def write_scores(path: str | Path, scores: np.ndarray, record: Mapping[str, Any]) -> list[Path]:
    """Write an averaged score file and its json.

    Args:
        path: The pickle's path.
        scores: ``(total,)``, NaN where an example was not scored.
        record: How the scores were made; what ``DERIVED`` names is added.

    Returns:
        The two paths.

    Raises:
        FileError: Nothing was scored, or a score is infinite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    indices = np.flatnonzero(~np.isnan(scores))
    if not len(indices) or np.isinf(scores[indices]).any():
        raise FileError(f"{path}: not written, {'a score is infinite' if len(indices) else 'nothing was scored'}")
    content = pickle.dumps(dict(zip(indices.tolist(), scores[indices].tolist(), strict=True)), protocol=4)
    digest = hashlib.sha256(content).hexdigest()
    beside = {**record, "n": len(indices), "total": len(scores), "sha256": digest}

    def write(file: BinaryIO) -> None:
        # All that can fail comes first. If the process is killed before the scores follow their record, the record is
        # of this run, so that the same command may be repeated, and its digest tells that the scores are not.
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        write_json(sidecar_path(path), beside)

    return [write_with(path, write), sidecar_path(path)]


def read_scores(path: str | Path) -> np.ndarray:
    """Read a score file into an array by index.

    Returns:
        float64 ``(total,)``; NaN where a file made on a subset does not score an example.

    Raises:
        FileError: The file is missing or damaged, has holes, or holds anything but finite numbers by index.
    """
    content = read_pickle(path)
    if not isinstance(content, dict) or not content:
        raise FileError(f"{path}: is not a score file, which is a non-empty dict index -> score; make it anew")
    if any(not issubclass(kind, int | np.integer) or kind is bool for kind in set(map(type, content))):
        raise FileError(f"{path}: is not a score file, its keys are not all whole numbers; make it anew")
    try:
        keys = np.fromiter(content.keys(), np.int64, len(content))
        values = np.fromiter(content.values(), np.float64, len(content))
    except (TypeError, ValueError, OverflowError) as error:
        raise FileError(f"{path}: is not a score file, its scores are not all numbers; make it anew") from error
    if keys.min() < 0:
        raise FileError(f"{path}: has the negative index {keys.min()}; indices count from 0")
    if not np.isfinite(values).all():
        bad = keys[~np.isfinite(values)][0]
        raise FileError(f"{path}: the score of example {bad} is {content[bad]}; make the file anew")
    return _placed(path, keys, values)


def _placed(path: str | Path, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values by index, after checking that no example is missing without reason."""
    record = read_sidecar(path)
    total, scored = record.get("total", len(keys)), record.get("n", len(keys))
    if not isinstance(total, int) or total < 1:
        raise FileError(f"{sidecar_path(path)}: says that the part has {total} examples; make the scores anew")
    if record.get("sha256", digest := file_digest(path)) != digest:
        raise FileError(
            f"{path}: is not the file that {sidecar_path(path).name} describes; writing was interrupted, or one "
            "of them was replaced; repeat the command that makes both"
        )
    if scored != len(keys):
        raise FileError(f"{path}: holds {len(keys)} scores, its json says {scored}; make the file anew")
    if keys.max() >= total:
        holes = np.setdiff1d(np.arange(min(total, len(keys) + 1)), keys)
        which = f"has no score of example {holes[0]}" if len(holes) else f"scores more than {total} examples"
        raise FileError(f"{path}: {which} ({len(keys)} scores, highest index {keys.max()}); make it anew")
    scores = np.full(total, np.nan)
    scores[keys] = values
    return scores


def read_memorization(path: str | Path) -> np.ndarray:
    """Read Feldman and Zhang's estimates (key ``tr_mem``), un-normalised.

    Returns:
        float64 ``(n,)``.

    Raises:
        FileError: The file is missing, damaged, or holds no finite ``tr_mem``.
    """
    arrays = read_npz(path, ("tr_mem",))
    if "tr_mem" not in arrays:
        raise FileError(f"{path}: has no array 'tr_mem'; it is no memorization file, fetch it with fetch_scores.py")
    scores = arrays["tr_mem"]
    if scores.ndim != 1 or not len(scores) or scores.dtype.kind not in "fiu" or not np.isfinite(scores).all():
        raise FileError(f"{path}: 'tr_mem' is not one finite number per example; fetch it with fetch_scores.py")
    return scores.astype(np.float64)


def refuse_other_scores(path: str | Path, settings: Mapping[str, Any]) -> None:
    """Stop if a score file was made with other settings.

    Args:
        path: The file to be written.
        settings: What would determine its scores; those that the file's json does not name count as different.

    Raises:
        FileError: The settings differ.
    """
    if Path(path).exists():
        record = read_sidecar(path)
        check_settings_match(path, {name: record.get(name) for name in settings}, settings)


def _known_label_hash(path: Path, count: int) -> str | None:
    """The hash of the labels that a score file was made for, where it or its json knows them."""
    labels = read_npz(path, ("tr_labels",)).get("tr_labels") if path.suffix == ".npz" else None
    if labels is None:
        return read_sidecar(path).get("label_hash")
    if labels.shape != (count,) or labels.dtype.kind not in "iuf" or np.mod(labels, 1).any():
        raise FileError(f"{path}: 'tr_labels' is not one class per example; fetch it with fetch_scores.py")
    return hash_labels(labels)


def refuse_foreign(
    path: str | Path,
    scores: np.ndarray,
    n: int | None = None,
    label_hash: str | None = None,
    data_hash: str | None = None,
) -> None:
    """Stop if a score file is not of this data set.

    Args:
        path: The file, for the message and its json.
        scores: What was read from it.
        n: The size of the whole training part.
        label_hash: ``artifacts.label_hash`` of the whole part's labels; compared where the file's own are known.
        data_hash: ``ImageSet.digest``, likewise.

    Raises:
        FileError: The length, the labels or the images differ.
    """
    if n is not None and n != len(scores):
        raise FileError(
            f"{path}: scores {len(scores)} examples, the data set has {n}; give the scores of this data set"
        )
    known = _known_label_hash(Path(path), len(scores)) if label_hash else None
    if known and known != label_hash:
        raise FileError(
            f"{path}: was made for other labels (label hash {known}, this data set has {label_hash}); "
            "give the scores of this data set"
        )
    known = read_sidecar(path).get("data_hash")
    if data_hash and known and known != data_hash:
        raise FileError(
            f"{path}: was made for other images (data hash {known}, this data set has {data_hash}); "
            "give the scores of this data set"
        )
