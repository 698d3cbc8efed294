"""Trained networks on disk: which there are, whether they belong to the data, what trains a missing one."""

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from src.artifacts import checkpoint_path, read_checkpoint
from src.errors import ArgumentError, FileError
from src.optimizers import SCHEDULES
from src.training.run import RunFiles

# Settings of a run that differ from seed to seed, change nothing, or are those of the data.
_PER_SEED = ("seed", "held_out", "measure_proxies", "dataset", "labels", "images", "decoding")


def find_checkpoint(models_folder: str | Path, experiment: str, seed: int, epoch: int) -> Path | None:
    """A run's checkpoint of an epoch: its own file, or ``last.pt`` if that is of the epoch; None if neither is."""
    own = checkpoint_path(models_folder, experiment, seed, epoch)
    if own.exists():
        return own
    last = checkpoint_path(models_folder, experiment, seed, "last")
    return last if last.exists() and read_checkpoint(last).get("epoch") == epoch else None


def find_schedules(models_folder: str | Path, pattern: str, seed: int) -> list[str]:
    """The schedules of the runs of a seed.

    Args:
        models_folder: Where checkpoints are kept.
        pattern: A run's name with ``*`` in place of the schedule.
        seed: The seed.
    """
    before, after = pattern.split("*")
    folders = (folder for folder in Path(models_folder).glob(pattern) if (folder / f"seed_{seed}").is_dir())
    return sorted({folder.name[len(before) : len(folder.name) - len(after)] for folder in folders})


def only_schedule(models_folder: str | Path, pattern: str, seed: int, given: str | None) -> str | None:
    """The schedule that was asked for, or the only one there is; None where there is no run.

    Raises:
        ArgumentError: There are several; the message names them.
    """
    if given is not None:
        return given
    found = find_schedules(models_folder, pattern, seed)
    if len(found) > 1:
        raise ArgumentError("lr_sched", f": runs of {len(found)} schedules fit; choose one of {', '.join(found)}")
    return found[0] if found else None


def free_epochs(lr_sched: str | None) -> tuple[str, ...]:
    """The setting of a run's length, where another length would not have changed its epochs so far."""
    return ("epochs",) if lr_sched in SCHEDULES and not SCHEDULES[lr_sched].depends_on_epochs else ()


def training_facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that runs of other seeds must share, if something is to be averaged over them."""
    skip = {*_PER_SEED, *free_epochs(settings.get("lr_sched"))}
    return {name: value for name, value in settings.items() if name not in skip and not name.startswith("selection")}


def training_command(script: str, flags: Mapping[str, Any]) -> str:
    """The command that trains a missing network, for messages; a flag whose value is True stands alone."""
    words = (f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items())
    command = shlex.join(["python", script, *words])
    return f"{command} (and your other training flags)"


def missing_epochs(folder: Path, last: int, missing: Collection[int], epochs: Collection[int]) -> dict[str, Any]:
    """The flags with which a training script makes the missing epochs of a run.

    A run that ended too early goes on, if its schedule does not depend on its length; one that did not keep them, or
    cannot go on, is made anew.

    Args:
        folder: The run's folder.
        last: The last epoch that is wanted.
        missing: The epochs that are not there.
        epochs: All that are wanted.
    """
    kept = ",".join(map(str, sorted(epochs)))
    try:
        stored = RunFiles(folder, folder).read_results()
        settings, done = stored.get("settings", {}), len(stored.get("history", []))
        planned, schedule = int(settings.get("epochs", 0)), SCHEDULES.get(settings.get("lr_sched"))
    except (FileError, TypeError, ValueError):  # whatever stands there, training says what is wrong
        planned, schedule, done = 0, None, 0
    flags = {"epochs": max(last, planned), "save_epochs": kept}
    if not done:
        return flags
    goes_on = min(missing) > done and schedule is not None and not (last > planned and schedule.depends_on_epochs)
    return {**flags, "resume" if goes_on else "overwrite": True}
