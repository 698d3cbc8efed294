"""The files from which an interrupted measurement of a spectrum goes on."""

import shutil
from pathlib import Path
from typing import Any

import torch

from src.artifacts import read_checkpoint, refuse_other_settings, write_checkpoint
from src.curvature.basis import Basis
from src.errors import FileError

_VECTORS = ("rows_", "vectors")  # files of many vectors


class SpectrumState:
    """A folder with the newest state; each vector of a Lanczos basis is written once.

    Args:
        folder: Where.
        settings: What the measurement's numbers depend on; a state of other settings is refused.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = Path(folder), settings
        self._rows: list[list[int]] = []  # run, first vector and end of each file

    @property
    def _progress(self) -> Path:
        return self.folder / "progress.pt"

    def _rows_file(self, run: int, start: int) -> Path:
        return self.folder / f"rows_{run}_{start}.pt"

    def save(self, state: dict[str, Any], run: int, basis: Basis | None) -> None:
        """Write a state, atomically: vectors first, then what refers to them.

        Args:
            state: Tensors and plain values.
            run: Number of the Lanczos run.
            basis: Its basis; None where there is none.

        Raises:
            FileError: It cannot be written.
        """
        kept = [row for row in self._rows if row[0] == run and basis is not None]
        start = kept[-1][2] if kept else 0
        if basis is not None and len(basis) > start:
            write_checkpoint(self._rows_file(run, start), {"rows": basis.stored(start)})
            kept.append([run, start, len(basis)])
        write_checkpoint(self._progress, {**state, "rows": kept, "settings": self.settings})
        for old in self._rows:
            if old not in kept:
                self._rows_file(*old[:2]).unlink(missing_ok=True)
        self._rows = kept

    def load(self) -> dict[str, Any] | None:
        """The newest state, with ``rows`` the vectors of its basis (or None); None where there is no state.

        Raises:
            FileError: It is damaged, or of other settings.
        """
        if not self._progress.exists():
            return None
        state = read_checkpoint(self._progress)
        if "settings" not in state or "rows" not in state:
            raise FileError(
                f"{self._progress}: is no state of a measurement; remove {self.folder}, or leave --resume out"
            )
        refuse_other_settings(self._progress, state["settings"], self.settings)
        self._rows = state["rows"]
        parts = [read_checkpoint(self._rows_file(run, start))["rows"] for run, start, _ in self._rows]
        state["rows"] = torch.cat(parts) if parts else None
        return state

    def settings_there(self) -> dict[Path, dict[str, Any]]:
        """The settings of what is stored, by file; vectors are of the state that needs them.

        Raises:
            FileError: A file is damaged.
        """
        files = sorted(self.folder.glob("*.pt"))
        found = {
            path: read_checkpoint(path).get("settings", {}) for path in files if not path.name.startswith(_VECTORS)
        }
        for path, settings in found.items():
            if not isinstance(settings, dict):
                raise FileError(f"{path}: has no settings; remove {self.folder}, or leave --resume out")
        return found

    def keep(self, name: str, values: dict[str, Any]) -> None:
        """Write what a finished part of the measurement found."""
        write_checkpoint(self.folder / f"{name}.pt", {**values, "settings": self.settings})

    def kept(self, name: str) -> dict[str, Any] | None:
        """What ``keep`` wrote; None where there is nothing."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            return None
        values = read_checkpoint(path)
        refuse_other_settings(path, values.pop("settings", {}), self.settings)
        return values

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._rows = []
