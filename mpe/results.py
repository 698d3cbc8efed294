"""Result files of the experiments: plain pickles that grow while an experiment runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.artifacts import differences, read_pickle, refuse_other_settings, write_pickle
from src.errors import FileError


class Result:
    """One result file, written as results come.

    Args:
        path: The pickle.
        args: The flags, for its key ``args``.
        settings: Everything that determines the result, for its key ``settings``.
        resume: Whether to go on from what stands there.
        overwrite: Whether a result of other settings may be replaced.

    Attributes:
        stored: What stood there and may be gone on from; empty for a start from nothing.

    Raises:
        FileError: The file holds a result of other settings, or is damaged.
    """

    def __init__(
        self, path: Path, args: Mapping[str, Any], settings: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> None:
        self.path, self.args, self.settings = path, dict(args), dict(settings)
        self.stored: dict[str, Any] = {}
        if not path.exists():
            return
        stored = self._read(overwrite)
        if stored is None or (overwrite and differences(stored["settings"], settings)):
            return
        refuse_other_settings(path, stored["settings"], settings)
        if resume:
            self.stored = stored

    def _read(self, overwrite: bool) -> dict[str, Any] | None:
        try:
            stored = read_pickle(self.path)
        except FileError:
            if overwrite:
                return None
            raise
        if isinstance(stored, dict) and isinstance(stored.get("settings"), dict):
            return stored
        if overwrite:
            return None
        raise FileError(
            f"{self.path}: does not say which settings it was made with; give --overwrite to replace it, or another "
            "--name_exp"
        )

    def remove_other(self) -> None:
        """Remove a result of other settings that is to be replaced."""
        if not self.stored and self.path.exists():
            stored = self._read(overwrite=True)
            if stored is None or differences(stored["settings"], self.settings):
                self.path.unlink()

    def write(self, **content: Any) -> Path:
        """Write the result: plain values and numpy arrays by name, with ``args`` and ``settings``."""
        return write_pickle(self.path, {**content, "args": self.args, "settings": self.settings})
