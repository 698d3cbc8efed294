"""Scores of one training run: reductions of the recorded dynamics, and the run's per-seed score files.

Every reduction takes an array ``(epochs, total)`` with NaN where an example was not visited in an epoch, and returns
float64 ``(total,)``, NaN where an example was never visited. HIGH means atypical except for :func:`aum`, which is
stored negated. A window longer than the run shrinks to the epochs there are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from src.artifacts.io import file_digest, write_json, write_pickle
from src.cli import check_options, number, option
from src.errors import ArgumentError
from src.metrics import flatness
from src.metrics.score import Score

if TYPE_CHECKING:
    from torch import nn

    from src.datasets import Batches

log = logging.getLogger(__name__)

WINDOW = 10  # epochs; J of DUAL, Dyn-Unc and TDDS, and the early epochs of EL2N


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over axis 0 of what is not NaN; NaN where nothing is."""
    seen = ~np.isnan(values)
    count = seen.sum(axis=0)
    total = np.where(seen, values, 0.0).sum(axis=0, dtype=np.float64)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _std(values: np.ndarray) -> np.ndarray:
    """Unbiased deviation over axis 0 of what is not NaN; NaN where fewer than two values are."""
    seen = ~np.isnan(values)
    count = seen.sum(axis=0)
    spread = np.where(seen, (values - _mean(values)) ** 2, 0.0).sum(axis=0)
    return np.sqrt(np.divide(spread, count - 1, out=np.full(spread.shape, np.nan), where=count > 1))


def _windows(values: np.ndarray, wanted: int) -> list[np.ndarray]:
    """All sliding windows ``(J, total)``, as views."""
    length = min(len(values), wanted)
    return [values[start : start + length] for start in range(len(values) - length + 1)]


def _mean_over(parts: Iterable[np.ndarray]) -> np.ndarray:
    """The mean of arrays ``(total,)`` that come one by one, NaN left out."""
    total, count = 0.0, 0
    for part in parts:
        seen = ~np.isnan(part)
        total, count = total + np.where(seen, part, 0.0), count + seen
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def _last_seen(correct: np.ndarray) -> np.ndarray:
    """Each example's most recent value at every epoch: what was not visited repeats what came before."""
    steps = np.arange(len(correct))[:, None]
    latest = np.maximum.accumulate(np.where(np.isnan(correct), 0, steps), axis=0)
    return np.take_along_axis(correct, latest, axis=0)


def forgetting_events(correct: np.ndarray) -> np.ndarray:
    """Forgetting events: how often an example goes from right to wrong between consecutive visits.

    Toneva et al., ICLR 2019. A never-learned example gets 0 here, as in the published SAMIS files.

    Args:
        correct: ``(epochs, total)`` of 0, 1, NaN.
    """
    filled = _last_seen(correct)
    events = ((filled[:-1] == 1) & (filled[1:] == 0)).sum(axis=0).astype(np.float64)
    return np.where(np.isnan(correct).all(axis=0), np.nan, events)


def epochs_to_learn(correct: np.ndarray) -> np.ndarray:
    """Epochs to learn: the first epoch (from 1) from which an example stays right to the end.

    1 if it was never wrong, the last wrong epoch + 1 otherwise, NaN if it is wrong at its last visit (or was never
    visited).

    Args:
        correct: ``(epochs, total)`` of 0, 1, NaN.
    """
    steps = np.arange(1, len(correct) + 1)[:, None]
    learned = np.where(correct == 0, steps, 0).max(axis=0) + 1.0
    return np.where(_last_seen(correct)[-1] == 1, learned, np.nan)


def csl(loss: np.ndarray) -> np.ndarray:
    """Cumulative sample loss: the sum of an example's losses over training (Ravikumar et al., ICML 2025).

    An epoch without a visit counts with the example's mean loss, so that examples visited less often compare.
    """
    return _mean(loss) * len(loss)


def aum(margin: np.ndarray) -> np.ndarray:
    """Area under the margin: the mean over epochs of ``z_y - max_{c != y} z_c`` (Pleiss et al., NeurIPS 2020, eq. 1).

    LOW means atypical; it is stored negated.
    """
    return _mean(margin)


