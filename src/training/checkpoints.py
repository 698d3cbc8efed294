"""Checkpoints: what they hold, and how a network is built from one."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from src.artifacts import differences, label_hash, read_checkpoint
from src.datasets import ImageSet, Normalisation
from src.errors import FileError, FlagError
from src.models import build_model
from src.models.restoring import load_weights

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


def image_facts(images: ImageSet) -> dict[str, str]:
    """What settings say of a data set's images, where it is known: their digest, and rules that changed some."""
    facts = {"images": images.digest, "decoding": images.decoding}
    return {name: value for name, value in facts.items() if value is not None}


def data_facts(whole: ImageSet) -> dict[str, Any]:
    """What a checkpoint says about the data it was trained on, from the whole training part."""
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


def model_description(model_name: str, whole: ImageSet, normalisation: Normalisation) -> dict[str, Any]:
    """What a checkpoint says about its network and data, beside weights, epoch and settings.

    Args:
        model_name: The architecture's name.
        whole: The whole training part.
        normalisation: The normalisation that the network was trained with.
    """
    return {
        "format": FORMAT,
        "model": model_name,
        **data_facts(whole),
        "normalisation": {"mean": list(normalisation.mean), "std": list(normalisation.std)},
    }


def load_model(path: str | Path, asked: Mapping[str, Any] | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model of a checkpoint, which must be the one that was asked for, whatever the file is called.

    Args:
        path: The checkpoint.
        asked: What the checkpoint or its settings must say, where they say it: ``data_facts``, and what is known of
            the run, such as ``optimizer``, ``seed``, ``epoch``, ``lr_sched`` and ``validation_split``.

    Returns:
        The model, on the CPU, in eval mode, and the checkpoint without its weights; its ``normalisation`` is a
        ``Normalisation``.

    Raises:
        FileError: The file is missing, damaged, not a checkpoint of this project, or not the one asked for.
    """
    state = read_checkpoint(path)
    missing = [key for key in _KEYS if key not in state]
    if state.get("format", FORMAT) != FORMAT:
        missing = [f"format {FORMAT}"]
    if missing:
        raise FileError(f"{path}: is not a checkpoint of this project ({', '.join(missing)} missing); train it anew")
    weights, stored = state.pop("model_state"), state["normalisation"]
    if not all(isinstance(value, dict) for value in (weights, stored, state["settings"])):
        raise FileError(
            f"{path}: is not a checkpoint of this project (weights, normalisation or settings are no dictionary); "
            "train it anew"
        )
    _refuse_another(path, state, asked or {})
    try:
        model = build_model(state["model"], state["num_classes"], state["channels"], state["image_size"], seed=0)
        load_weights(model, weights)
        state["normalisation"] = _normalisation(stored, state["channels"])
    except FlagError as error:  # the file says it, not a flag
        raise FileError(f"{path}: is not a checkpoint of this project ({error}); train it anew") from error
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:160]
        raise FileError(
            f"{path}: its weights do not fit the network {state['model']!s:.40} ({reason}); train it again"
        ) from error
    model.to(next(value for value in weights.values() if value.is_floating_point()).dtype).eval()
    return model, state


def _normalisation(stored: Mapping[str, Any], channels: int) -> Normalisation:
    """The stored normalization: a finite mean and a positive deviation for each channel."""
    for name, lowest in (("mean", -math.inf), ("std", 0.0)):
        values = stored[name]
        right = isinstance(values, list | tuple) and len(values) == channels
        if not right or not all(type(value) in (int, float) and lowest < value < math.inf for value in values):
            raise ValueError(f"the {name} of its normalization is not {channels} numbers to scale pixels by")
    return Normalisation(tuple(stored["mean"]), tuple(stored["std"]))


def _refuse_another(path: str | Path, state: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Stop if a checkpoint says that it is of other data, or of another run or epoch, than was asked for."""
    said = {"validation_split": None, "decoding": None, **state["settings"], **state}  # absent, these two are None
    known = {name: value for name, value in asked.items() if name in said}
    found = differences({name: said[name] for name in known}, known)
    if not found:
        return
    names = {line.split(" ")[0] for line in found}
    if names & set(_RUN):
        what, advice = (
            "is of another run or epoch than its name says",
            "it was copied or renamed; train this one again",
        )
    elif names <= {"image_size", "channels"}:
        what = "was trained on other data"
        advice = "give " + " and ".join(f"{name}={said[name]}" for name in sorted(names))
    else:
        what, advice = "was trained on other data", "give the data that it was trained on, or train it again on these"
    raise FileError(f"{path}: {what}: {', '.join(found)}; {advice}")
