"""Scores that are reductions of the dynamics recorded during training.

Every function takes arrays ``(epochs, total)`` with NaN where an example was not visited in an epoch, and returns
float64 ``(total,)``, NaN where an example was never visited. HIGH means atypical but for :func:`aum`, whose sign is
turned when it is stored. A window longer than the run shrinks to the epochs there are; at least two are needed where
a deviation is taken.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from src.errors import ArgumentError

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


def _window(epochs: int, wanted: int, score: str) -> int:
    """The window's length: ``wanted``, or all epochs of a shorter run."""
    if min(epochs, wanted) < 2:
        raise ArgumentError(
            "modes",
            f"{score}: needs at least 2 recorded epochs, there are {epochs}; leave it out, or train longer",
        )
    return min(epochs, wanted)


def _windows(values: np.ndarray, wanted: int, score: str) -> list[np.ndarray]:
    """All sliding windows ``(J, total)``, as views."""
    length = _window(len(values), wanted, score)
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
    return _mean_over((1.0 - _mean(w)) * _std(w) for w in _windows(probability, window, "dual"))


def dyn_unc(probability: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Dynamic uncertainty: the mean over sliding windows of the deviation of ``p_y`` (He et al., CVPR-W 2024).

    Windows hold J = 10 epochs.
    """
    return _mean_over(_std(w) for w in _windows(probability, window, "dyn_unc"))


def el2n(error_norm: np.ndarray, first: int = 1, last: int = WINDOW) -> np.ndarray:
    """EL2N: the mean of ``||softmax(z) - onehot(y)||_2`` over epochs ``first`` to ``last`` (from 1, both included).

    Paul et al., NeurIPS 2021, definition 2.4: an early score. ``last`` beyond the run means its last epoch.

    Raises:
        ArgumentError: The window holds no epoch.
    """
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
    for part in _windows(divergence[1:], window, "tdds"):
        spread = (part - _mean(part)) ** 2
        parts.append(np.where(np.isnan(spread), 0.0, spread).sum(axis=0))
    weights = decay * (1.0 - decay) ** np.arange(len(parts) - 1, -1, -1)
    scores = np.tensordot(weights, np.stack(parts), axes=1)
    return np.where((~np.isnan(divergence[1:])).sum(axis=0) > 1, scores, np.nan)


@dataclass(frozen=True)
class Windows:
    """Which epochs the windowed scores look at.

    Attributes:
        length: J of DUAL, Dyn-Unc and TDDS.
        el2n_epochs: First and last epoch of EL2N, from 1.
    """

    length: int = WINDOW
    el2n_epochs: tuple[int, int] = (1, WINDOW)

    def facts(self, mode: str) -> dict[str, object]:
        """What of this determines a mode's scores."""
        if mode == "el2n":
            return {"el2n_epochs": list(self.el2n_epochs)}
        return {"window": self.length} if mode in ("dual", "dyn_unc", "tdds") else {}


# mode -> the reduction of one run's arrays; the names are those of the recorded arrays
REDUCTIONS: dict[str, Callable[[Mapping[str, np.ndarray], Windows], np.ndarray]] = {
    "forg": lambda run, windows: forgetting_events(run["correct"]),
    "etl": lambda run, windows: epochs_to_learn(run["correct"]),
    "csl": lambda run, windows: csl(run["loss"]),
    "aum": lambda run, windows: aum(run["margin"]),
    "dual": lambda run, windows: dual(run["probability"], windows.length),
    "dyn_unc": lambda run, windows: dyn_unc(run["probability"], windows.length),
    "el2n": lambda run, windows: el2n(run["el2n"], *windows.el2n_epochs),
    "tdds": lambda run, windows: tdds(run["divergence"], windows.length),
}
