"""Training runs on disk: starting, continuing, saving checkpoints and results, and loading a trained model."""

import copy
import logging
import math
import os
import platform
import shlex
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from src.artifacts.io import (
    file_digest,
    label_hash,
    link,
    read_checkpoint,
    read_json,
    read_npz,
    require_writable,
    uninterrupted,
    write_checkpoint,
    write_json,
    write_npz,
)
from src.artifacts.locks import lock
from src.artifacts.paths import (
    LOCK_NAME,
    checkpoint_name,
    checkpoint_path,
    dynamics_row_name,
    resume_name,
    weights_name,
)
from src.artifacts.store import check_identity, diff_settings, load_result, other_decode
from src.datasets import ImageSet, Normalization
from src.errors import ArgumentError, FileError
from src.models import build_model, model_entry, model_flag
from src.models.base import load_weights
from src.optimizers import SCHEDULES
from src.training.loop import Trainer, check_history, training_cost

log = logging.getLogger(__name__)

_FORMAT = "network-1"
_STATE_FORMAT = "resume-2"
_INLINE_STATE_FORMAT = "resume-1"  # earlier versions: the state contains the weights
_KEEP_STATES = 2  # the newest, and the previous one in case the newest is damaged
_KEYS = ("model_state", "model", "dataset", "num_classes", "channels", "image_size", "normalisation", "label_hash",
         "total", "epoch", "settings")  # fmt: skip
_RUN = ("model", "optimizer", "seed", "epoch", "lr_sched", "validation_split")

# Settings that differ between seeds, do not affect the result, or describe the data.
_PER_SEED = ("seed", "held_out", "measure_proxies", "dataset", "labels", "images", "decoding")


