"""Stored tangent kernels: one kernel per group of examples, the velocities of all groups, and their settings."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Velocities:
    """The velocities of one epoch, over seeds.

    Attributes:
        epoch: t.
        seeds: The seeds.
        lowers: Ranks of the groups' first examples, (g,).
        places: Where the groups stand in the order of the scores, in percent, (g,); else their ranks.
        values: (seeds, g).
        in_percent: Whether ``places`` are percentiles.
    """

    epoch: int
    seeds: tuple[int, ...]
    lowers: np.ndarray
    places: np.ndarray
    values: np.ndarray
    in_percent: bool


def read_all_velocities(
    folder: Path, epochs: Sequence[int] | None = None, seeds: Sequence[int] | None = None
) -> list[Velocities]:
    """The stored velocities of one run and score.

    Args:
        folder: ``{ntk_folder}/{dataset}/{run}/{metric}``.
        epochs: Which epochs; None for all there are.
        seeds: Which seeds; None for all that an epoch has.

    Raises:
        FileError: There are none, one is missing, or they are of different settings or groups.
    """
    found, first, sources = [], None, {}
    for epoch in dict.fromkeys(epochs) if epochs is not None else _epochs_of(folder):
        place = folder / f"epoch_{epoch}"
        of_seeds = seeds if seeds is not None else [s for s in _numbers(place, "seed_") if _path(place, s).exists()]
        paths = {seed: _path(place, seed) for seed in of_seeds}
        if not paths:
            raise FileError(
                f"{place}: holds no velocities; make them with compute_ntk.py --ntk_velocity_epoch {epoch}"
            )
        for path in paths.values():
            settings = _beside(path, "settings")
            checkpoints = json.dumps(settings.pop("checkpoints", str(path)))
            if (source := sources.setdefault(checkpoints, path)) != path:
                raise FileError(f"{path}: was computed from the checkpoints of {source}; it was copied or renamed")
            first = first or (path, settings)
            different = differences(first[1], settings)
            if different:
                raise FileError(f"{path}: was computed otherwise than {first[0]}: {', '.join(different)}")
        found.append(_of_epoch(epoch, paths))
    if not found:
        raise FileError(f"{folder}: holds no velocities; make them with compute_ntk.py")
    return found


def _of_epoch(epoch: int, paths: dict[int, Path]) -> Velocities:
    """The velocities of several seeds, which must have the same groups."""
    per_seed = [_read(path) for path in paths.values()]
    lowers = sorted(per_seed[0])
    files = list(paths.values())
    for path, velocities in zip(files, per_seed, strict=True):
        if sorted(velocities) != lowers:
            raise FileError(f"{path}: has other groups than {files[0]}; compute both with the same --lower_index")
    groups = _beside(files[0], "groups")
    facts = [groups.get(str(lower), {}) for lower in lowers]
    percentiles = [group.get("percentile") if isinstance(group, dict) else None for group in facts]
    known = all(map(_is_number, percentiles))
    values = [[velocities[lower] for lower in lowers] for velocities in per_seed]
    places = np.array(percentiles if known else lowers, dtype=np.float64)
    return Velocities(epoch, tuple(paths), np.array(lowers), places, np.array(values, dtype=np.float64), known)


def _read(path: Path) -> dict[int, float]:
    """The velocities of a seed by rank."""
    found = read_pickle(path)
    if not isinstance(found, dict) or not found or not all(isinstance(lower, int | np.integer) for lower in found):
        raise FileError(f"{path}: is not a dict rank -> velocity; compute it again with --overwrite")
    if not all(map(_is_number, found.values())):
        raise FileError(f"{path}: has velocities that are not finite numbers; compute it again with --overwrite")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and math.isfinite(value)


def _beside(path: Path, key: str) -> dict[str, Any]:
    """A part of the json beside velocities; empty where there is none, as for files of other programs."""
    beside = path.with_suffix(".json")
    stored = read_json(beside) if beside.exists() else {}
    part = stored.get(key, {}) if isinstance(stored, dict) else None
    if not isinstance(part, dict):
        raise FileError(f"{beside}: is damaged, its {key} cannot be read; compute it anew with --overwrite")
    return part


def _path(place: Path, seed: int) -> Path:
    return velocity_path(place / f"seed_{seed}")


def _epochs_of(folder: Path) -> list[int]:
    """The epochs with velocities of any seed; those of t + 1 may hold kernels alone."""
    places = {epoch: folder / f"epoch_{epoch}" for epoch in _numbers(folder, "epoch_")}
    return [e for e, place in places.items() if any(_path(place, s).exists() for s in _numbers(place, "seed_"))]


def _numbers(folder: Path, prefix: str) -> list[int]:
    names = (place.name.removeprefix(prefix) for place in folder.glob(f"{prefix}*"))
    return sorted(int(name) for name in names if name.isdigit())
