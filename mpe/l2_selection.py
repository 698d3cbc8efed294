"""The L2 parameter by the leave-one-out estimate: networks trained with many (paper, Eq. 15; Figures 4, 7)."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from mpe.estimates import estimate, loo_losses
from mpe.loo_iterations import forms_of
from mpe.posterior import Predictions

log = logging.getLogger(__name__)


def measure_deltas(
    deltas: Sequence[float],
    class_cov: str,
    model: nn.Module,
    predictions: Callable[[float], Predictions],
    test: Callable[[], tuple[float, float]],
) -> Callable[[dict[str, Tensor], int], dict[str, float]]:
    """What is kept of networks trained with different L2 parameters, number i with ``deltas[i]``.

    Args:
        deltas: The L2 parameters.
        class_cov: The form of ``estimated_nll``.
        model: A network into which each is loaded in its turn.
        predictions: Predictions of that network on the training examples, with variances under a prior precision.
        test: Its test accuracy and NLL.

    Returns:
        A function of a network's weights and its number that gives ``test_accs``, ``test_nlls``, ``train_acc``,
        ``train_nll``, and ``estimated_nll_{form}`` of every form that the same pass serves.
    """

    def measure(weights: dict[str, Tensor], number: int) -> dict[str, float]:
        model.load_state_dict(weights)
        delta, (accuracy, loss) = deltas[number], test()
        found = predictions(delta)
        row = {"test_accs": accuracy, "test_nlls": loss, "train_acc": found.accuracy, "train_nll": found.nll}
        for form in forms_of(class_cov):
            row[f"estimated_nll_{form}"] = float(loo_losses(found, estimate(found, form)).mean())
        log.info(
            "delta %.4g: train accuracy %.2f %% NLL %.6f; test accuracy %.2f %% NLL %.6f; LOO-NLL %.6f (%s)",
            delta,
            100 * found.accuracy,
            found.nll,
            100 * accuracy,
            loss,
            row[f"estimated_nll_{class_cov}"],
            class_cov,
        )
        return row

    return measure


def l2_content(rows: dict[str, np.ndarray], deltas: np.ndarray, class_cov: str) -> dict[str, Any]:
    """What the result file holds, for the networks trained so far."""
    done = len(rows["test_accs"])
    more = {name: values for name, values in rows.items() if name not in ("test_accs", "test_nlls")}
    return {
        "estimated_nll": [np.float64(value) for value in rows[f"estimated_nll_{class_cov}"]],
        "deltas": np.asarray(deltas[:done], dtype=np.float64),
        "test_accs": rows["test_accs"].tolist(),
        "test_nlls": [np.float32(value) for value in rows["test_nlls"]],
        **more,
    }