@dataclass(frozen=True)
class RunFiles:
    """Paths of a run's files.

    Attributes:
        checkpoints: Folder of ``epoch_{e}.pt``, ``best.pt``, ``last.pt`` and ``results.json``.
        resume: Folder of the resume states, their weights and the recorded dynamics, with one file of each kind per
            epoch. If both folders are in one file system with hard links, the weights are the same files as the
            checkpoints.
    """

    checkpoints: Path
    resume: Path

    def epoch(self, epoch: int) -> Path:
        """Path of the checkpoint of an epoch."""
        return self.checkpoints / checkpoint_name(epoch)

    def state(self, epoch: int) -> Path:
        """Path of the resume state after an epoch."""
        return self.resume / resume_name(epoch)

    def weights(self, epoch: int) -> Path:
        """Path of the checkpoint of an epoch that its resume state refers to."""
        return self.resume / weights_name(epoch)

    def row(self, epoch: int) -> Path:
        """Path of the recorded dynamics of an epoch."""
        return self.resume / dynamics_row_name(epoch)

    @property
    def results(self) -> Path:
        """Path of the settings, accuracies and times."""
        return self.checkpoints / "results.json"

    def read_results(self) -> dict[str, Any]:
        """Read ``results.json``. Returns an empty dict if no epoch was finished: such a run has nothing to keep.

        Raises:
            FileError: The file is damaged.
        """
        if not self.results.exists():
            return {}
        results = read_json(self.results)
        if not isinstance(results, dict) or not isinstance(results.get("settings"), dict):
            raise FileError(f"{self.results}: is damaged: it has no settings")
        try:
            check_history(results.get("history", []))
        except ValueError as error:
            raise FileError(f"{self.results}: is damaged: {error}") from error
        for name in ("best_test_accuracy", "seconds"):
            if not isinstance(results.get(name), int | float | None):
                raise FileError(f"{self.results}: is damaged: its {name} is not a number")
        return results if results.get("history") or self.states() else {}

    def states(self) -> list[int]:
        """Return the epochs of the resume states on disk, newest first."""
        return self._epochs(resume_name)

    def _epochs(self, name: Callable[[str], str]) -> list[int]:
        """Return the epochs of the files in the resume folder that match ``name``, newest first."""
        before, after = name("*").split("*")
        found = (path.name.removeprefix(before).removesuffix(after) for path in self.resume.glob(name("*")))
        return sorted((int(number) for number in found if number.isdigit()), reverse=True)

    def read_state(self, epoch: int) -> dict[str, Any]:
        """Read the resume state after an epoch, including the model's weights.

        Raises:
            FileError: The state or its weights file is missing, damaged, or from a different epoch or run.
        """
        path, weights = self.state(epoch), self.weights(epoch)
        state = read_checkpoint(path)
        if state.get("format") not in (_STATE_FORMAT, _INLINE_STATE_FORMAT) or not isinstance(
            state.get("settings"), dict
        ):
            raise FileError(f"{path}: is not a resume state of this project")
        if state.get("epoch") != epoch:
            raise FileError(
                f"{path}: contains the resume state of epoch {state.get('epoch')}; it was copied or renamed"
            )
        if state["format"] == _STATE_FORMAT:
            if file_digest(weights) != state.get("weights"):
                raise FileError(f"{weights}: was modified after {path.name} was written")
            state["model"] = read_checkpoint(weights).get("model_state")
        return state

    def newest_state(self) -> dict[str, Any] | None:
        """Return the newest readable resume state, or None if there is none."""
        for epoch in self.states():
            with suppress(FileError):
                return self.read_state(epoch)
        return None

    def remove_states(self) -> None:
        """Remove the files that only an unfinished run needs."""
        for path in self.resume.glob("*epoch=*"):
            path.unlink(missing_ok=True)

    def keep_states(self, newest: int) -> None:
        """Remove the states and weights of all but the newest epochs.

        This includes later epochs of a run that this one replaces, which would otherwise be resumed first.
        """
        for name in (resume_name, weights_name):  # states first, so that none is left without its weights
            for epoch in self._epochs(name):
                if not newest - _KEEP_STATES < epoch <= newest:
                    (self.resume / name(epoch)).unlink(missing_ok=True)


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
    """Train, or continue training, and write the run's files.

    An epoch's files are written while the next epoch trains; their contents are copied to CPU memory first.

    Args:
        trainer: The training loop, before its first epoch.
        files: The run's folders.
        settings: Everything that determines the result. They are stored, and compared with existing files.
        description: The model and data facts that checkpoints record (``model_description``).
        resume: Whether to continue from the newest readable resume state, if there is one.
        overwrite: Whether results with different settings may be replaced; with ``resume``, also resume states.
        save_epochs: ``"all"``, ``"last"``, or the epochs whose checkpoints are kept in addition to best and last.
        measure: Called by the main process after each epoch, before the epoch's state is written. Its output is
            therefore complete up to any epoch that the run resumes from.

    Returns:
        The history: one record per epoch.

    Raises:
        FileError: The folders contain a run with different settings, another process is training in them, or an
            epoch could not be written (raised after the next epoch).
        TrainingError: The loss is not finite.
    """
    writes = trainer.group.is_main_process
    run = _Run(trainer, files, dict(settings), dict(description), save_epochs)
    with lock(files.checkpoints / LOCK_NAME, "training this run") if writes else nullcontext(), run.writing():
        if not (resume and run.resume(overwrite)) and writes:
            run.start(overwrite)
        trainer.group.wait()
        for epoch in trainer.epochs():
            trainer.train_epoch(epoch)
            if writes:
                run.finish_writing()
                measure(trainer)
                run.save(epoch)
        run.finish_writing()
        trainer.group.wait()
    if warning := divergence(trainer.history):
        log.warning("%s; try more epochs or a smaller learning rate", warning)
    return trainer.history


def divergence(history: list[dict[str, Any]]) -> str | None:
    """Describe the divergence of a run whose final training loss is higher than the untrained model's loss.

    The untrained model's loss is measured on the first batch before any step. Histories of earlier versions lack it.

    Returns:
        A warning, or None if the loss fell or the untrained model's loss is unknown.
    """
    before, after = history[0].get("untrained_loss"), history[-1]["train_loss"]
    if before is None or after <= before:
        return None
    return f"training did not lower the loss: the final loss is {after:.5g}, the untrained model's was {before:.5g}"


def summary(history: list[dict[str, Any]]) -> str:
    """Summarize the outcome of a run in one or two lines."""
    lines = [f"test accuracy {100 * history[-1]['test_accuracy']:.2f} % after epoch {len(history)}"]
    return "\n".join([*lines, *filter(None, [divergence(history)])])


