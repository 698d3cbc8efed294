"""Checkpoints: what they hold, and how a network is built from one."""

from pathlib import Path
from typing import Any

from torch import nn

from src.artifacts import read_checkpoint
from src.datasets import DatasetEntry, Normalisation
from src.errors import FileError, FlagError
from src.models import build_model

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


def model_description(
    model_name: str, entry: DatasetEntry, normalisation: Normalisation, label_hash: str, total: int
) -> dict[str, Any]:
    """What a checkpoint says about its network and data, beside weights, epoch and settings.

    Args:
        model_name: The architecture's name.
        entry: The data set.
        normalisation: The normalisation that the network was trained with.
        label_hash: Hash of the labels of the whole training part.
        total: Size of the whole training part.
    """
    return {
        "format": FORMAT,
        "model": model_name,
        "dataset": entry.name,
        "num_classes": entry.num_classes,
        "channels": entry.channels,
        "image_size": entry.image_size,
        "normalisation": {"mean": list(normalisation.mean), "std": list(normalisation.std)},
        "label_hash": label_hash,
        "total": total,
    }


def load_model(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network of a checkpoint.

    Returns:
        The network, on the CPU, in eval mode, and the checkpoint without its weights; its ``normalisation`` is a
        ``Normalisation``.

    Raises:
        FileError: The file is missing, damaged, or not a checkpoint of this project.
    """
    state = read_checkpoint(path)
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise FileError(f"{path}: is not a checkpoint of this project ({', '.join(missing)} missing); train it anew")
    weights, stored = state.pop("model_state"), state["normalisation"]
    if not all(isinstance(value, dict) for value in (weights, stored, state["settings"])):
        raise FileError(
            f"{path}: is not a checkpoint of this project (weights, normalisation or settings are no dictionary); "
            "train it anew"
        )
    try:
        model = build_model(state["model"], state["num_classes"], state["channels"], state["image_size"], seed=0)
        model.load_state_dict(weights)
        state["normalisation"] = Normalisation(tuple(stored["mean"]), tuple(stored["std"]))
    except FlagError as error:  # the file says it, not a flag
        raise FileError(f"{path}: is not a checkpoint of this project ({error}); train it anew") from error
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path}: its weights do not fit the network {state['model']}; train it anew") from error
    model.to(next(value for value in weights.values() if value.is_floating_point()).dtype).eval()
    return model, state
