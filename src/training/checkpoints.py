"""Checkpoints: what they contain, which there are, whether they are those asked for, and the model of one."""

import math
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from src.artifacts.io import label_hash, read_checkpoint
from src.artifacts.paths import checkpoint_path
from src.artifacts.store import check_identity, diff_settings
from src.datasets import ImageSet, Normalization
from src.errors import ArgumentError, FileError
from src.models import build_model
from src.models.base import load_weights
from src.optimizers import SCHEDULES
from src.training.run import RunFiles

FORMAT = "network-1"
_KEYS = (
    "model_state",
    "model",
    "dataset",
    "num_classes",
    "channels",
    "image_size",
    "normalisation",
    "label_hash",
    "total",
    "epoch",
    "settings",
)
_RUN = ("model", "optimizer", "seed", "epoch", "lr_sched", "validation_split")

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
    """The schedules of a seed's runs.

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
    """The setting of a run's length, if another length would not have changed its epochs so far."""
    return ("epochs",) if lr_sched in SCHEDULES and not SCHEDULES[lr_sched].depends_on_epochs else ()


def training_facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that runs of other seeds must share, if something is to be averaged over them."""
    skip = {*_PER_SEED, *free_epochs(settings.get("lr_sched"))}
    return {name: value for name, value in settings.items() if name not in skip and not name.startswith("selection")}


def training_command(script: str, flags: Mapping[str, Any]) -> str:
    """The command that trains a missing model, for messages; a flag whose value is True stands alone."""
    words = (f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items())
    command = shlex.join(["python", script, *words])
    return f"{command} (and your other training flags)"


def missing_epochs(folder: Path, last: int, missing: Collection[int], epochs: Collection[int]) -> dict[str, Any]:
    """The flags with which a training script makes the missing epochs of a run.

    A run that ended too early continues, if its schedule does not depend on its length; one that did not keep the
    epochs, or cannot continue, is trained from scratch.

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
    except (FileError, TypeError, ValueError):  # training says what is wrong
        planned, schedule, done = 0, None, 0
    flags = {"epochs": max(last, planned), "save_epochs": kept}
    if not done:
        return flags
    continues = min(missing) > done and schedule is not None and not (last > planned and schedule.depends_on_epochs)
    return {**flags, "resume" if continues else "overwrite": True}


def image_facts(images: ImageSet) -> dict[str, str]:
    """What settings say of a data set's images, where it is known: their digest, and rules that changed some."""
    facts = {"images": images.digest, "decoding": images.decoding}
    return {name: value for name, value in facts.items() if value is not None}


def data_facts(whole: ImageSet) -> dict[str, Any]:
    """What a checkpoint says about the data it was trained on, from the training set."""
    entry = whole.entry
    return {
        "dataset": entry.name,
        "num_classes": entry.num_classes,
        "channels": entry.channels,
        "image_size": entry.image_size,
        "label_hash": label_hash(whole.labels.cpu().numpy()),
        "data_hash": whole.digest,
        "decoding": whole.decoding,
        "total": whole.total,
    }


def model_description(model_name: str, whole: ImageSet, normalization: Normalization) -> dict[str, Any]:
    """What a checkpoint says about its model and data, beside weights, epoch and settings.

    Args:
        model_name: The architecture's name.
        whole: The whole training set.
        normalization: The normalization that the model was trained with.
    """
    return {
        "format": FORMAT,
        "model": model_name,
        **data_facts(whole),
        "normalisation": {"mean": list(normalization.mean), "std": list(normalization.std)},
    }


def load_model(
    path: str | Path, asked: Mapping[str, Any] | None = None, state: Mapping[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model of a checkpoint, which must be the one that was asked for, whatever the file is called.

    Args:
        path: The checkpoint.
        asked: What the checkpoint or its settings must say, where they say it: ``data_facts``, and what is known of
            the run, such as ``optimizer``, ``seed``, ``epoch``, ``lr_sched`` and ``validation_split``.
        state: The checkpoint's content, if it has been read before.

    Returns:
        The model, on the CPU, in eval mode, and the checkpoint without its weights; its ``normalisation`` is a
        ``Normalization``.

    Raises:
        FileError: The file is missing, damaged, not a checkpoint of this project, or not the one asked for.
    """
    state = dict(read_checkpoint(path) if state is None else state)
    missing = [key for key in _KEYS if key not in state]
    if state.get("format", FORMAT) != FORMAT:
        missing = [f"format {FORMAT}"]
    if missing:
        raise FileError(f"{path}: is not a checkpoint of this project ({', '.join(missing)} missing); train it again")
    weights, stored = state.pop("model_state"), state["normalisation"]
    if not all(isinstance(value, dict) for value in (weights, stored, state["settings"])):
        raise FileError(
            f"{path}: is not a checkpoint of this project (weights, normalization or settings are no dictionary); "
            "train it again"
        )
    _check_asked(path, state, asked or {})
    try:
        model = build_model(state["model"], state["num_classes"], state["channels"], state["image_size"], seed=0)
        load_weights(model, weights)
        state["normalisation"] = _normalization(stored, state["channels"])
    except ArgumentError as error:  # the file says so, not the caller
        raise FileError(f"{path}: is not a checkpoint of this project ({error}); train it again") from error
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:160]
        raise FileError(
            f"{path}: its weights do not fit the model {state['model']!s:.40} ({reason}); train it again"
        ) from error
    model.to(next(value for value in weights.values() if value.is_floating_point()).dtype).eval()
    return model, state


def _normalization(stored: Mapping[str, Any], channels: int) -> Normalization:
    """The stored normalization: a finite mean and a positive deviation for each channel."""
    for name, lowest in (("mean", -math.inf), ("std", 0.0)):
        values = stored[name]
        right = isinstance(values, list | tuple) and len(values) == channels
        if not right or not all(type(value) in (int, float) and lowest < value < math.inf for value in values):
            raise ValueError(f"the {name} of its normalization is not {channels} numbers to scale pixels by")
    return Normalization(tuple(stored["mean"]), tuple(stored["std"]))


def _check_asked(path: str | Path, state: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Stop if a checkpoint is of another run or epoch, or was trained on other data, than was asked for."""
    said = {"validation_split": None, "decoding": None, **state["settings"], **state}  # absent, these two are None
    check_identity(path, said, "train this one again", **{name: asked[name] for name in _RUN if name in asked})
    known = {name: value for name, value in asked.items() if name in said}
    found = diff_settings({name: said[name] for name in known}, known)
    if not found:
        return
    names = sorted(line.split(" ")[0] for line in found)
    advice = "give the data that it was trained on, or train it again on these"
    if set(names) <= {"image_size", "channels"}:
        advice = "give " + " and ".join(f"{name}={said[name]}" for name in names)
    raise FileError(f"{path}: was trained on other data: {', '.join(found)}; {advice}")
