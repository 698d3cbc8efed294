"""The training that follows a selection."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.artifacts import claim_path, coreset_experiment, file_digest, refuse_other_settings
from src.coresets import Selection
from src.coresets.infobatch import InfoBatchPlan
from src.errors import FileError
from src.pruning.choice import Choice, select
from src.pruning.files import read_selection, selection_digest, weights_tensor
from src.session import Session

log = logging.getLogger(__name__)


class PrunedRun:
    """A fresh network's training on chosen examples.

    Args:
        session: The session, of ``epochs = coreset_epochs``.
        choice: The selection to make.
        file: A selection's file in place of a choice.
    """

    def __init__(self, session: Session, choice: Choice | None = None, file: Path | None = None) -> None:
        if (choice is None) == (file is None):
            raise ValueError("a run needs a choice, or a selection's file")
        self.session, self.choice, self.file = session, choice, file
        if choice is not None:
            self.experiment = choice.experiment
        else:
            args = session.args
            name = f"selection_{file_digest(file)[:8]}"
            share = len(read_selection(file, session)[0].indices)
            self.experiment = coreset_experiment(name, args.coreset_mode, share, args.model, session.entry.name)

    @property
    def claim(self) -> Path:
        """The lock of whoever trains this run."""
        return claim_path(self.session.args.models_folder, self.experiment, self.session.args.seed)

    @property
    def dynamic(self) -> bool:
        """Whether training chooses anew in each epoch."""
        return self.choice is not None and self.choice.method.dynamic

    def check(self) -> None:
        """Find before anything is trained what would stop the run later.

        Raises:
            FlagError: The share does not fit the data or the method, or pre-training is too short.
            FileError: The stored score, or the selection's file, is missing or does not fit the data.
        """
        if self.choice is not None:
            self.choice.check()
        if self.dynamic:
            self._check_dynamic()

    def _check_dynamic(self) -> None:
        args, name = self.session.args, self.choice.method.name
        if not args.per_class:
            log.warning("--per_class: changes nothing for %s, which looks at all examples at once", name)

    def refuse_other_settings(self) -> None:
        """Stop where a run or a selection of other settings stands, before anything is trained.

        Raises:
            FileError: One does; the message names the settings that differ.
        """
        if self.choice is None:
            return
        if not self.dynamic:
            self.choice.stored()
        files = self.session.files(self.experiment)
        stored = files.read_results().get("settings", {})
        if stored:
            more = self._dynamic_settings() if self.dynamic else self._selection_settings()
            wanted = self.session.settings(self.session.train, more)
            refuse_other_settings(files.checkpoints, stored, wanted, ignore=("examples", "selection"))

    def selection_seconds(self) -> float:
        """The seconds that the stored selection took; NaN where there is none."""
        found = None if self.choice is None or self.dynamic else self.choice.stored()
        return float("nan") if found is None else found[1]

    def selection(self, *, overwrite: bool = False, wait: bool = True) -> tuple[Selection, float]:
        """The chosen examples, and the seconds that choosing took (NaN where unknown)."""
        if self.file is not None:
            return read_selection(self.file, self.session)[0], float("nan")
        return select(self.choice, overwrite=overwrite, wait=wait)

    def train(self, *, wait: bool = True) -> list[dict[str, Any]]:
        """Select, and train on the selection; returns the history, one record per epoch.

        Raises:
            Busy: Another process pre-trains what is needed, and ``wait`` is off.
        """
        session = self.session
        self.check()
        if self.dynamic:
            return session.run(
                self.experiment, session.train, plan=self._plan(), more_settings=self._dynamic_settings()
            )
        selection, _ = self.selection(overwrite=session.args.overwrite, wait=wait)
        train = session.train.subset(torch.from_numpy(selection.indices))
        return session.run(
            self.experiment, train, weights=weights_tensor(selection), more_settings=self._settings(selection)
        )

    def is_done(self) -> bool:
        """Whether the run has finished, with these very settings and the selection that they give."""
        session = self.session
        if self.dynamic:
            return session.is_done(self.experiment, session.train, self._dynamic_settings())
        if self.choice is None or not self.choice.path.exists():
            return False
        try:
            selection = self.choice.stored()
        except FileError:  # making it says so
            return False
        if selection is None:
            return False
        train = session.train.subset(torch.from_numpy(selection[0].indices))
        return session.is_done(self.experiment, train, self._settings(selection[0]))

    def _settings(self, selection: Selection) -> dict[str, Any]:
        """The run's settings beside those of the flags."""
        return {**self._selection_settings(), "selection": selection_digest(selection)}

    def _selection_settings(self) -> dict[str, Any]:
        """Those of them that are known before the selection is made."""
        chosen = {"selection_file": file_digest(self.file)} if self.file is not None else self.choice.settings()
        return {f"selection_{key}": value for key, value in chosen.items() if key not in _SHARED}

    def _dynamic_settings(self) -> dict[str, Any]:
        options = self.choice.options
        return {"selection": self.choice.method.name, "prune_ratio": self._prune_ratio,
                "infobatch_delta": options.infobatch_delta}  # fmt: skip

    @property
    def _prune_ratio(self) -> float:
        return float(np.round(1.0 - self.session.args.coreset_fraction, 12))

    def _plan(self) -> InfoBatchPlan:
        session, args = self.session, self.session.args
        return InfoBatchPlan(
            session.train.indices,
            prune_ratio=self._prune_ratio,
            epochs=args.epochs,
            seed=args.seed,
            delta=args.infobatch_delta,
            device=session.device,
        )


_SHARED = ("dataset", "labels", "images", "decoding", "subset", "seed")  # the session's settings have them
