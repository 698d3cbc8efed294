"""The per-seed proxy files that a run with ``--measure_proxies`` leaves beside its dynamics."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import nn

from src import artifacts
from src.datasets import Batches
from src.metrics.dynamics_scores import epochs_to_learn, forgetting_events
from src.metrics.flatness import epsilon_flatness, input_curvature
from src.metrics.modes import MODES

log = logging.getLogger(__name__)

PER_SEED_FILES = {
    "forg": "forgettability_train.pkl",
    "etl": "epochs_to_learn_train.pkl",
    "flat": "hessian_flat_train.pkl",
    "eps": "epsilon_flat_train.pkl",
}
HISTORY_FILES = ("forgettability_history.pkl", "epochs_to_learn_history.pkl")
RECORD_FILE = "end_of_training.json"  # the sha256 of each score file; folders of older versions lack it
NOT_VISITED = 255


def has_end_of_training_scores(folder: str | Path) -> bool:
    """Whether a run's folder of dynamics holds every file of ``write_end_of_training_scores``."""
    return all((Path(folder) / name).exists() for name in (*PER_SEED_FILES.values(), *HISTORY_FILES))


def remove_end_of_training_scores(folder: str | Path) -> None:
    """Remove what an earlier run left in a folder of dynamics."""
    for name in (*PER_SEED_FILES.values(), RECORD_FILE, *HISTORY_FILES):
        (Path(folder) / name).unlink(missing_ok=True)


def write_end_of_training_scores(
    folder: str | Path, model: nn.Module, batches: Batches, dynamics: Mapping[str, np.ndarray]
) -> list[Path]:
    """Measure what the trained model tells, and write it with what was recorded, in the published formats.

    Scores are dicts original index -> float, raw (not divided by epochs, not scaled), of the examples that were
    visited; an example that was never learned has NaN epochs to learn. Both histories are the correctness that the
    two scores are made of: uint8 ``(epochs, total)``, 255 where an example was not visited.

    Args:
        folder: The run's folder of dynamics.
        model: The trained network.
        batches: The training examples in order, un-augmented, on the model's device.
        dynamics: The recorded arrays ``(epochs, total)``; ``correct`` is used.

    Returns:
        The files.
    """
    folder, correct = Path(folder), dynamics["correct"]
    visited = np.flatnonzero(~np.isnan(correct).all(axis=0))
    scores = {
        "forg": forgetting_events(correct),
        "etl": epochs_to_learn(correct),
        "flat": input_curvature(model, batches, total=correct.shape[1], progress=True),
        "eps": epsilon_flatness(model, batches, total=correct.shape[1], progress=True),
    }
    for mode in ("flat", "eps"):  # epochs to learn are NaN on purpose
        wrong = visited[~np.isfinite(scores[mode][visited])]
        if len(wrong):
            log.warning(
                "the %s of %d examples is not finite (indices %s); average_scores.py will refuse it",
                MODES[mode].title,
                len(wrong),
                ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else ""),
            )
    written = [
        artifacts.write_pickle(
            folder / PER_SEED_FILES[mode], dict(zip(visited.tolist(), values[visited].tolist(), strict=True))
        )
        for mode, values in scores.items()
    ]
    digests = {path.name: artifacts.file_digest(path) for path in written}
    written.append(artifacts.write_json(folder / RECORD_FILE, digests))  # before the files that complete the folder
    history = np.where(np.isnan(correct), NOT_VISITED, correct).astype(np.uint8)
    return written + [artifacts.write_pickle(folder / name, history) for name in HISTORY_FILES]
