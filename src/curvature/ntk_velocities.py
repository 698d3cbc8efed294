"""The stored velocities of a run, read for a figure: epochs, seeds, and where each group stands."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.artifacts import differences, read_json, read_pickle, velocity_path
from src.errors import FileError


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
