"""Sensitivities of all examples at chosen steps of iBLR's training (paper, Eq. 13; Figures 3b, 11b, 11c)."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mpe.estimates import estimate, sampled_errors, sensitivity
from mpe.loo_iterations import forms_of
from mpe.posterior import Predictions
from mpe.results import Result
from src.errors import FileError, FlagError
from src.rng import generator
from src.training import Trainer

log = logging.getLogger(__name__)

SAMPLES = 150
CHECKPOINTS = {  # the paper's optimiser steps
    "mnist": (10, 1000, 5000, 12250),
    "fmnist": (10, 1000, 5000, 12250),
    "cifar10": (10, 2000, 10000, 24500),
}
_SHARES = tuple(step / 23500 for step in CHECKPOINTS["mnist"])  # of the steps of the paper's MNIST and FMNIST runs


def checkpoints_of(dataset: str, steps: int, given: Sequence[int] | None = None) -> list[int]:
    """The steps to measure at, ascending.

    Args:
        dataset: A data set's name.
        steps: Steps of the whole run.
        given: The user's choice. Otherwise the paper's steps where the run reaches them all, and elsewhere the same
            shares of the run as in the paper.

    Raises:
        FlagError: A given step lies beyond the run.
    """
    if given:
        chosen = sorted(set(given))
        if chosen[-1] > steps:
            raise FlagError(f"--checkpoints {chosen[-1]}: the run has {steps} steps; give steps from 1 to {steps}")
        return chosen
    papers = CHECKPOINTS.get(dataset, ())
    if papers and papers[-1] <= steps:
        return list(papers)
    return sorted({max(1, round(share * steps)) for share in _SHARES})


class Evolving:
    """Measures after chosen steps, and writes what it has each time.

    Args:
        result: Where to write; rows that it already holds are kept up to the step that training goes on from.
        predictions: Gives, at the network as it is, predictions with variances on the training examples.
        checkpoints: The steps to measure after.
        class_cov: The form of the covariance between classes.
        seed: Seed of the 150 samples of the logits.
    """

    def __init__(
        self,
        result: Result,
        predictions: Callable[[Trainer], Predictions],
        checkpoints: Sequence[int],
        class_cov: str,
        seed: int,
    ) -> None:
        self.result, self.predictions, self.class_cov, self.seed = result, predictions, class_cov, seed
        self.checkpoints = set(checkpoints)
        stored = result.stored
        self.forms = forms_of(class_cov)
        self.rows: dict[int, np.ndarray] = {}  # step -> (forms, N)
        for place, step in enumerate(stored.get("steps", ())):
            self.rows[int(step)] = np.array([stored[f"sensitivity_{form}"][place] for form in self.forms])

    def __call__(self, trainer: Trainer, epoch: int, step: int) -> None:
        """After a step: measure if it is one of those to measure after, and write.

        Raises:
            FileError: Training goes on from a later step than one whose row is missing.
        """
        if step not in self.checkpoints:
            return
        self.rows = {known: row for known, row in self.rows.items() if known < step}
        self._complete_below(step)
        trainer.require_finite(epoch)
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # the training goes on as if nothing had been measured
            found = self.predictions(trainer)
            self.rows[step] = self._sensitivities(found, step)
        log.info(
            "step %d (epoch %d): train accuracy %.2f %% NLL %.6f; mean sensitivity %.6f",
            step,
            epoch,
            100 * found.accuracy,
            found.nll,
            self.rows[step][self.forms.index(self.class_cov)].mean(),
        )
        self.write()

    def _sensitivities(self, found: Predictions, step: int) -> np.ndarray:
        """``(forms, N)``. The diagonal form takes the paper's errors, of independent logits and clamped.

        The others take those of correlated logits as they are: the paper's would bring back the variance of a shift
        of all logits, which no probability can see and which these forms leave out.
        """
        errors, rows = {}, []
        for form in self.forms:
            correlated = form != "diag"
            if correlated not in errors:
                draws = generator(self.seed, step, "logit samples")
                errors[correlated] = sampled_errors(found, samples=SAMPLES, generator=draws, correlated=correlated)
            rows.append(sensitivity(estimate(found, form, errors[correlated])).numpy())
        return np.array(rows)

    def finish(self, **more: Any) -> None:
        """Write the rows with what ``more`` holds, after the last step.

        Raises:
            FileError: A row is missing.
        """
        self._complete_below(max(self.checkpoints) + 1)
        self.write(**more)

    def _complete_below(self, step: int) -> None:
        missing = sorted(wanted for wanted in self.checkpoints if wanted < step and wanted not in self.rows)
        if missing:
            raise FileError(
                f"{self.result.path}: holds no sensitivities after step {missing[0]}, which training has passed; "
                "start without --resume"
            )

    def write(self, **more: Any) -> None:
        """Write the rows so far, and with them what ``more`` holds."""
        steps = sorted(self.rows)
        found = {form: np.array([self.rows[s][i] for s in steps]) for i, form in enumerate(self.forms)}
        self.result.write(
            sensitivity=found[self.class_cov],
            **{f"sensitivity_{form}": values for form, values in found.items()},
            iterations_list=np.array(steps, dtype=np.int64) + 1,  # as the paper's files count
            steps=np.array(steps, dtype=np.int64),
            **more,
        )