class _Run:
    """Writes a run's files, in the main process. A background thread writes each epoch's files."""

    def __init__(
        self,
        trainer: Trainer,
        files: RunFiles,
        settings: dict[str, Any],
        description: dict[str, Any],
        save_epochs: str | list[int],
    ) -> None:
        self.trainer, self.files, self.settings = trainer, files, settings
        self.description, self.save_epochs = description, save_epochs
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._written: Future[None] | None = None
        device = trainer.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        self._machine = {
            "device": f"{device.type} ({name})",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        if trainer.config.optimizer == "iblr":
            self._machine["iblr_backend"] = trainer.config.iblr_backend

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Context manager that finishes pending writes before the run's lock is released, even after an error."""
        try:
            yield
        finally:
            with uninterrupted():
                self._writer.shutdown()
            if self._written is not None and (error := self._written.exception()):
                log.warning("%s", error)  # an exception that ended the run is reported separately

    def finish_writing(self) -> None:
        """Wait until the newest epoch is written.

        Raises:
            FileError: Writing failed.
        """
        if self._written is not None:
            wait([self._written])
            written, self._written = self._written, None
            written.result()

    def start(self, overwrite: bool) -> None:
        """Start a run from scratch. Raise ``FileError`` if the folders contain one with different settings."""
        files = self.files
        # without results.json, the checkpoints were deleted or are in another folder
        state = None if files.results.exists() else files.newest_state()
        path = files.results if state is None else files.state(state["epoch"])

        def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
            found = files.read_results() if state is None else state
            return found, found.get("settings", self.settings)

        if path.exists() and load_result(path, self.settings, read, overwrite=overwrite) is None:
            files.remove_states()
            for checkpoint in files.checkpoints.glob("*.pt"):
                checkpoint.unlink()
        require_writable(files.resume)
        self._write_results([])

    def resume(self, overwrite: bool) -> bool:
        """Continue from the newest readable state. Return False if there is none or it is to be replaced."""
        trainer, files = self.trainer, self.files
        for epoch in files.states():
            path = files.state(epoch)
            try:
                state, rows = files.read_state(epoch), self._read_rows(epoch)
            except FileError as error:
                log.warning("%s; using the previous state", error)
                continue
            longer = trainer.config.epochs >= epoch and not trainer.depends_on_epochs
            stored, free = (state, state["settings"]), ("epochs",) if longer else ()
            if load_result(path, self.settings, lambda _, s=stored: s, overwrite=overwrite, ignore=free) is None:
                log.info("%s: has different settings; training from scratch", path)
                return False
            try:
                trainer.restore(state, rows)
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
                raise FileError(
                    f"{path}: does not fit this model and optimizer; delete it to continue from the previous state"
                ) from error
            log.info("continuing after epoch %d of %d", epoch, trainer.config.epochs)
            if trainer.group.is_main_process:
                if "weights" not in state:
                    self._write_weights(epoch, state["model"], trainer.history)
                self._publish(trainer.history)
            return True
        level = logging.WARNING if files.states() else logging.DEBUG
        log.log(level, "no usable resume state in %s; training from scratch", files.resume)
        return False

    def _read_rows(self, epochs: int) -> dict[int, np.ndarray]:
        """Read the recorded dynamics of epochs 1 to ``epochs``."""
        rows: dict[int, np.ndarray] = {}
        dynamics = self.trainer.dynamics
        if dynamics is None:
            return rows
        for epoch in range(1, epochs + 1):
            path = self.files.row(epoch)
            stored = read_npz(path)
            row = stored.get("row")
            if not np.array_equal(stored.get("epoch", epoch), epoch):
                raise FileError(f"{path}: contains the dynamics of epoch {stored['epoch']}")
            if row is None or not dynamics.fits(row):
                raise FileError(f"{path}: does not contain the dynamics of these training examples")
            rows[epoch] = row
        return rows

    def save(self, epoch: int) -> None:
        """Start writing an epoch's dynamics, weights, resume state, checkpoints and results, in this order."""
        trainer = self.trainer
        row = None if trainer.dynamics is None else trainer.dynamics.rows[epoch]
        self._written = self._writer.submit(self._write, epoch, row, _snapshot(trainer.state()))
        record = trainer.history[-1]
        log.debug(
            "epoch %d/%d: train loss %.5f accuracy %.2f %%, test loss %.5f accuracy %.2f %%, %.1f s",
            epoch,
            trainer.config.epochs,
            record["train_loss"],
            100 * record["train_accuracy"],
            record["test_loss"],
            100 * record["test_accuracy"],
            record["seconds"],
        )

    def _write(self, epoch: int, row: np.ndarray | None, state: dict[str, Any]) -> None:
        """Write an epoch from copies of the training state. May run in another thread."""
        files = self.files
        if row is not None:
            write_npz(files.row(epoch), row=row, epoch=epoch)
        self._write_weights(epoch, state.pop("model"), state["history"])
        facts = {"format": _STATE_FORMAT, "epoch": epoch, "settings": self.settings}
        write_checkpoint(files.state(epoch), {**facts, "weights": file_digest(files.weights(epoch)), **state})
        self._publish(state["history"])

    def _write_weights(self, epoch: int, weights: Mapping[str, Any], history: list[dict[str, Any]]) -> None:
        """Write the file shared by an epoch's checkpoints and resume state."""
        state = {**self.description, "model_state": weights, "epoch": epoch, "settings": self.settings}
        state["cost"] = training_cost(history[:epoch])
        write_checkpoint(self.files.weights(epoch), state)

    def _publish(self, history: list[dict[str, Any]]) -> None:
        """Link the newest weights as the epoch's checkpoints, and write the results.

        If a crash prevents or interrupts this, resuming the run repeats it.
        """
        files, epoch = self.files, len(history)
        accuracies = [record["test_accuracy"] for record in history]
        targets = []
        if self.save_epochs == "all" or (isinstance(self.save_epochs, list) and epoch in self.save_epochs):
            targets.append(files.epoch(epoch))
        if accuracies[-1] > max(accuracies[:-1], default=-1.0):
            targets.append(files.checkpoints / "best.pt")
        if epoch == self.trainer.config.epochs:
            targets.append(files.checkpoints / "last.pt")
        source = files.weights(epoch)
        for path in targets:  # link each to the previous one: the resume folder may be in another file system
            source = link(source, path)
        self._write_results(history)
        files.keep_states(epoch)

    def _write_results(self, history: list[dict[str, Any]]) -> None:
        results = {
            "settings": self.settings,
            "finished": len(history) == self.trainer.config.epochs,
            "best_test_accuracy": max((record["test_accuracy"] for record in history), default=None),
            "seconds": sum(record["seconds"] for record in history),
            "machine": self._machine,
            "history": history,
        }
        write_json(self.files.results, results)


def _snapshot(value: Any) -> Any:
    """Copy a state: tensors are copied to the CPU, in containers of the same types."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps the metadata that torch attaches to a state dict
        copied.update((name, _snapshot(entry)) for name, entry in value.items())
        return copied
    if isinstance(value, list | tuple):
        return type(value)(map(_snapshot, value))
    return value


# ---------------------------------------------------------------------------------------------------- checkpoints


def find_checkpoint(models_folder: str | Path, experiment: str, seed: int, epoch: int) -> Path | None:
    """Return a run's checkpoint of an epoch: its own file, else ``last.pt`` if it is from that epoch, or None."""
    own = checkpoint_path(models_folder, experiment, seed, epoch)
    if own.exists():
        return own
    last = checkpoint_path(models_folder, experiment, seed, "last")
    return last if last.exists() and read_checkpoint(last).get("epoch") == epoch else None


def find_schedules(models_folder: str | Path, pattern: str, seed: int) -> list[str]:
    """Return the learning rate schedules of a seed's runs.

    Args:
        models_folder: The folder of checkpoints.
        pattern: A run's name with ``*`` in place of the schedule.
        seed: The seed.
    """
    before, after = pattern.split("*")
    folders = (folder for folder in Path(models_folder).glob(pattern) if (folder / f"seed_{seed}").is_dir())
    return sorted({folder.name[len(before) : len(folder.name) - len(after)] for folder in folders})


def free_epochs(lr_sched: str | None) -> tuple[str, ...]:
    """Return ``("epochs",)`` if the total number of epochs does not affect the epochs trained so far, else ``()``."""
    return ("epochs",) if lr_sched in SCHEDULES and not SCHEDULES[lr_sched].depends_on_epochs else ()


def training_facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that runs of different seeds must share to be averaged."""
    skip = {*_PER_SEED, *free_epochs(settings.get("lr_sched"))}
    return {name: value for name, value in settings.items() if name not in skip and not name.startswith("selection")}


def training_command(script: str, flags: Mapping[str, Any]) -> str:
    """Return the command that trains a missing model, for messages. A flag whose value is True takes no value."""
    flags = {name: model_flag(value) if name == "model" else value for name, value in flags.items()}
    words = (f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items())
    command = shlex.join(["python", script, *words])
    return f"{command} (and your other training flags)"


def image_facts(images: ImageSet) -> dict[str, str]:
    """Return the settings that identify a data set's images, if known: their digest and the decoding rules."""
    facts = {"images": images.digest, "decoding": images.decoding}
    return {name: value for name, value in facts.items() if value is not None}


def data_facts(full_train: ImageSet) -> dict[str, Any]:
    """Return what a checkpoint records about its data, given the full training set."""
    entry = full_train.entry
    return {
        "dataset": entry.name,
        "num_classes": entry.num_classes,
        "channels": entry.channels,
        "image_size": entry.image_size,
        "label_hash": label_hash(full_train.labels.cpu().numpy()),
        "data_hash": full_train.digest,
        "decoding": full_train.decoding,
        "total": full_train.total,
    }


def model_description(model_name: str, full_train: ImageSet, normalization: Normalization) -> dict[str, Any]:
    """Return what a checkpoint records about its model and data, in addition to weights, epoch and settings.

    Args:
        model_name: The model's name in file names.
        full_train: The full training set.
        normalization: The normalization that the model is trained with.
    """
    return {
        "format": _FORMAT,
        "model": model_name,
        **({"model_source": model_flag(model_name)} if model_entry(model_name).source else {}),
        **data_facts(full_train),
        "normalisation": {"mean": list(normalization.mean), "std": list(normalization.std)},
    }


def load_model(
    path: str | Path, asked: Mapping[str, Any] | None = None, state: Mapping[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Load the model of a checkpoint, and check that it is the requested one, whatever the file name.

    Args:
        path: The checkpoint.
        asked: Values that the checkpoint or its settings must match if they record them: ``data_facts``, and known
            facts about the run, such as ``optimizer``, ``seed``, ``epoch``, ``lr_sched`` and ``validation_split``.
        state: The checkpoint's contents, if already read.

    Returns:
        The model on the CPU in eval mode, and the checkpoint without its weights; its ``normalisation`` is a
        ``Normalization``.

    Raises:
        FileError: The file is missing, damaged, not a checkpoint of this project, or not the requested one.
    """
    state = dict(read_checkpoint(path) if state is None else state)
    missing = [key for key in _KEYS if key not in state]
    if state.get("format", _FORMAT) != _FORMAT:
        missing = [f"format {_FORMAT}"]
    if missing:
        raise FileError(f"{path}: is not a checkpoint of this project ({', '.join(missing)} missing); train it again")
    weights, stored = state.pop("model_state"), state["normalisation"]
    if not all(isinstance(value, dict) for value in (weights, stored, state["settings"])):
        raise FileError(
            f"{path}: is not a checkpoint of this project (weights, normalization or settings are not a dictionary); "
            "train it again"
        )
    _check_asked(path, state, asked or {})
    try:
        model = build_model(state["model"], state["num_classes"], state["channels"], state["image_size"], seed=0)
        load_weights(model, weights)
        state["normalisation"] = _normalization(stored, state["channels"])
    except ArgumentError as error:  # the file is at fault, not the caller
        if model_flag(state["model"]) != state["model"]:
            source = f", unchanged since training with {state['model_source']}" if "model_source" in state else ""
            raise FileError(f"{path}: contains the model{error.text}{source}") from error
        raise FileError(f"{path}: is not a checkpoint of this project ({error}); train it again") from error
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:160]
        raise FileError(
            f"{path}: its weights do not fit the model {state['model']!s:.40} ({reason}); train it again"
        ) from error
    model.to(next(value for value in weights.values() if value.is_floating_point()).dtype).eval()
    return model, state


def _normalization(stored: Mapping[str, Any], channels: int) -> Normalization:
    """Validate the stored normalization: a finite mean and a positive standard deviation per channel."""
    for name, lowest in (("mean", -math.inf), ("std", 0.0)):
        values = stored[name]
        right = isinstance(values, list | tuple) and len(values) == channels
        if not right or not all(type(value) in (int, float) and lowest < value < math.inf for value in values):
            raise ValueError(f"the {name} of its normalization is not {channels} valid numbers")
    return Normalization(tuple(stored["mean"]), tuple(stored["std"]))


def _check_asked(path: str | Path, state: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise if a checkpoint is from a different run or epoch, or was trained on different data, than requested."""
    # the first two are None if not recorded
    recorded = {"validation_split": None, "decoding": None, **state["settings"], **state}
    check_identity(path, recorded, "train this one again", **{name: asked[name] for name in _RUN if name in asked})
    known = {name: value for name, value in asked.items() if name in recorded}
    found = diff_settings({name: recorded[name] for name in known}, known)
    if not found:
        return
    names = sorted(line.split(" ")[0] for line in found)
    advice = "give the data that it was trained on, or train it again on this data"
    if set(names) <= {"image_size", "channels"}:
        advice = "give " + " and ".join(f"--{name}={recorded[name]}" for name in names)
    elif "decoding" in names and (decode := other_decode(recorded, asked)):
        advice = f"give --decode={decode} for the images that it was trained on, or train it again on this data"
    raise FileError(f"{path}: was trained on different data: {', '.join(found)}; {advice}")
