"""The stored velocities of a run, read for a figure: epochs, seeds, and where each group stands."""

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
    """

    epoch: int
    seeds: tuple[int, ...]
    lowers: np.ndarray
    places: np.ndarray
    values: np.ndarray


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
    found, first = [], None
    for epoch in epochs if epochs is not None else _numbers(folder, "epoch_"):
        place = folder / f"epoch_{epoch}"
        paths = {seed: velocity_path(place / f"seed_{seed}") for seed in seeds or _numbers(place, "seed_")}
        if epochs is None and seeds is None:  # epochs t + 1 hold kernels alone
            paths = {seed: path for seed, path in paths.items() if path.exists()}
        if not paths and epochs is None:
            continue
        if not paths:
            raise FileError(
                f"{place}: holds no velocities; make them with compute_ntk.py --ntk_velocity_epoch {epoch}"
            )
        for path in paths.values():
            settings = {name: v for name, v in _beside(path, "settings").items() if name != "checkpoints"}
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
    per_seed = [read_pickle(path) for path in paths.values()]
    lowers: list[int] = sorted(per_seed[0]) if isinstance(per_seed[0], dict) else []
    files = list(paths.values())
    for path, velocities in zip(files, per_seed, strict=True):
        if not lowers or not isinstance(velocities, dict) or sorted(velocities) != lowers:
            raise FileError(f"{path}: has other groups than {files[0]}; compute both with the same --lower_index")
    groups = _beside(files[0], "groups")
    places = [groups.get(str(lower), {}).get("percentile", lower) for lower in lowers]
    values = [[velocities[lower] for lower in lowers] for velocities in per_seed]
    return Velocities(
        epoch, tuple(paths), np.array(lowers), np.array(places, dtype=np.float64), np.array(values, dtype=np.float64)
    )


def _beside(path: Path, key: str) -> dict[str, Any]:
    """A part of the json beside velocities; empty where there is none, as for files of other programs."""
    beside = path.with_suffix(".json")
    return read_json(beside).get(key, {}) if beside.exists() else {}


def _numbers(folder: Path, prefix: str) -> list[int]:
    names = (place.name.removeprefix(prefix) for place in folder.glob(f"{prefix}*"))
    return sorted(int(name) for name in names if name.isdigit())
