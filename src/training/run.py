"""A training run on disk: checkpoints, resume states, results; how it starts, continues, and ends."""

import logging
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.artifacts import (
    CLAIM_NAME,
    checkpoint_name,
    differences,
    dynamics_row_name,
    read_checkpoint,
    read_json,
    read_npz,
    refuse_other_settings,
    require_writable,
    resume_name,
    sole,
    write_checkpoint,
    write_json,
    write_npz,
)
from src.errors import FileError
from src.training.loop import Trainer, check_history

log = logging.getLogger(__name__)

STATE_FORMAT = "resume-1"
_KEEP_STATES = 2  # the newest, and one before it in case the newest is damaged


@dataclass(frozen=True)
class RunFiles:
    """Where a run keeps its files.

    Attributes:
        checkpoints: Folder of ``epoch_{e}.pt``, ``best.pt``, ``last.pt`` and ``results.json``.
        resume: Folder of the resume states and of the recorded dynamics, one file per epoch.
    """

    checkpoints: Path
    resume: Path

    def epoch(self, epoch: int) -> Path:
        """The checkpoint of an epoch."""
        return self.checkpoints / checkpoint_name(epoch)

    def state(self, epoch: int) -> Path:
        """The resume state after an epoch."""
        return self.resume / resume_name(epoch)

    def row(self, epoch: int) -> Path:
        """The recorded dynamics of an epoch."""
        return self.resume / dynamics_row_name(epoch)

    @property
    def claim(self) -> Path:
        """The lock of the process that trains the run."""
        return self.checkpoints / CLAIM_NAME

    @property
    def results(self) -> Path:
        """Settings, accuracies and times."""
        return self.checkpoints / "results.json"

    def read_results(self) -> dict[str, Any]:
        """What ``results.json`` holds; empty where no epoch was finished, as such a start left nothing to keep.

        Raises:
            FileError: The file is damaged.
        """
        if not self.results.exists():
            return {}
        results = read_json(self.results)
        if not isinstance(results, dict) or not isinstance(results.get("settings"), dict):
            raise FileError(f"{self.results}: is damaged, it holds no settings")
        try:
            check_history(results.get("history", []))
        except ValueError as error:
            raise FileError(f"{self.results}: is damaged, {error}") from error
        for name in ("best_test_accuracy", "seconds"):
            if not isinstance(results.get(name), int | float | None):
                raise FileError(f"{self.results}: is damaged, its {name} is not a number")
        return results if results.get("history") or self.states() else {}

    def states(self) -> list[int]:
        """The epochs of the resume states on disk, newest first."""
        found = []
        for path in self.resume.glob("epoch=*.pth.tar"):
            number = path.name.removeprefix("epoch=").removesuffix(".pth.tar")
            if number.isdigit():
                found.append(int(number))
        return sorted(found, reverse=True)

    def remove_states(self) -> None:
        """Remove what only an unfinished run needs."""
        for path in self.resume.glob("*epoch=*"):
            path.unlink(missing_ok=True)


def run_training(
    trainer: Trainer,
    files: RunFiles,
    settings: Mapping[str, Any],
    description: Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    save_epochs: str | list[int] = "all",
    measure: Callable[[Trainer], None] = lambda trainer: None,
) -> list[dict[str, Any]]:
    """Train, or go on training, and write what a run writes.

    Args:
        trainer: The loop, at its beginning.
        files: The run's folders.
        settings: Everything that determines the result; stored, and compared with what stands there.
        description: What checkpoints say about network and data (``model_description``).
        resume: Whether to continue from the newest readable resume state, if there is one.
        overwrite: Whether results, and with ``resume`` states, of other settings may be replaced.
        save_epochs: ``"all"``, ``"last"`` or the epochs whose checkpoints are kept beside best and last.
        measure: Called after each epoch before its state is written, by the leading process: what it writes is
            complete up to any epoch that a resume goes on from.

    Returns:
        The history: one record per epoch.

    Raises:
        FileError: The folders hold a run of other settings, or another process is training in them.
        TrainingError: The loss is not finite.
    """
    run = _Run(trainer, files, dict(settings), dict(description), save_epochs, measure)
    with sole(files.claim, "training this run") if trainer.group.is_main_process else nullcontext():
        started = resume and run.resume(overwrite)
        if not started:
            run.start(overwrite)
        trainer.group.wait()
        for epoch in trainer.epochs():
            trainer.train_epoch(epoch)
            run.after_epoch()
        trainer.group.wait()
    warning = divergence(trainer.history)
    if warning is not None:
        log.warning("%s; more epochs or a smaller learning rate may help", warning)
    return trainer.history


