"""Leave-one-out estimates during training (paper, Eq. 15 and 16; Figures 1b, 5, 8, 9, 10)."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from mpe.config import CLASS_COVARIANCES
from mpe.estimates import Sensitivities, estimate, loo_losses
from mpe.posterior import Predictions
from mpe.results import Result
from src.errors import FileError
from src.training import Trainer

log = logging.getLogger(__name__)

EVALUATED = (1, 2, 5, 10, 20, 30, 40, 50, 75, 100, 150, 200, 250, 300)


def forms_of(class_cov: str) -> tuple[str, ...]:
    """The forms of class covariance that one pass for ``class_cov`` serves, beside the one asked for."""
    return ("diag",) if class_cov == "diag" else CLASS_COVARIANCES


class LooIterations:
    """Measures a network at chosen epochs of its training, and writes what it has after every epoch.

    Args:
        result: Where to write; rows that it already holds are kept up to the epoch that training goes on from.
        predictions: Gives, at the network as it is, predictions with variances on the training examples.
        epochs: The number of epochs of the run; the last is always measured.
        class_cov: The form of the key ``estimated_nll``; others that the same pass serves go beside it.
        evaluated: The epochs to measure at.
    """

    def __init__(
        self,
        result: Result,
        predictions: Callable[[Trainer], Predictions],
        epochs: int,
        class_cov: str = "diag",
        evaluated: tuple[int, ...] = EVALUATED,
    ) -> None:
        self.result, self.predictions, self.class_cov = result, predictions, class_cov
        self.evaluated = sorted({epoch for epoch in (*evaluated, epochs) if epoch <= epochs})
        self.rows = _rows(result.stored)
        self.last: Sensitivities | None = None

    def __call__(self, trainer: Trainer) -> None:
        """After an epoch: measure if it is one of those to measure at, and write."""
        epoch = trainer.epoch
        self.rows = {known: row for known, row in self.rows.items() if known < epoch}
        missing = [wanted for wanted in self.evaluated if wanted < epoch and wanted not in self.rows]
        if missing:
            raise FileError(
                f"{self.result.path}: holds no estimate of epoch {missing[0]}, and training goes on from epoch "
                f"{epoch - 1}; start without --resume"
            )
        if epoch in self.evaluated:
            self.rows[epoch] = self._measure(trainer)
        self.write(trainer)

    def _measure(self, trainer: Trainer) -> dict[str, float]:
        predictions = self.predictions(trainer)
        row = {"train_acc": predictions.accuracy, "train_nll": predictions.nll}
        for form in forms_of(self.class_cov):
            found = estimate(predictions, form)
            row[f"estimated_nll_{form}"] = float(loo_losses(predictions, found).mean())
            row[f"estimated_nll_unclamped_{form}"] = float(loo_losses(predictions, found, clamp=False).mean())
            if form == self.class_cov:
                self.last = Sensitivities(predictions, found)
            if form == "woodbury":
                row["unstable"] = float(found.unstable.sum())
        test = trainer.history[-1]
        log.info(
            "epoch %d: train accuracy %.2f %% NLL %.6f; test accuracy %.2f %% NLL %.6f; LOO-NLL %.6f (%s)",
            trainer.epoch,
            100 * row["train_acc"],
            row["train_nll"],
            100 * test["test_accuracy"],
            test["test_loss"],
            row[f"estimated_nll_{self.class_cov}"],
            self.class_cov,
        )
        return row

    def finish(self, trainer: Trainer) -> None:
        """Write the whole result after the last epoch, also where training had finished before.

        Raises:
            FileError: An estimate before the last epoch is missing.
        """
        missing = [epoch for epoch in self.evaluated if epoch < trainer.epoch and epoch not in self.rows]
        if missing:
            raise FileError(
                f"{self.result.path}: holds no estimate of epoch {missing[0]}, which training has passed; start "
                "without --resume"
            )
        if trainer.epoch not in self.rows:
            self.rows[trainer.epoch] = self._measure(trainer)
        self.write(trainer)

    def sensitivities(self, trainer: Trainer) -> Sensitivities:
        """Those of the trained network; computed now if this process has not measured it."""
        if self.last is None:
            predictions = self.predictions(trainer)
            self.last = Sensitivities(predictions, estimate(predictions, self.class_cov))
        return self.last

    def write(self, trainer: Trainer) -> None:
        """Write the rows and the test metrics of every epoch so far."""
        history = trainer.history
        rows = {epoch: self.rows[epoch] for epoch in sorted(self.rows)}
        columns = sorted({name for row in rows.values() for name in row})
        more = {name: np.array([row.get(name, 0.0) for row in rows.values()]) for name in columns}
        self.result.write(
            estimated_nll=[np.float64(row[f"estimated_nll_{self.class_cov}"]) for row in rows.values()],
            test_accs=[record["test_accuracy"] for record in history],
            test_nlls=[np.float32(record["test_loss"]) for record in history],
            epochs=np.array(list(rows), dtype=np.int64),
            **more,
        )


def _rows(stored: dict[str, Any]) -> dict[int, dict[str, float]]:
    """The measured epochs of a result."""
    epochs = stored.get("epochs", ())
    names = [name for name in stored if name.startswith(("estimated_nll_", "train_")) or name == "unstable"]
    return {int(epoch): {name: float(stored[name][place]) for name in names} for place, epoch in enumerate(epochs)}
