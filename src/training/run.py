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

from src.artifacts.io import (
    read_checkpoint,
    read_json,
    read_npz,
    require_writable,
    write_checkpoint,
    write_json,
    write_npz,
)
from src.artifacts.locks import lock
from src.artifacts.paths import LOCK_NAME, checkpoint_name, dynamics_row_name, resume_name
from src.artifacts.store import load_result
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
    def results(self) -> Path:
        """Settings, accuracies and times."""
        return self.checkpoints / "results.json"

    def read_results(self) -> dict[str, Any]:
        """What ``results.json`` contains; empty where no epoch was finished, as such a start left nothing to keep.

        Raises:
            FileError: The file is damaged.
        """
        if not self.results.exists():
            return {}
        results = read_json(self.results)
        if not isinstance(results, dict) or not isinstance(results.get("settings"), dict):
            raise FileError(f"{self.results}: is damaged, it has no settings")
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
        found = (path.name.removeprefix("epoch=").split(".")[0] for path in self.resume.glob(resume_name("*")))
        return sorted((int(number) for number in found if number.isdigit()), reverse=True)

    def read_state(self, epoch: int) -> dict[str, Any]:
        """The resume state after an epoch.

        Raises:
            FileError: It is missing, damaged, or that of another epoch.
        """
        path = self.state(epoch)
        state = read_checkpoint(path)
        if state.get("format") != STATE_FORMAT or not isinstance(state.get("settings"), dict):
            raise FileError(f"{path}: is not a resume state of this project")
        if state.get("epoch") != epoch:
            raise FileError(f"{path}: is the resume state of epoch {state.get('epoch')}; it was copied or renamed")
        return state

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
    """Train, or continue training, and write what a run writes.

    Args:
        trainer: The loop, at its beginning.
        files: The run's folders.
        settings: Everything that determines the result; stored, and compared with what is there.
        description: What checkpoints say about model and data (``model_description``).
        resume: Whether to continue from the newest readable resume state, if there is one.
        overwrite: Whether results, and with ``resume`` states, with different settings may be replaced.
        save_epochs: ``"all"``, ``"last"`` or the epochs whose checkpoints are kept beside best and last.
        measure: Called after each epoch before its state is written, by the main process: what it writes is
            complete up to any epoch that a resume continues from.

    Returns:
        The history: one record per epoch.

    Raises:
        FileError: The folders contain a run with different settings, or another process is training in them.
        TrainingError: The loss is not finite.
    """
    writes = trainer.group.is_main_process
    run = _Run(trainer, files, dict(settings), dict(description), save_epochs)
    with lock(files.checkpoints / LOCK_NAME, "training this run") if writes else nullcontext():
        if not (resume and run.resume(overwrite)) and writes:
            run.start(overwrite)
        trainer.group.wait()
        for epoch in trainer.epochs():
            trainer.train_epoch(epoch)
            if writes:
                measure(trainer)
                run.save(epoch)
        trainer.group.wait()
    if warning := divergence(trainer.history):
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


@dataclass
class _Run:
    """A run's files, which the main process writes."""

    trainer: Trainer
    files: RunFiles
    settings: dict[str, Any]
    description: dict[str, Any]
    save_epochs: str | list[int]

    def start(self, overwrite: bool) -> None:
        """Begin a run from scratch; stop if the folders contain one with different settings."""
        files, states = self.files, self.files.states()
        # without results.json the checkpoints are gone, or in another folder
        from_state = bool(states) and not files.results.exists()

        def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
            found = files.read_state(states[0]) if from_state else files.read_results()
            return found, found.get("settings", self.settings)

        path = files.state(states[0]) if from_state else files.results
        if load_result(path, self.settings, read, overwrite=overwrite) is None and overwrite:
            files.remove_states()
            for checkpoint in files.checkpoints.glob("*.pt"):
                checkpoint.unlink()
        require_writable(files.resume)
        self._write_results()

    def resume(self, overwrite: bool) -> bool:
        """Continue from the newest readable state; False where there is none, or one to be replaced."""
        trainer, files = self.trainer, self.files
        for epoch in files.states():
            path = files.state(epoch)
            try:
                state, rows = files.read_state(epoch), self._read_rows(epoch)
            except FileError as error:
                log.warning("%s; using the state before it", error)
                continue
            longer = trainer.config.epochs >= epoch and not trainer.depends_on_epochs
            stored, free = (state, state["settings"]), ("epochs",) if longer else ()
            if load_result(path, self.settings, lambda _, s=stored: s, overwrite=overwrite, ignore=free) is None:
                log.info("%s: was made with different settings: starting from the beginning", path)
                return False
            try:
                trainer.restore(state, rows)
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
                raise FileError(
                    f"{path}: does not fit this model and optimizer; delete it to continue from the state before it"
                ) from error
            log.info("continuing after epoch %d of %d", epoch, trainer.config.epochs)
            if trainer.group.is_main_process:
                self._write_epoch()
            return True
        log.info("no resume state in %s: starting from the beginning", files.resume)
        return False

    def _read_rows(self, epochs: int) -> dict[int, np.ndarray]:
        """The recorded dynamics of all epochs up to one."""
        rows = {}
        for epoch in range(1, epochs + 1) if self.trainer.dynamics is not None else ():
            path = self.files.row(epoch)
            stored = read_npz(path)
            rows[epoch] = stored.get("row")
            if not np.array_equal(stored.get("epoch", epoch), epoch):
                raise FileError(f"{path}: contains the dynamics of epoch {stored['epoch']}")
            if not self.trainer.dynamics.fits(rows[epoch]):
                raise FileError(f"{path}: does not contain the dynamics of these training examples")
        return rows

    def save(self, epoch: int) -> None:
        """Write an epoch's dynamics, its resume state, checkpoints and results, in this order."""
        files, trainer = self.files, self.trainer
        if trainer.dynamics is not None:
            write_npz(files.row(epoch), row=trainer.dynamics.rows[epoch], epoch=epoch)
        state = {"format": STATE_FORMAT, "epoch": epoch, "settings": self.settings, **trainer.state()}
        write_checkpoint(files.state(epoch), state)
        self._write_epoch()
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

    def _write_epoch(self) -> None:
        """Write the newest epoch's checkpoints and results; after a crash in between, resume does it again."""
        files, trainer, epoch = self.files, self.trainer, self.trainer.epoch
        accuracies = [record["test_accuracy"] for record in trainer.history]
        targets = []
        if self.save_epochs == "all" or (isinstance(self.save_epochs, list) and epoch in self.save_epochs):
            targets.append(files.epoch(epoch))
        if accuracies[-1] > max(accuracies[:-1], default=-1.0):
            targets.append(files.checkpoints / "best.pt")
        if epoch == trainer.config.epochs:
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
        history, device = self.trainer.history, self.trainer.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        results = {
            "settings": self.settings,
            "finished": self.trainer.epoch == self.trainer.config.epochs,
            "best_test_accuracy": max((record["test_accuracy"] for record in history), default=None),
            "seconds": sum(record["seconds"] for record in history),
            "machine": {
                "device": f"{device.type} ({name})",
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "history": history,
        }
        write_json(self.files.results, results)