def divergence(history: list[dict[str, Any]]) -> str | None:
    """What is wrong with a run that ends with a higher training loss than that of the untrained model.

    The untrained model's loss is that of the first batch before any step. Histories of earlier versions lack it.

    Returns:
        A sentence, or None if the loss fell.
    """
    before, after = history[0].get("untrained_loss"), history[-1]["train_loss"]
    if before is None or after <= before:
        return None
    return (
        f"training did not lower the loss: the last one is {after:.5g}, that of the untrained model was {before:.5g}"
    )


def summary(history: list[dict[str, Any]]) -> str:
    """How a run ended, in a line or two."""
    lines = [f"test accuracy {100 * history[-1]['test_accuracy']:.2f} % after epoch {len(history)}"]
    return "\n".join([*lines, *filter(None, [divergence(history)])])


class _Run:
    """One run's files, written by the leading process."""

    def __init__(
        self,
        trainer: Trainer,
        files: RunFiles,
        settings: dict[str, Any],
        description: dict[str, Any],
        save_epochs: str | list[int],
        measure: Callable[[Trainer], None],
    ) -> None:
        self.measure = measure
        self.trainer, self.files, self.settings, self.description = trainer, files, settings, description
        self.save_epochs = save_epochs

    # ------------------------------------------------------------------------------------------------- start

    def start(self, overwrite: bool) -> None:
        """Begin a run from nothing; stop if the folders hold one of other settings."""
        files = self.files
        if not self.trainer.group.is_main_process:
            return
        try:
            stored = files.read_results().get("settings") or self._settings_of_states()
        except FileError as error:
            if not overwrite:
                raise FileError(f"{error}; give --overwrite to train anew") from error
            stored = {}
        where = files.checkpoints if files.results.exists() else files.resume
        if stored is not None and not overwrite:
            refuse_other_settings(where, stored, self.settings)
        elif stored is not None and differences(stored, self.settings):
            for path in (*files.checkpoints.glob("*.pt"), *files.resume.glob("*epoch=*")):
                path.unlink()
        require_writable(files.resume)
        self._write_results()

    def resume(self, overwrite: bool) -> bool:
        """Go on from the newest readable state; False where there is none, or one of other settings to replace."""
        for epoch in self.files.states():
            path = self.files.state(epoch)
            try:
                state = self._read_state(epoch)
                rows = self._read_rows(epoch)
            except FileError as error:
                log.warning("%s; using the state before it", error)
                continue
            if not self._same_settings(path, state["settings"], epoch, overwrite):
                return False
            try:
                self.trainer.restore(state, rows)
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
                raise FileError(
                    f"{path}: does not fit this network and optimiser; delete it to go on from the state before it"
                ) from error
            log.info("continuing after epoch %d of %d", epoch, self.trainer.config.epochs)
            if self.trainer.group.is_main_process:
                self._finish_epoch()
            return True
        log.info("no resume state in %s: starting from the beginning", self.files.resume)
        return False

    def _settings_of_states(self) -> dict[str, Any] | None:
        """The settings of the resume states, for a run whose checkpoints are gone or in another folder."""
        for epoch in self.files.states():
            try:
                return self._read_state(epoch)["settings"]
            except FileError:
                continue
        return None

    def _read_state(self, epoch: int) -> dict[str, Any]:
        path = self.files.state(epoch)
        state = read_checkpoint(path)
        if state.get("format") != STATE_FORMAT or not isinstance(state.get("settings"), dict):
            raise FileError(f"{path}: is not a resume state of this project")
        if state.get("epoch") != epoch:
            raise FileError(f"{path}: is the resume state of epoch {state.get('epoch')}; it was copied or renamed")
        return state

    def _read_rows(self, epochs: int) -> dict[int, np.ndarray]:
        if self.trainer.dynamics is None:
            return {}
        rows = {}
        for epoch in range(1, epochs + 1):
            path = self.files.row(epoch)
            stored = read_npz(path)
            rows[epoch] = stored.get("row")
            if not np.array_equal(stored.get("epoch", epoch), epoch):
                raise FileError(f"{path}: holds the dynamics of epoch {stored['epoch']}")
            if not self.trainer.dynamics.fits(rows[epoch]):
                raise FileError(f"{path}: does not hold the dynamics of these training examples")
        return rows

    def _same_settings(self, path: Path, stored: Mapping[str, Any], epoch: int, overwrite: bool) -> bool:
        """Whether a state is of these settings; one of others stops the run, unless it may be replaced."""
        config = self.trainer.config
        longer = config.epochs >= epoch and not self.trainer.depends_on_epochs
        found = differences(stored, self.settings, ignore=("epochs",) if longer else ())
        if found and not overwrite:
            raise FileError(
                f"{path}: cannot be resumed with different settings: {', '.join(found)}; "
                "give --overwrite to start anew, or choose other folders"
            )
        if found:
            log.info("%s: is of other settings: starting from the beginning", path)
        return not found

    # ------------------------------------------------------------------------------------------- after epochs

    def after_epoch(self) -> None:
        """Measure, then write the epoch's dynamics, its resume state, checkpoints and results, in this order."""
        files, trainer, epoch = self.files, self.trainer, self.trainer.epoch
        if not trainer.group.is_main_process:
            return
        self.measure(trainer)
        if trainer.dynamics is not None:
            write_npz(files.row(epoch), row=trainer.dynamics.rows[epoch], epoch=epoch)
        state = {"format": STATE_FORMAT, "epoch": epoch, "settings": self.settings, **trainer.state()}
        write_checkpoint(files.state(epoch), state)
        self._finish_epoch()
        record = trainer.history[-1]
        log.info(
            "epoch %d/%d: train loss %.5f accuracy %.2f %%, test loss %.5f accuracy %.2f %%, %.1f s",
            epoch,
            trainer.config.epochs,
            record["train_loss"],
            100 * record["train_accuracy"],
            record["test_loss"],
            100 * record["test_accuracy"],
            record["seconds"],
        )

    def _finish_epoch(self) -> None:
        """Write the newest epoch's checkpoints and results; after a crash in between, resume does it again."""
        files, trainer = self.files, self.trainer
        epoch, last = trainer.epoch, trainer.epoch == trainer.config.epochs
        accuracies = [record["test_accuracy"] for record in trainer.history]
        targets = []
        if self.save_epochs == "all" or (isinstance(self.save_epochs, list) and epoch in self.save_epochs):
            targets.append(files.epoch(epoch))
        if accuracies[-1] > max(accuracies[:-1], default=-1.0):
            targets.append(files.checkpoints / "best.pt")
        if last:
            targets.append(files.checkpoints / "last.pt")
        if targets:
            state = {**self.description, "model_state": trainer.model.state_dict(), "epoch": epoch}
            for path in targets:
                write_checkpoint(path, {**state, "settings": self.settings})
        self._write_results()
        for old in files.states():  # also later ones, of a run that this one replaces: they would be resumed first
            if not epoch - _KEEP_STATES < old <= epoch:
                files.state(old).unlink(missing_ok=True)

    def _write_results(self) -> None:
        trainer = self.trainer
        write_json(
            self.files.results,
            {
                "settings": self.settings,
                "finished": trainer.epoch == trainer.config.epochs,
                "best_test_accuracy": max((r["test_accuracy"] for r in trainer.history), default=None),
                "seconds": sum(record["seconds"] for record in trainer.history),
                "machine": machine(trainer.device),
                "history": trainer.history,
            },
        )


def machine(device: torch.device) -> dict[str, Any]:
    """What a run was computed on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} ({name})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
