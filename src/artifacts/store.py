"""Results on disk: one policy for settings, overwriting, damage, resuming, and results that belong together.

A result is a path, the settings that determine it, and its content. :func:`load_result` decides, before anything is
computed, what happens to the result that is already there: it is used again, refused, or replaced. Every refusal is
one :class:`FileError` that names the file, what differs, and what to do.
"""

import itertools
import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from src.artifacts.io import json_bytes, read_json, write_with
from src.errors import FileError

REPLACE = "give --overwrite to replace it, or choose other folders"
REMAKE = "make it again"

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


# ------------------------------------------------------------------------------------------------------ settings


def acting_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that have an effect beside the others: what a record holds of them."""
    return {name: value for name, value in settings.items() if _acts(name, settings)}


def setting_value(settings: Mapping[str, Any], name: str) -> Any:
    """What a setting counts as: its value, or its default where a record lacks it or where it has no effect."""
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


def diff_settings(stored: Mapping[str, Any], wanted: Mapping[str, Any], ignore: Iterable[str] = ()) -> list[str]:
    """Name the settings that differ, as ``name (stored value there, wanted value here)``.

    Values are compared as json, so a tuple equals the list that it is read back as; dictionaries are compared entry
    by entry. A setting that a side lacks, or that has no effect beside its others, counts as its default, so that
    adding a setting does not orphan earlier results; facts that earlier records could not know match anything.
    """
    skip = set(ignore)
    lines = []
    for name in sorted((set(stored) | set(wanted)) - skip):
        there, here = setting_value(stored, name), setting_value(wanted, name)
        if {name, _split(name)[1]} & _UNKNOWN_IF_ABSENT and None in (there, here):
            continue
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            lines += diff_settings(there, here)
        elif json.dumps(there, sort_keys=True, default=str) != json.dumps(here, sort_keys=True, default=str):
            lines.append(f"{name} ({there} there, {here} here)")
    return lines


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
        raise FileError(f"{path}: is damaged, its settings cannot be read; {REMAKE}")
    return settings


# ------------------------------------------------------------------------------------------------------- policy


def check_settings_match(
    path: str | Path,
    stored: Mapping[str, Any],
    wanted: Mapping[str, Any],
    ignore: Iterable[str] = (),
    remedy: str = REPLACE,
) -> None:
    """Refuse a result that was made with different settings.

    Raises:
        FileError: The settings differ; the message names them.
    """
    if found := diff_settings(stored, wanted, ignore):
        raise FileError(f"{path}: was made with different settings: {', '.join(found)}; {remedy}")


def load_result(
    path: str | Path,
    settings: Mapping[str, Any],
    read: Callable[[Path], tuple[Any, Mapping[str, Any] | None]] | None = None,
    *,
    overwrite: bool = False,
    ignore: Iterable[str] = (),
) -> Any | None:
    """Load the result that is already at a path, if it was made with the same settings.

    Call it before computing. Its content is there to be used again, or resumed from; with None the caller starts
    from scratch and may replace whatever is there.

    Args:
        path: The result's file.
        settings: Everything that determines the result that is wanted.
        read: Reads the file: its content, and the settings it was made with (None where it does not record them).
            Default: :func:`read_recorded`, the json beside the file.
        overwrite: Whether a damaged result, or one of different or unknown settings, may be replaced.
        ignore: Settings that may differ, such as the number of epochs of a run that is made longer.

    Returns:
        The content; None where there is no file, or one that may be replaced.

    Raises:
        FileError: The result is damaged, or was made with different or unknown settings, and ``overwrite`` is off.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        content, stored = (read or read_recorded)(path)
    except FileError as error:
        if overwrite:
            return None
        raise FileError(f"{error}; or give --overwrite to replace it") from error
    if not overwrite:
        if stored is None:
            raise FileError(f"{path}: does not record the settings it was made with; {REPLACE}")
        check_settings_match(path, stored, settings, ignore)
    elif stored is None or diff_settings(stored, settings, ignore):
        return None
    return content


