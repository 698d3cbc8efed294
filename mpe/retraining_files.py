"""What a run of retrainings keeps on disk, so that it can go on: finished chunks, and the state of one."""

import logging
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from src.artifacts import (
    CLAIM_NAME,
    differences,
    read_checkpoint,
    read_json,
    read_npz,
    refuse_other_settings,
    require_writable,
    write_checkpoint,
    write_json,
    write_npz,
)
from src.errors import FileError
from src.training.ensemble import Ensemble

log = logging.getLogger(__name__)

STATE_FORMAT = "retraining-1"

_KEEP_STATES = 2  # the newest, and the one before it in case that one is damaged
_CHUNK = re.compile(r"networks_(\d+)_(\d+)\.npz")
_STATE = re.compile(r"state_(\d+)_(\d+)_epoch_(\d+)\.pt")

_NUMBERS = "model_numbers"  # the entry that says which models a file is of; files of older versions lack it


def _refuse_another(path: Path, said: Any, numbers: range) -> None:
    """Stop at a file that was copied or renamed, and is of other models than its name says."""
    if said is not None and not np.array_equal(said, [numbers.start, numbers.stop]):
        raise FileError(f"{path}: is of other models than its name says; it was copied or renamed")


class RetrainingFiles:
    """The folder of one run.

    It holds ``settings.json``, ``networks_{start}_{stop}.npz`` for each finished chunk (or network, where these are
    measured one by one), and ``state_{start}_{stop}_epoch_{e}.pt`` of the unfinished chunk. Networks are counted from
    0, ``stop`` is exclusive. All files are of the settings in ``settings.json``.

    Args:
        folder: The folder.
        settings: Everything that determines the results.
        save_seconds: States are written if so many seconds have passed since the last.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], save_seconds: float) -> None:
        self.folder, self.settings, self.save_seconds = folder, dict(settings), save_seconds
        self._saved = time.monotonic()

    def start(self, *, resume: bool, overwrite: bool) -> None:
        """Take the folder.

        Raises:
            FileError: It holds results of other settings, or is damaged, and ``overwrite`` is off.
        """
        require_writable(self.folder)
        path = self.folder / "settings.json"
        mine = [file for file in self.folder.iterdir() if _CHUNK.fullmatch(file.name) or _STATE.fullmatch(file.name)]
        stored: Any = None
        if path.exists() or mine:
            try:
                stored = read_json(path)
                if not isinstance(stored, dict):
                    raise FileError(f"{path}: is damaged, it holds no settings; make it anew")
            except FileError as error:
                if not overwrite:
                    raise FileError(f"{error}; give --overwrite to retrain anew, or choose other folders") from error
        if stored is not None and not overwrite:
            refuse_other_settings(self.folder, stored, self.settings)
        if not resume or stored is None or differences(stored, self.settings):
            for file in mine:
                file.unlink()
        write_json(path, self.settings)

    @property
    def claim(self) -> Path:
        """The lock of the process that retrains."""
        return self.folder / CLAIM_NAME

    def finished(self, count: int) -> tuple[list[dict[str, np.ndarray]], int]:
        """The arrays of finished chunks, from network 0 on without a gap, and how many networks they are of.

        Damaged files are passed over, with a warning.
        """
        names = [_CHUNK.fullmatch(file.name) for file in self.folder.iterdir()]
        chunks = sorted((int(name[1]), int(name[2])) for name in names if name)
        parts: list[dict[str, np.ndarray]] = []
        reached = 0
        for start, stop in chunks:
            if start != reached or not start < stop <= count:
                continue
            path = self._chunk(range(start, stop))
            try:
                part = read_npz(path)
                _refuse_another(path, part.pop(_NUMBERS, None), range(start, stop))
                numbers = all(values.ndim and values.dtype.kind in "biuf" for values in part.values())
                if not numbers or max(map(len, part.values()), default=0) != stop - start:  # a control has fewer
                    raise FileError(f"{path}: does not have numbers for {stop - start} networks")
                if parts and _rows(part) != _rows(parts[0]):
                    raise FileError(f"{path}: does not have what the chunks before it have")
            except FileError as error:
                log.warning("%s; these networks are retrained", error)
                continue
            parts.append(part)
            reached = stop
        return parts, reached

    def chunk_around(self, number: int, count: int) -> range | None:
        """The chunk that was trained but not measured to its end, if ``number`` is the first that was not."""
        for file in self.folder.iterdir():
            name = _STATE.fullmatch(file.name)
            if name and int(name[1]) < number < int(name[2]) <= count:
                return range(int(name[1]), int(name[2]))
        return None

    def finish(self, numbers: range, part: Mapping[str, np.ndarray], *, last: bool = True) -> None:
        """Write what was measured; after a chunk's last networks, remove what only an unfinished one needs."""
        write_npz(self._chunk(numbers), **part, **{_NUMBERS: np.array([numbers.start, numbers.stop])})
        if last:
            self.forget_states()

    def forget_states(self) -> None:
        """Remove what only an unfinished chunk needs."""
        for file in self.folder.iterdir():
            if _STATE.fullmatch(file.name):
                file.unlink(missing_ok=True)

    def save(self, ensemble: Ensemble, numbers: range, epoch: int, epochs: int) -> None:
        """Write the state after an epoch, if it is time; after the last one always, as measuring may fail."""
        if epoch < epochs and time.monotonic() - self._saved < self.save_seconds:
            return
        state = {"format": STATE_FORMAT, "settings": self.settings, "epoch": epoch, "ensemble": ensemble.state()}
        state[_NUMBERS] = [numbers.start, numbers.stop]
        write_checkpoint(self._state(numbers, epoch), state)
        self._saved = time.monotonic()
        for old in self._states(numbers)[_KEEP_STATES:]:
            self._state(numbers, old).unlink(missing_ok=True)

    def states(self, numbers: range, epochs: int) -> Iterator[tuple[Path, int, dict[str, Any]]]:
        """The readable states of a chunk, newest first: path, epoch and the ensemble's state."""
        for epoch in self._states(numbers):
            path = self._state(numbers, epoch)
            try:
                state = read_checkpoint(path)
                if (state.get("format"), state.get("epoch")) != (STATE_FORMAT, epoch) or epoch > epochs:
                    raise FileError(f"{path}: is not the state of such a chunk")
                _refuse_another(path, state.get(_NUMBERS), numbers)
                if not isinstance(state.get("settings"), dict) or not isinstance(state.get("ensemble"), dict):
                    raise FileError(f"{path}: is not the state of such a chunk")
                if differences(state["settings"], self.settings):
                    raise FileError(f"{path}: is of other settings")
            except FileError as error:
                log.warning("%s; using the state before it", error)
                continue
            yield path, epoch, state["ensemble"]

    def _states(self, numbers: range) -> list[int]:
        """The epochs of a chunk's states, newest first."""
        names = [_STATE.fullmatch(file.name) for file in self.folder.iterdir()]
        chunk = (numbers.start, numbers.stop)
        return sorted(
            (int(name[3]) for name in names if name and (int(name[1]), int(name[2])) == chunk), reverse=True
        )

    def _chunk(self, numbers: range) -> Path:
        return self.folder / f"networks_{numbers.start}_{numbers.stop}.npz"

    def _state(self, numbers: range, epoch: int) -> Path:
        return self.folder / f"state_{numbers.start}_{numbers.stop}_epoch_{epoch}.pt"


def _rows(part: Mapping[str, np.ndarray]) -> dict[str, tuple[Any, ...]]:
    """What each network has in a chunk: kind and shape by name."""
    return {name: (values.dtype.kind, values.shape[1:]) for name, values in part.items()}
