"""The description of one score.

Each score is declared next to the code that computes it: in ``dynamics.py``, ``flatness.py``, ``memorization.py``, or
``samis.py``. The registry collects these declarations. Flags, messages, tables, and tests enumerate the registry.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.errors import ArgumentError

log = logging.getLogger(__name__)

LEARNED = 0.8  # training accuracy of the last epoch below which scores that assume learned examples are not trusted


@dataclass(frozen=True)
class Score:
    r"""One score. Every stored score is oriented so that high means atypical.

    Attributes:
        name: The name in flags and file names.
        symbol: The symbol in figures (matplotlib math text).
        title: The full name.
        source: Where the values of one seed come from: ``"pair"`` (an SGD and a SAM model), ``"dynamics"`` (recorded
            during training), ``"end"`` (the trained model), ``"members"`` (models trained on random subsets),
            ``"mpe"``, or ``"audit"`` (out-of-sample probabilities).
        folder: The subfolder of a metrics folder with the averaged files.
        cost: What must be trained or measured for one seed.
        paper: The paper that proposed the score.
        compute: The function that computes the score; None if the values are computed elsewhere. For ``"pair"`` and
            ``"dynamics"``, it takes the arrays ``reads`` and the keyword arguments ``options``. For ``"end"``, it
            takes the model and batches, like ``flatness.epsilon_flatness``.
        reads: The names of the arrays that ``compute`` takes.
        options: The fields of ``dynamics.Windows`` that ``compute`` takes.
        passes: Forward and backward passes over the training examples besides training; a forward pass alone is 1/3.
        mirrored: Whether these passes are made for the mirror images as well, if the data set's augmentation flips.
        combines: The scores whose ranks are averaged; ``compute`` is then None.
        fewest_epochs: The minimum number of recorded epochs.
        assumes_learned: Whether the score has its sign only once the model has learned most examples. An example
            that is never learned is atypical, but gets a *low* score of this kind, like an easy example: for example,
            its predictions never change. Below a training accuracy of ``LEARNED``, such scores can rank examples the
            wrong way around. The other scores are high for examples that are not learned.
        negated: Whether the stored score is the negative of the published quantity, so that high means atypical.
        share_of_epochs: Whether averaged files contain fractions of the number of epochs, like the published files.
            All other scores are min-max scaled.
        missing: The value for an example without a score in some seed; None if every seed must have a score.
        seed_file: For ``"pair"``, the X of the per-seed file ``nn_X_diff_score.npz``; for a run, the per-seed file
            name. None if the score is computed from other per-seed files.
        file: The name of the averaged file.
        published_file: The name of the published file, if it differs. It is read where the averaged file is missing.
    """

    name: str
    symbol: str
    title: str
    source: str
    folder: str
    cost: str
    paper: str
    compute: Callable[..., Any] | None = None
    reads: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    passes: float = 0.0
    mirrored: bool = False
    combines: tuple[str, ...] = ()
    fewest_epochs: int = 1
    assumes_learned: bool = False
    negated: bool = False
    share_of_epochs: bool = False
    missing: float | None = None
    seed_file: str | None = None
    file: str = "{name}_{dataset}.pkl"
    published_file: str | None = None

    def path(self, metrics_folder: str | Path, dataset: str) -> Path:
        """The path of a data set's averaged file in a metrics folder."""
        return Path(metrics_folder) / self.folder / self.file.format(name=self.name, dataset=dataset)

    def published_path(self, metrics_folder: str | Path, dataset: str) -> Path:
        """The path of a data set's published file in a metrics folder; the same as ``path`` for most scores."""
        name = self.published_file or self.file
        return Path(metrics_folder) / self.folder / name.format(name=self.name, dataset=dataset)

    def from_dynamics(self, run: Mapping[str, np.ndarray], windows: Any = None) -> np.ndarray:
        """Compute the score from a run's recorded dynamics.

        Args:
            run: The recorded arrays ``(epochs, total)``.
            windows: A ``dynamics.Windows``; None for the papers' windows.

        Returns:
            float64 ``(total,)``; high means atypical, NaN for examples that were never visited.

        Raises:
            ArgumentError: The run is too short, or did not record what the score needs.
        """
        arrays = [run[name] for name in self.reads]
        if len(arrays[0]) < self.fewest_epochs:
            raise ArgumentError(
                "modes",
                f"{self.name}: needs at least {self.fewest_epochs} recorded epochs, the run has {len(arrays[0])}; "
                "leave this score out, or train longer",
            )
        if any(np.isnan(array).all() for array in arrays):
            raise ArgumentError(
                "modes",
                f"{self.name}: the run recorded no {' and '.join(self.reads)}; leave this score out, or train again",
            )
        values = self.compute(*arrays, **self.settings(windows))
        return -values if self.negated else values

    def settings(self, windows: Any = None) -> dict[str, Any]:
        """The fields of ``windows`` that affect the score, by name."""
        return {} if windows is None else {name: getattr(windows, name) for name in self.options}


def warn_if_not_learned(scores: Iterable[Score], accuracy: float | None, where: str | Path) -> None:
    """Log one warning if scores that assume learned examples come from a model that has not learned enough of them.

    Args:
        scores: The scores in use.
        accuracy: The training accuracy of the last epoch in [0, 1]; None or NaN if unknown.
        where: The run or file, for the message.
    """
    names = [score.name for score in scores if score.assumes_learned]
    if names and accuracy is not None and accuracy < LEARNED:
        log.warning(
            "%s: the training accuracy of the last epoch is %.1f %%, below %.0f %%: %s can have the wrong sign, "
            "since examples that are never learned get low scores, like easy ones; train longer, or use aum or csl",
            where,
            100 * accuracy,
            100 * LEARNED,
            ", ".join(names),
        )
