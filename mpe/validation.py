"""Estimated against true deviations: which examples are removed, and what retraining without them says (Figure 2)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpe.estimates import Estimates, estimate, sensitivity
from mpe.loo_iterations import forms_of
from mpe.posterior import Predictions
from src.training.ensemble import Ensemble

PASS = 500
"""Images in a pass of an ensemble, an image counted once for each member."""


def estimates_of(predictions: Predictions, class_cov: str) -> dict[str, Estimates]:
    """The estimates of each form of class covariance that one pass serves."""
    return {form: estimate(predictions, form) for form in forms_of(class_cov)}


def score_content(
    predictions: Predictions, estimates: dict[str, Estimates], class_cov: str, weights: str
) -> dict[str, Any]:
    """What the file of estimates holds: ``sensitivities`` ``(N,)`` as asked for, every form, and whose they are.

    Also what retraining is compared with: the network's probabilities ``(N, C)``, and the hash of its weights.
    """
    scores = {form: sensitivity(found).numpy() for form, found in estimates.items()}
    return {
        "sensitivities": scores[class_cov],
        **{f"sensitivities_{form}": values for form, values in scores.items()},
        "indices": predictions.indices.numpy(),
        "labels": predictions.labels.numpy(),
        "unstable": int(estimates[class_cov].unstable.sum()),
        "probabilities": predictions.probabilities.numpy(),
        "train_acc": predictions.accuracy,
        "train_nll": predictions.nll,
        "base_weights": weights,
    }


def kept_scores(stored: Mapping[str, Any], weights: str) -> dict[str, Any] | None:
    """The estimates that an earlier run of the same settings left, or None.

    Args:
        stored: What its file holds; nothing where there is none.
        weights: The hash of the network's weights: another network's estimates are not taken, and neither are those
            of a file that does not say whose they are.
    """
    if stored.get("base_weights") != weights:
        return None
    return {name: values for name, values in stored.items() if name not in ("args", "settings")}


def drawn_examples(count: int, number: int, seed: int) -> np.ndarray:
    """The first ``number`` of ``count`` positions under numpy's legacy shuffle, as the paper's code draws them."""
    positions = np.arange(count)
    np.random.RandomState(seed).shuffle(positions)
    return positions[:number]


def spread_examples(scores: np.ndarray, number: int, taken: Sequence[int] = ()) -> np.ndarray:
    """Positions whose scores lie nearest to ``number`` values evenly spaced from the lowest to the highest.

    Each once, none of ``taken``; of equally near ones the first.
    """
    free = np.ones(len(scores), dtype=bool)
    free[np.asarray(taken, dtype=np.int64)] = False
    chosen = []
    for value in np.linspace(scores.max(), scores.min(), number):
        place = int(np.where(free, np.abs(scores - value), np.inf).argmin())
        free[place] = False
        chosen.append(place)
    return np.array(chosen, dtype=np.int64)


def measure_removed(images: Tensor, removed: np.ndarray) -> Callable[[Ensemble, range], dict[str, np.ndarray]]:
    """What is kept of retrained networks, of which number 0 is the control and number i + 1 lacks ``removed[i]``.

    Args:
        images: All training images, normalised, on the device.
        removed: Positions ``(R,)``.

    Returns:
        A function of an ensemble and its members' numbers: ``probabilities`` ``(m, C)``, each network's of the
        example it lacks (NaN for the control), and ``control`` ``(1, R, C)``, the control's of all of them, or
        ``(0, R, C)`` where the control is not among the members.
    """

    def measure(ensemble: Ensemble, members: range) -> dict[str, np.ndarray]:
        own = [int(removed[max(member - 1, 0)]) for member in members]
        chosen = torch.tensor(own, device=images.device)
        probabilities = _softmax(ensemble.member_logits(images[chosen].unsqueeze(1)))[:, 0]
        control = np.empty((0, len(removed), probabilities.shape[1]))
        if 0 in members:
            place = members.index(0)
            probabilities[place] = np.nan
            parts = [
                _softmax(ensemble.logits(images[part.to(images.device)])[place])
                for part in torch.from_numpy(removed).split(max(1, PASS // len(ensemble)))
            ]
            control = np.concatenate(parts)[None]
        return {"probabilities": probabilities, "control": control}

    return measure


def _softmax(logits: Tensor) -> np.ndarray:
    return logits.detach().double().softmax(-1).cpu().numpy()


def retrain_content(
    rows: dict[str, np.ndarray], removed: np.ndarray, spread: int, base: np.ndarray, indices: np.ndarray
) -> dict[str, Any]:
    """What the file of true deviations holds, for the networks retrained so far.

    Args:
        rows: What ``measure_removed`` kept of networks 0, 1, ...
        removed: Positions ``(R,)``, of which the last ``spread`` were chosen over the range of the estimates.
        spread: See above.
        base: Softmax ``(N, C)`` of the network before.
        indices: Original indices ``(N,)``.
    """
    probabilities = rows["probabilities"][1:]
    done = removed[: len(probabilities)]
    control = rows["control"][0, : len(done)]
    deviations, corrected = probabilities - base[done], probabilities - control
    return {
        "indices_retrain": done.astype(np.int64),
        "softmax_deviations": np.abs(deviations).sum(1),
        "softmax_deviations_corrected": np.abs(corrected).sum(1),
        "probability_deviations": deviations,
        "probability_deviations_corrected": corrected,
        "base_probabilities": base[done],
        "control_probabilities": control,
        "indices_original": indices[done],
        "spread": np.arange(len(done)) >= len(removed) - spread,
    }