def dual(probability: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """DUAL: the mean over sliding windows of ``(1 - mean p_y) * std(p_y)`` (Cho et al., ICML 2025).

    The deviation is the unbiased one; windows hold J = 10 epochs.
    """
    return _mean_over((1.0 - _mean(w)) * _std(w) for w in _windows(probability, window))


def dyn_unc(probability: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Dynamic uncertainty: the mean over sliding windows of the deviation of ``p_y`` (He et al., CVPR-W 2024).

    Windows hold J = 10 epochs.
    """
    return _mean_over(_std(w) for w in _windows(probability, window))


def el2n(error_norm: np.ndarray, el2n_epochs: Sequence[int] = (1, WINDOW)) -> np.ndarray:
    """EL2N: the mean of ``||softmax(z) - onehot(y)||_2`` over some early epochs.

    Paul et al., NeurIPS 2021, definition 2.4.

    Args:
        error_norm: ``(epochs, total)``.
        el2n_epochs: The first and the last epoch (from 1, both included); a last one beyond the run means its last.

    Raises:
        ArgumentError: There is no such epoch.
    """
    first, last = el2n_epochs
    if not 1 <= first <= min(last, len(error_norm)):
        raise ArgumentError("el2n_epochs", f"{first} {last}: is no window of a run of {len(error_norm)} epochs")
    return _mean(error_norm[first - 1 : last])


def tdds(divergence: np.ndarray, window: int = WINDOW, decay: float = 0.9) -> np.ndarray:
    """TDDS: the variation of an example's information gain, late windows weighing most (Zhang et al., CVPR 2024).

    With ``d_t = KL(p_t || p_{t-1})``, each window of J epochs gives ``R_t = sum_j (d_j - mean d)^2``, and the
    score is ``sum_t decay (1 - decay)^(T - t) R_t``.

    Args:
        divergence: ``(epochs, total)``; the first epoch has none.
        window: J.
        decay: The weight of the newest window.
    """
    # The first epoch has nothing to diverge from.
    parts = []
    for part in _windows(divergence[1:], window):
        spread = (part - _mean(part)) ** 2
        parts.append(np.where(np.isnan(spread), 0.0, spread).sum(axis=0))
    weights = decay * (1.0 - decay) ** np.arange(len(parts) - 1, -1, -1)
    scores = np.tensordot(weights, np.stack(parts), axes=1)
    return np.where((~np.isnan(divergence[1:])).sum(axis=0) > 1, scores, np.nan)


_recorded = partial(Score, source="dynamics", folder="dynamics", cost="SGD run")

COUNTS = (
    _recorded(
        "forg",
        r"$F(x_i)$",
        "forgetting events",
        folder="forgettability",
        paper="Toneva et al. 2019",
        compute=forgetting_events,
        reads=("correct",),
        share_of_epochs=True,
        seed_file="forgettability_train.pkl",
    ),
    _recorded(
        "etl",
        r"$E2L(x_i)$",
        "epochs to learn",
        folder="forgettability",
        paper="SAMIS",
        compute=epochs_to_learn,
        reads=("correct",),
        share_of_epochs=True,
        missing=1.0,
        seed_file="epochs_to_learn_train.pkl",
    ),
)

REDUCTIONS = (
    _recorded(
        "csl",
        r"$\mathrm{CSL}(x_i)$",
        "cumulative sample loss",
        paper="Ravikumar et al. 2025",
        compute=csl,
        reads=("loss",),
    ),
    _recorded(
        "aum",
        r"$-\mathrm{AUM}(x_i)$",
        "area under the margin",
        paper="Pleiss et al. 2020",
        compute=aum,
        reads=("margin",),
        negated=True,
    ),
    _recorded(
        "dual",
        r"$\mathrm{DUAL}(x_i)$",
        "DUAL",
        paper="Cho et al. 2025",
        compute=dual,
        reads=("probability",),
        options=("window",),
        fewest_epochs=2,
    ),
    _recorded(
        "dyn_unc",
        r"$U(x_i)$",
        "dynamic uncertainty",
        paper="He et al. 2024",
        compute=dyn_unc,
        reads=("probability",),
        options=("window",),
        fewest_epochs=2,
    ),
    _recorded(
        "el2n",
        r"$\mathrm{EL2N}(x_i)$",
        "error norm, early epochs",
        paper="Paul et al. 2021",
        compute=el2n,
        reads=("el2n",),
        options=("el2n_epochs",),
    ),
    _recorded(
        "tdds",
        r"$\mathrm{TDDS}(x_i)$",
        "temporal dual-depth",
        paper="Zhang et al. 2024",
        compute=tdds,
        reads=("divergence",),
        options=("window",),
        fewest_epochs=3,
    ),
)

_WINDOWED = ", ".join(score.name for score in REDUCTIONS if "window" in score.options)


@dataclass(frozen=True)
class Windows:
    """Which epochs the windowed scores look at.

    Attributes:
        window: J, the epochs in a window.
        el2n_epochs: First and last epoch of EL2N, from 1.

    Raises:
        ArgumentError: A window has fewer than two epochs, or an epoch is below 1.
    """

    window: int = option(WINDOW, f"epochs in a window of {_WINDOWED}", number(int, 2))
    el2n_epochs: Sequence[int] = option(
        [1, WINDOW], "the epochs that el2n averages over", number(int, 1), nargs=2, metavar=("FIRST", "LAST")
    )

    def __post_init__(self) -> None:
        check_options(self)


PAPERS_WINDOWS = Windows()

# ------------------------------------------------------------------------------------------- the files of one run

SEED_FILES = {score.name: score.seed_file for score in (*COUNTS, *flatness.END_SCORES)}
HISTORY_FILES = ("forgettability_history.pkl", "epochs_to_learn_history.pkl")
RECORD_FILE = "end_of_training.json"  # the sha256 of each score file; folders of older versions lack it
NOT_VISITED = 255
_RUN_FILES = (*SEED_FILES.values(), *HISTORY_FILES)


def has_end_of_training_scores(folder: str | Path) -> bool:
    """Whether a run's folder of dynamics holds every file of ``write_end_of_training_scores``."""
    return all((Path(folder) / name).exists() for name in _RUN_FILES)


def remove_end_of_training_scores(folder: str | Path) -> None:
    """Remove what an earlier run left in a folder of dynamics."""
    for name in (RECORD_FILE, *_RUN_FILES):
        (Path(folder) / name).unlink(missing_ok=True)


def write_end_of_training_scores(
    folder: str | Path, model: nn.Module, batches: Batches, dynamics: Mapping[str, np.ndarray]
) -> list[Path]:
    """Measure the trained model, and write the scores of the run that the published formats have.

    Scores are dicts original index -> float, raw (not divided by epochs, not scaled), of the examples that were
    visited; an example that was never learned has NaN epochs to learn. Both histories are the correctness that the
    two scores are made of: uint8 ``(epochs, total)``, 255 where an example was not visited.

    Args:
        folder: The run's folder of dynamics.
        model: The trained model.
        batches: The training examples in order, un-augmented, on the model's device.
        dynamics: The recorded arrays ``(epochs, total)``; ``correct`` is used.

    Returns:
        The files.
    """
    folder, correct = Path(folder), dynamics["correct"]
    visited = np.flatnonzero(~np.isnan(correct).all(axis=0))
    scores = {score.name: score.from_dynamics(dynamics) for score in COUNTS}
    for score in reversed(flatness.END_SCORES):  # the order in which earlier versions recorded them
        values = score.compute(model, batches, total=correct.shape[1], progress=True)
        wrong = visited[~np.isfinite(values[visited])]
        if len(wrong):
            log.warning(
                "the %s of %d examples is not finite (indices %s); average_scores.py will refuse it",
                score.title,
                len(wrong),
                ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else ""),
            )
        scores[score.name] = values
    written = [
        write_pickle(folder / SEED_FILES[name], dict(zip(visited.tolist(), values[visited].tolist(), strict=True)))
        for name, values in scores.items()
    ]
    digests = {path.name: file_digest(path) for path in written}
    written.append(write_json(folder / RECORD_FILE, digests))  # before the files that complete the folder
    history = np.where(np.isnan(correct), NOT_VISITED, correct).astype(np.uint8)
    return written + [write_pickle(folder / name, history) for name in HISTORY_FILES]
