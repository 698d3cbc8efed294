"""The files of neural tangent kernels: one kernel per group, the velocities of all groups, and their settings."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from src.artifacts import (
    claimed,
    differences,
    kernel_path,
    ntk_folder,
    read_json,
    read_pickle,
    refuse_other_settings,
    velocity_path,
    write_json,
    write_pickle,
)
from src.errors import FileError


class KernelFiles:
    """Kernels and velocities of one network's run, seed after seed and epoch after epoch.

    Args:
        folder: The folder of kernels.
        dataset: The data set's name.
        run: ``{model}_with_{optimizer}_sched_{lr_sched}``.
        metric: The score that orders the examples.
        size: m, examples of a group.
        overwrite: Whether results of other settings may be replaced.
    """

    def __init__(self, folder: Path, dataset: str, run: str, metric: str, size: int, overwrite: bool) -> None:
        self._where = (folder, dataset, run, metric)
        self._size = size
        self._overwrite = overwrite

    def folder(self, seed: int, epoch: int) -> Path:
        """The folder of a seed's kernels of an epoch."""
        return ntk_folder(*self._where, epoch, seed)

    def kernel(self, seed: int, epoch: int, lower: int) -> Path:
        """A group's kernel."""
        return kernel_path(self.folder(seed, epoch), lower, self._size)

    def velocities(self, seed: int, epoch: int) -> Path:
        """The velocities of all groups."""
        return velocity_path(self.folder(seed, epoch))

    def has_kernel(self, seed: int, epoch: int, lower: int, settings: Mapping[str, Any]) -> bool:
        """Whether a kernel of these settings is there.

        Raises:
            FileError: One of other settings is there, and must not be replaced.
        """
        path = self.kernel(seed, epoch, lower)
        return path.exists() and self._same(path, settings)

    def read_kernel(self, seed: int, epoch: int, lower: int, rows: int) -> np.ndarray:
        """A stored kernel of so many rows, float32.

        Raises:
            FileError: It is damaged, of another shape, or not finite.
        """
        path = self.kernel(seed, epoch, lower)
        found = read_pickle(path)
        if not isinstance(found, np.ndarray) or found.shape != (rows, rows) or found.dtype.kind != "f":
            raise FileError(f"{path}: is not a kernel of {rows} rows; remove it, and run the script again")
        if not np.isfinite(found).all():
            raise FileError(f"{path}: is not finite; remove it, and run the script again")
        return found

    def write_kernel(
        self,
        seed: int,
        epoch: int,
        lower: int,
        kernel: np.ndarray,
        settings: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> None:
        """Store a kernel, and beside it its settings and whatever is known of it."""
        path = self.kernel(seed, epoch, lower)
        if not (path.exists() and self._same(path, settings)):  # else another process has just written the same
            path.unlink(missing_ok=True)  # never an old kernel beside new settings
        write_json(path.with_suffix(".json"), {"settings": dict(settings), **facts})
        write_pickle(path, kernel)

    def read_velocities(self, seed: int, epoch: int, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What is known of the groups whose velocities were found under these settings, by rank; it may be empty.

        The json is what counts; the pickle is made of it.

        Raises:
            FileError: Velocities of other settings are there, and must not be replaced, or they are damaged.
        """
        path = self.velocities(seed, epoch)
        beside = path.with_suffix(".json")
        if not (path.exists() or beside.exists()) or not self._same(path, settings):
            return {}
        groups = read_json(beside).get("groups")
        if not isinstance(groups, dict) or not all(_is_group(lower, group) for lower, group in groups.items()):
            raise FileError(f"{beside}: holds no velocities; give --overwrite to replace it")
        return groups

    def add_velocities(
        self, seed: int, epoch: int, settings: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Add groups to the stored velocities of these settings; processes that add other groups wait for each other.

        Returns:
            What is known of all stored groups, as ``read_velocities`` does.
        """
        path = self.velocities(seed, epoch)
        with claimed(path.with_suffix(".lock"), waiting="another process is writing velocities"):
            stored = {**self.read_velocities(seed, epoch, settings), **groups}
            path.unlink(missing_ok=True)  # an interruption leaves none rather than one that differs from its json
            write_json(path.with_suffix(".json"), {"settings": dict(settings), "groups": stored})
            write_pickle(path, {lower: stored[str(lower)]["velocity"] for lower in sorted(map(int, stored))})
        return stored

    def _same(self, path: Path, settings: Mapping[str, Any]) -> bool:
        beside = path.with_suffix(".json")
        if self._overwrite:
            try:
                return not differences(read_json(beside)["settings"], settings)
            except (FileError, KeyError, TypeError, AttributeError):
                return False
        if not beside.exists():
            raise FileError(f"{path}: has no settings beside it ({beside.name}); give --overwrite to replace it")
        stored = read_json(beside)
        if not isinstance(stored, dict) or not isinstance(stored.get("settings"), dict):
            raise FileError(f"{beside}: has no settings; give --overwrite to replace what it belongs to")
        refuse_other_settings(path, stored["settings"], settings)
        return True


def _is_group(lower: str, group: Any) -> bool:
    velocity = group.get("velocity") if isinstance(group, dict) else None
    return lower.isdecimal() and isinstance(velocity, float) and math.isfinite(velocity)
