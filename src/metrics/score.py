"""What the project knows about one kind of score.

The entry of a score is beside the code that computes it: in ``dynamics.py``, ``flatness.py`` or ``samis.py``. The
registry collects the entries of these modules, and flags, messages, tables and tests enumerate the registry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.errors import ArgumentError


@dataclass(frozen=True)
class Score:
    r"""One kind of score. Every stored score is oriented so that HIGH means atypical.

    Attributes:
        name: What flags and file names call it.
        symbol: What figures call it (matplotlib's math text).
        title: Its name in words.
        source: Where the values of one seed come from: ``"pair"`` (an SGD and a SAM model), ``"dynamics"`` (recorded
            during training), ``"end"`` (the trained model), ``"mpe"`` or ``"download"``.
        folder: The sub-folder of a metrics folder that its averaged files are in.
        cost: What must be trained or measured for one seed.
        paper: Who proposed it.
        compute: The function. It takes: of a pair and of dynamics, the arrays ``reads``, and ``options`` by name; of
            the trained model, the model and batches, as ``flatness.epsilon_flatness`` does. None where the values
            are made elsewhere.
        reads: The names of the arrays that ``compute`` takes.
        options: The fields of ``dynamics.Windows`` that ``compute`` takes.
        fewest_epochs: The shortest training that it can be computed from.
        negated: Whether the stored score is minus the published quantity, to turn HIGH into atypical.
        share_of_epochs: Whether averaged files have shares of the epochs, as the published ones do. All others are
            min-max scaled.
        missing: What an example that a seed has no value for counts as; None where every seed must have one.
        seed_file: Of a pair: the X of its per-seed file ``nn_X_diff_score.npz``. Of a run: its per-seed file. None
            where it is computed from what other per-seed files contain.
        file: The name of its averaged file.
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
    fewest_epochs: int = 1
    negated: bool = False
    share_of_epochs: bool = False
    missing: float | None = None
    seed_file: str | None = None
    file: str = "{name}_{dataset}.pkl"

    def path(self, metrics_folder: str | Path, dataset: str) -> Path:
        """The averaged file of a data set in a metrics folder."""
        return Path(metrics_folder) / self.folder / self.file.format(name=self.name, dataset=dataset)

    def from_dynamics(self, run: Mapping[str, np.ndarray], windows: Any = None) -> np.ndarray:
        """Reduce the recorded dynamics of a run.

        Args:
            run: The recorded arrays ``(epochs, total)``.
            windows: A ``dynamics.Windows``; None for the papers' windows.

        Returns:
            float64 ``(total,)``, HIGH is atypical, NaN where an example was never visited.

        Raises:
            ArgumentError: The run is too short.
        """
        arrays = [run[name] for name in self.reads]
        if len(arrays[0]) < self.fewest_epochs:
            raise ArgumentError(
                "modes",
                f"{self.name}: needs at least {self.fewest_epochs} recorded epochs, there are {len(arrays[0])}; "
                "leave it out, or train longer",
            )
        values = self.compute(*arrays, **self.settings(windows))
        return -values if self.negated else values

    def settings(self, windows: Any = None) -> dict[str, Any]:
        """Which of the windows determine the score, by name."""
        return {} if windows is None else {name: getattr(windows, name) for name in self.options}
