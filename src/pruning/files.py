"""Selection files: the chosen indices and weights, for this project's trainers and for anyone's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.artifacts import label_hash, parse_settings, read_npz, write_npz
from src.coresets import Selection
from src.errors import FileError
from src.pruning.pretraining import settings_hash
from src.session import Session

_LARGEST = 1e30  # of a weight: training computes in float32


def write_selection(
    path: Path, selection: Selection, session: Session, settings: Mapping[str, Any], seconds: float
) -> Path:
    """Write ``selection.npz``: original indices, weights, hashes of labels and images, settings (json), seconds.

    Args:
        path: The file.
        selection: In positions among the session's training examples.
        session: The session.
        settings: What determined it.
        seconds: What it took, pre-training aside.
    """
    names = session.train.indices.cpu().numpy()
    return write_npz(
        path,
        indices=names[selection.indices],
        weights=selection.weights,
        label_hash=label_hash(session.whole_train.labels.cpu().numpy()),
        data_hash=session.whole_train.digest or "",
        total=session.whole_train.total,
        settings=json.dumps(dict(settings), sort_keys=True),
        seconds=seconds,
    )


def read_selection(path: str | Path, session: Session) -> tuple[Selection, dict[str, Any]]:
    """Read a selection of anyone's making: ``indices``, and ``weights`` and more where the file has them.

    Returns:
        The selection in positions among the session's training examples, and its settings (empty if unknown).

    Raises:
        FileError: The file is missing or damaged, or does not fit the data.
    """
    arrays = read_npz(path)
    if "indices" not in arrays:
        raise FileError(f"{path}: has no array 'indices'; make it with select_coreset.py")
    names = session.train.indices.cpu().numpy()
    indices = np.asarray(arrays["indices"])
    weights = np.asarray(arrays.get("weights", np.ones(indices.shape)))
    _check_selection(path, indices, weights, arrays, session)
    order = np.argsort(indices)
    places = np.searchsorted(names, indices[order])
    inside = np.isin(indices[order], names)
    if not inside.all():
        outside = indices[order][~inside][0]
        raise FileError(
            f"{path}: holds example {outside}, which --subset leaves out; give the subset it was made with"
        )
    settings = parse_settings(path, arrays["settings"]) if "settings" in arrays else {}
    return Selection(places.astype(np.int64), weights[order].astype(np.float64)), settings


def _check_selection(
    path: str | Path, indices: Any, weights: Any, arrays: Mapping[str, Any], session: Session
) -> None:
    """Stop unless a selection file holds examples of this data set, each once, with weights that can be used."""
    whole = session.whole_train
    wanted = label_hash(whole.labels.cpu().numpy())
    stored = str(arrays.get("label_hash", wanted))
    if stored != wanted:
        raise FileError(f"{path}: was made for other data (its labels differ); make it with --dataset of this run")
    stored = str(arrays.get("data_hash", ""))
    if stored and whole.digest and stored != whole.digest:
        raise FileError(f"{path}: was made for other data (its images differ); make it with --dataset of this run")
    if indices.ndim != 1 or not len(indices) or indices.dtype.kind not in "iu":
        raise FileError(
            f"{path}: 'indices' is no list of whole numbers (of a mask, take numpy's flatnonzero); make it anew"
        )
    if indices.min() < 0 or indices.max() >= whole.total:
        raise FileError(f"{path}: holds indices outside 0 to {whole.total - 1}, the training part's; make it anew")
    if len(np.unique(indices)) < len(indices):
        raise FileError(f"{path}: holds an index twice; each may stand there once")
    right = weights.shape == indices.shape and weights.dtype.kind in "fiu" and np.isfinite(weights).all()
    if not right or (weights < 0).any() or not (weights > 0).any() or weights.max() > _LARGEST:
        raise FileError(f"{path}: 'weights' is not one number from 0 to {_LARGEST:g} per index; make it anew")


def selection_digest(selection: Selection) -> str:
    """16 hex digits that stand for indices and weights."""
    return settings_hash({"indices": selection.indices.tolist(), "weights": selection.weights.tolist()})


def weights_tensor(selection: Selection) -> torch.Tensor | None:
    """The sample weights of training; None where all are 1."""
    return torch.from_numpy(selection.weights) if selection.weighted else None
