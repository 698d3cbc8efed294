"""What removing a whole class does: estimated by the MPE and found by retraining (Figures 3a, 11d)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpe.estimates import estimate, loo_losses
from mpe.loo_iterations import forms_of
from mpe.posterior import EPS, Predictions
from src.training.ensemble import Ensemble


def class_estimates(predictions: Predictions, class_cov: str, classes: int) -> dict[str, np.ndarray]:
    """Leave-one-class-out estimates: the mean over a class's examples of their leave-one-out losses.

    The paper's formula (Section 4) with each example's own Jacobian in place of the class's.

    Returns:
        ``est_nll`` ``(C,)`` of the form asked for, and ``est_nll_{form}`` of all that the same pass serves; NaN for a
        class without examples.
    """
    labels, found = predictions.labels.numpy(), {}
    for form in forms_of(class_cov):
        losses = loo_losses(predictions, estimate(predictions, form)).numpy()
        means = [losses[labels == c].mean() if (labels == c).any() else np.nan for c in range(classes)]
        found[f"est_nll_{form}"] = np.array(means)
    return {"est_nll": found[f"est_nll_{class_cov}"], **found}


def measure_test(
    images: Tensor, labels: Tensor, batch: int = 1000
) -> Callable[[Ensemble, Sequence[int]], dict[str, np.ndarray]]:
    """Test NLL and accuracy ``(m,)`` of an ensemble's members, on images and labels on the device.

    ``batch`` counts an image once for each member, so that memory does not grow with the ensemble.
    """

    def measure(ensemble: Ensemble, members: Sequence[int]) -> dict[str, np.ndarray]:
        nll = torch.zeros(len(members), dtype=torch.float64, device=images.device)
        correct = torch.zeros_like(nll)
        size = max(1, batch // len(ensemble))
        for part, wanted in zip(images.split(size), labels.split(size), strict=True):
            p = ensemble.logits(part).detach().double().softmax(-1)  # (m, b, C)
            own = p.gather(2, wanted.expand(len(members), -1).unsqueeze(2)).squeeze(2)
            nll -= own.clamp_min(EPS).log().sum(1)
            correct += (p.argmax(2) == wanted).sum(1)
        return {"nll": (nll / len(labels)).cpu().numpy(), "acc": (correct / len(labels)).cpu().numpy()}

    return measure


def class_content(
    rows: dict[str, np.ndarray], estimated: dict[str, np.ndarray], classes: Sequence[int], base: tuple[float, float]
) -> dict[str, Any]:
    """What the result file holds, for the networks retrained so far.

    Args:
        rows: What ``measure_test`` gave for networks 0 (the control), 1 (without ``classes[0]``), ...
        estimated: Leave-one-class-out estimates, see ``class_estimates``.
        classes: The classes that are removed one at a time.
        base: Test accuracy and NLL of the network before.
    """
    nll = np.full(len(estimated["est_nll"]), np.nan)
    acc = nll.copy()
    done = list(classes[: len(rows["nll"]) - 1])
    nll[done], acc[done] = rows["nll"][1:], rows["acc"][1:]
    return {
        "org_acc": base[0],
        "org_nll": base[1],
        **estimated,
        "perturb_nll": nll,
        "perturb_acc": acc,
        "control_acc": float(rows["acc"][0]),
        "control_nll": float(rows["nll"][0]),
    }
