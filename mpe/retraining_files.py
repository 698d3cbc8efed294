"""The files of retrained models: finished chunks, the state of an unfinished one, and parts of a large run."""

import logging
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from src.artifacts.io import (
    link,
    read_checkpoint,
    read_json,
    read_npz,
    require_writable,
    write_checkpoint,
    write_json,
    write_npz,
)
from src.artifacts.locks import lock
from src.artifacts.paths import LOCK_NAME
from src.artifacts.store import REPLACE, check_identity, check_settings_match, load_result
from src.errors import FileError
from src.training.ensemble import Ensemble

log = logging.getLogger(__name__)

_STATE_FORMAT = "retraining-1"
_KEEP_STATES = 2  # the newest, and the previous one in case the newest is damaged
_CHUNK = re.compile(r"networks_(\d+)_(\d+)\.npz")
_STATE = re.compile(r"state_(\d+)_(\d+)_epoch_(\d+)\.pt")
_PART = "part_*_*"

_NUMBERS = "model_numbers"  # the entry that records which models a file contains; absent in files of older versions


def part_folder(folder: Path, part: range) -> Path:
    """The folder of a part of a run, inside the folder of the run."""
    return folder / f"part_{part.start}_{part.stop}"


class RetrainingFiles:
    """The folder of one run.

    It contains ``settings.json``, ``networks_{start}_{stop}.npz`` for each finished chunk (or model, if models are
    measured one at a time), and ``state_{start}_{stop}_epoch_{e}.pt`` for the unfinished chunk. Models are counted
    from 0; ``stop`` is exclusive. All files have the settings in ``settings.json``. A part of a run has such a folder
    of its own inside it, ``part_{start}_{stop}``.

    Args:
        folder: The folder.
        settings: All settings that determine the results.
        save_seconds: The minimum time between two states, in seconds.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], save_seconds: float) -> None:
        self.folder, self.settings, self.save_seconds = folder, dict(settings), save_seconds
        self._saved = time.monotonic()

    def start(self, *, resume: bool, overwrite: bool) -> None:
        """Prepare the folder. Damaged results or ones with different settings are removed only with ``overwrite``."""
        require_writable(self.folder)
        path = self.folder / "settings.json"
        chunks = [self._chunk(range(*found)) for found in self._found(_CHUNK)]
        if (chunks or self._found(_STATE)) and not path.exists() and not overwrite:
            raise FileError(f"{path}: is missing, but the folder has results; {REPLACE}")
        if load_result(path, self.settings, _read_settings, overwrite=overwrite) is None or not resume:
            self.forget_states()
            for file in chunks:
                file.unlink()
        write_json(path, self.settings)

    def add_parts(self, *, overwrite: bool) -> None:
        """Add the finished chunks of parts that were retrained separately.

        Raises:
            FileError: A part is still being retrained, or is damaged or has different settings. With ``overwrite``,
                such results are removed.
        """
        for folder in sorted(self.folder.glob(_PART)):
            part = RetrainingFiles(folder, self.settings, self.save_seconds)
            with lock(folder / LOCK_NAME, "retraining these models"):
                part.start(resume=True, overwrite=overwrite)
                for found in part._found(_CHUNK):
                    link(part._chunk(range(*found)), self._chunk(range(*found)))

    def finished(self, numbers: range) -> tuple[list[dict[str, np.ndarray]], int]:
        """Read the arrays of finished chunks, from the first of ``numbers`` and without gaps.

        Damaged files are skipped with a warning.

        Returns:
            The arrays of each chunk, and the number of the first model that is not finished.
        """
        parts: list[dict[str, np.ndarray]] = []
        columns: dict[str, tuple[Any, ...]] = {}  # kind and shape by name
        reached = numbers.start
        for start, stop in self._found(_CHUNK):
            if start != reached or not start < stop <= numbers.stop:
                continue
            path = self._chunk(range(start, stop))
            try:
                part = read_npz(path)
                _check_numbers(path, part.pop(_NUMBERS, None), range(start, stop))
                numeric = all(values.ndim and values.dtype.kind in "biuf" for values in part.values())
                if not numeric or max(map(len, part.values()), default=0) != stop - start:  # a control has fewer
                    raise FileError(f"{path}: does not contain numbers for {stop - start} models")
                these = {name: (values.dtype.kind, values.shape[1:]) for name, values in part.items()}
                if parts and these != columns:
                    raise FileError(f"{path}: its arrays differ from those of the previous chunks")
            except FileError as error:
                log.warning("%s; retraining these models", error)
                continue
            parts.append(part)
            columns, reached = these, stop
        return parts, reached

    def chunk_around(self, number: int, count: int) -> range | None:
        """The chunk that was trained but only partly measured, if model ``number`` is the first one not measured."""
        found = [range(start, stop) for start, stop, _ in self._found(_STATE) if start < number < stop <= count]
        return found[0] if found else None

    def finish(self, numbers: range, part: Mapping[str, np.ndarray], *, last: bool = True) -> None:
        """Write the measurements. After a chunk's last models, remove its states."""
        write_npz(self._chunk(numbers), **part, **{_NUMBERS: np.array([numbers.start, numbers.stop])})
        if last:
            self.forget_states()

    def forget_states(self) -> None:
        """Remove the states of unfinished chunks."""
        for start, stop, epoch in self._found(_STATE):
            self._state(range(start, stop), epoch).unlink(missing_ok=True)

    def save(self, ensemble: Ensemble, numbers: range, epoch: int, epochs: int) -> None:
        """Write the state if enough time has passed, and always after the last epoch, since measuring may fail."""
        if epoch < epochs and time.monotonic() - self._saved < self.save_seconds:
            return
        state = {"format": _STATE_FORMAT, "settings": self.settings, "epoch": epoch, "ensemble": ensemble.state()}
        state[_NUMBERS] = [numbers.start, numbers.stop]
        write_checkpoint(self._state(numbers, epoch), state)
        self._saved = time.monotonic()
        for old in self._states(numbers)[_KEEP_STATES:]:
            self._state(numbers, old).unlink(missing_ok=True)

    def states(self, numbers: range, epochs: int) -> Iterator[tuple[Path, int, dict[str, Any]]]:
        """Yield the readable states of a chunk, newest first: path, epoch, and the ensemble's state."""
        for epoch in self._states(numbers):
            path = self._state(numbers, epoch)
            try:
                state = read_checkpoint(path)
                foreign = (state.get("format"), state.get("epoch")) != (_STATE_FORMAT, epoch) or epoch > epochs
                if foreign or not all(isinstance(state.get(name), dict) for name in ("settings", "ensemble")):
                    raise FileError(f"{path}: is not a state of this chunk")
                _check_numbers(path, state.get(_NUMBERS), numbers)
                check_settings_match(path, state["settings"], self.settings, remedy="ignoring it")
            except FileError as error:
                log.warning("%s; using the previous state", error)
                continue
            yield path, epoch, state["ensemble"]

    def _found(self, pattern: re.Pattern) -> list[tuple[int, ...]]:
        """The numbers in the names of matching files, ascending."""
        names = [pattern.fullmatch(file.name) for file in self.folder.iterdir()]
        return sorted(tuple(map(int, name.groups())) for name in names if name)

    def _states(self, numbers: range) -> list[int]:
        """The epochs of a chunk's states, newest first."""
        found = reversed(self._found(_STATE))
        return [epoch for start, stop, epoch in found if (start, stop) == (numbers.start, numbers.stop)]

    def _chunk(self, numbers: range) -> Path:
        return self.folder / f"networks_{numbers.start}_{numbers.stop}.npz"

    def _state(self, numbers: range, epoch: int) -> Path:
        return self.folder / f"state_{numbers.start}_{numbers.stop}_epoch_{epoch}.pt"


def _read_settings(path: Path) -> tuple[Any, Any]:
    settings = read_json(path)
    return settings, settings if isinstance(settings, dict) else None


def _check_numbers(path: Path, recorded: Any, numbers: range) -> None:
    """Refuse a copied or renamed file that contains other models than its name implies."""
    if recorded is not None:
        check_identity(path, {"models": np.asarray(recorded).tolist()}, models=[numbers.start, numbers.stop])