def check_consistent(
    files: Iterable[tuple[str | Path, Mapping[str, Any]]],
    ignore: Iterable[str] = (),
    *,
    what: str = "does not belong with",
    remedy: str = "make all with the same settings",
) -> None:
    """Refuse to combine files that were made with different settings.

    Each is compared with each, since a fact that one of them does not record matches anything.

    Args:
        files: Their paths and settings.
        ignore: Settings that may differ, such as the seed.
        what: How the message puts it, between the two paths.
        remedy: What the message advises.

    Raises:
        FileError: Two files differ; the message names both, and the settings.
    """
    distinct: dict[str, tuple[str | Path, Mapping[str, Any]]] = {}
    for path, settings in files:
        distinct.setdefault(json.dumps(settings, sort_keys=True, default=str), (path, settings))
    for (first, its), (second, others) in itertools.combinations(distinct.values(), 2):
        if found := diff_settings(its, others, ignore):
            raise FileError(f"{second}: {what} {first}: {', '.join(found)}; {remedy}")


def check_identity(path: str | Path, stored: Mapping[str, Any], remedy: str = REMAKE, **expected: Any) -> None:
    """Refuse a file that was copied or renamed: one that records another seed, epoch, ... than its path names.

    Args:
        path: The file.
        stored: What it records; of ``expected``, only what is recorded is compared.
        remedy: What the message advises.
        **expected: What its path names.

    Raises:
        FileError: They differ.
    """
    expected = {name: value for name, value in expected.items() if name in stored}
    if found := diff_settings({name: stored[name] for name in expected}, expected):
        raise FileError(f"{path}: is not what its name says: {', '.join(found)}; it was copied or renamed; {remedy}")


def checked_array(
    path: str | Path,
    content: Mapping[str, Any],
    name: str,
    ndim: int = 1,
    *,
    kinds: str = "biuf",
    length: int | None = None,
    finite: bool = True,
    remedy: str = REMAKE,
) -> np.ndarray:
    """An array of numbers from a file's content; lists of numbers count as arrays.

    Args:
        path: The file, for messages.
        content: Its values by name.
        name: Which one.
        ndim: How many axes it must have.
        kinds: numpy's letters of the kinds of numbers allowed.
        length: How long its first axis must be; None for any length but 0.
        finite: Whether all values must be finite.
        remedy: What the message advises.

    Raises:
        FileError: It is missing, or anything else.
    """
    if name not in content:
        raise FileError(f"{path}: has no {name}; {remedy}")
    try:
        values = np.asarray(content[name])
    except ValueError:  # uneven lists
        values = np.array(None)
    if values.dtype.kind not in kinds:
        raise FileError(f"{path}: its {name} are not numbers of the right kind; {remedy}")
    if values.ndim != ndim or not values.size or (length is not None and len(values) != length):
        expected = f"{ndim} axes" if length is None else f"{length} entries"
        raise FileError(f"{path}: its {name} has shape {values.shape}, {expected} were expected; {remedy}")
    if finite and not np.isfinite(values).all():
        raise FileError(f"{path}: {np.count_nonzero(~np.isfinite(values))} of its {name} are not finite; {remedy}")
    return values


# ------------------------------------------------------------------------- a pickle, and the json record beside it


def record_path(path: str | Path) -> Path:
    """The json beside a result."""
    return Path(path).with_suffix(".json")


def read_record(path: str | Path) -> dict[str, Any]:
    """The json beside a result: how it was made; empty where there is none (as for the published files).

    Raises:
        FileError: It is damaged.
    """
    beside = record_path(path)
    record = read_json(beside) if beside.exists() else {}
    if not isinstance(record, dict) or not isinstance(record.get("settings", {}), dict):
        raise FileError(f"{beside}: is damaged, it has no settings; {REMAKE}")
    return record


def read_recorded(path: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The record beside a result, and the settings in it; None where it has none.

    Raises:
        FileError: The record is damaged.
    """
    record = read_record(path)
    return record, record.get("settings")


def write_recorded(path: str | Path, value: Any, record: Mapping[str, Any]) -> list[Path]:
    """Write a pickle (protocol 4) and the json beside it; no interruption leaves one beside another's counterpart.

    Args:
        path: The pickle's path.
        value: Plain values and arrays; bytes are taken for the pickle itself.
        record: How it was made.

    Returns:
        Both paths.
    """
    path, beside = Path(path), record_path(path)
    content = value if isinstance(value, bytes) else pickle.dumps(value, protocol=4)

    def write(file: BinaryIO) -> None:
        # All that can fail comes first. Then the old pickle goes, the record takes its place, and the pickle follows.
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        write_with(beside, write_record)

    def write_record(file: BinaryIO) -> None:
        file.write(json_bytes(record))
        file.flush()
        path.unlink(missing_ok=True)

    return [write_with(path, write), beside]
