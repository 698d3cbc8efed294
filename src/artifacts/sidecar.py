"""Every result carries its settings; results of other settings are not overwritten by accident."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from src.errors import FileError

# What a setting counts as where a record lacks it: its default, or, where its meaning has changed since (as that of
# the starting weights), what it was before records had it. All others count as None.
DEFAULTS: dict[str, Any] = {
    "adaptive": False,
    "cutout_holes": 0,
    "data_augmentation": False,
    "hess_init": 0.1,
    "initialization": "older version",
    "lr_min": 0.0,
    "measure_proxies": False,
    "momentum": 0.9,
    "nesterov": False,
    "precision": "fp32",
    "pretrained": False,
    "rho": 0.05,
    "sync_bn": False,
    "weight_decay": 0.0,
}

# Facts that older records do not know: absent, they match anything.
_UNKNOWN_IF_ABSENT = {"data_hash", "held_out", "images", "training", "training_epochs"}

# Settings that act only beside others: they never enter a record otherwise, and do not count in older ones.
_ACTS = {
    "adaptive": lambda beside: beside.get("optimizer", "sam") == "sam",
    "rho": lambda beside: beside.get("optimizer", "sam") == "sam",
    "hess_init": lambda beside: beside.get("optimizer", "iblr") == "iblr",
    "lr_min": lambda beside: beside.get("lr_sched") != "const",
    "cutout_length": lambda beside: bool(beside.get("cutout_holes", True)),
    "dual_c": lambda beside: beside.get("dual_beta", True),
    "laplace_backend": lambda beside: not beside.get("optim_var"),
    "trace_tolerance": lambda beside: beside.get("trace_probes", 1) > 0,
    "var_version": lambda beside: not beside.get("optim_var"),
}

# Settings of one thing inside the record of another: what their names begin with, and what is known of them.
_PREFIXES: dict[str, dict[str, Any]] = {
    "training_": {"optimizer": "sam"},  # of a pair of models: those of the SAM-trained one
    "selection_": {},
    "pretraining ": {},
}


def parse_settings(path: str | Path, text: Any) -> dict[str, Any]:
    """The settings that a result carries as json text.

    Raises:
        FileError: The text is no json object; ``path`` is named.
    """
    try:
        settings = json.loads(str(text))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise FileError(f"{path}: is damaged, its settings cannot be read; make it anew")
    return settings


def without_idle(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that act beside the others: what a record holds of them."""
    return {name: value for name, value in settings.items() if _acts(name, settings)}


def counted(settings: Mapping[str, Any], name: str) -> Any:
    """What a setting counts as: its value, or its default where a record lacks it or where it does not act."""
    value = settings.get(name) if _acts(name, settings) else None
    return DEFAULTS.get(_split(name)[1]) if value is None else value


def _split(name: str) -> tuple[str, str]:
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    return prefix, name.removeprefix(prefix)


def _acts(name: str, settings: Mapping[str, Any]) -> bool:
    prefix, own = _split(name)
    if own not in _ACTS:
        return True
    inside = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    return _ACTS[own]({**settings, **_PREFIXES.get(prefix, {}), **inside})


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], ignore: Iterable[str] = ()) -> list[str]:
    """Name the settings that differ, as ``name (stored value there, wanted value here)``.

    Values are compared as json, so a tuple equals the list that it is read back as; dictionaries are compared entry
    by entry. A setting that a side lacks, or that does not act beside its others, counts as its default, so that
    adding a setting does not orphan earlier results; facts that earlier records could not know match anything.
    """
    skip = set(ignore)
    lines = []
    for name in sorted((set(stored) | set(wanted)) - skip):
        there, here = counted(stored, name), counted(wanted, name)
        if {name, _split(name)[1]} & _UNKNOWN_IF_ABSENT and None in (there, here):
            continue
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            lines += differences(there, here)
        elif json.dumps(there, sort_keys=True, default=str) != json.dumps(here, sort_keys=True, default=str):
            lines.append(f"{name} ({there} there, {here} here)")
    return lines


def refuse_other_settings(
    path: str | Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], ignore: Iterable[str] = ()
) -> None:
    """Stop if ``path`` holds results of other settings.

    Raises:
        FileError: The settings differ; the message names them.
    """
    found = differences(stored, wanted, ignore)
    if found:
        raise FileError(
            f"{path}: holds results of other settings: {', '.join(found)}; "
            "give --overwrite to replace them, or choose other folders"
        )
