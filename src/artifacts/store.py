"""Results on disk: one policy for settings, overwriting, damaged files, resuming, and combining results.

A result consists of a path, the settings that determine it, and its content. Before anything is computed,
:func:`load_result` decides whether an existing result is reused, refused, or replaced. Every refusal is a
:class:`FileError` that names the file, what differs, and what to do.
"""

import hashlib
import itertools
import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from src.artifacts.io import file_digest, json_bytes, read_json, read_npz, read_pickle, write_with
from src.artifacts.io import label_hash as hash_labels
from src.errors import FileError

ELSEWHERE = "choose different folders"
REPLACE = f"give --overwrite to replace it, or {ELSEWHERE}"
REMAKE = "recreate it"
REMAKE_OVER = f"{REMAKE} with --overwrite"

# The value of a setting that a record lacks: its default or, if the default has changed since (as for the initial
# weights), the value before records contained the setting. All other settings default to None.
DEFAULTS: dict[str, Any] = {
    "adaptive": False,
    "alternate_flips": False,
    "cutout_holes": 0,
    "data_augmentation": False,
    "etl_never_learned": "last",
    "finite_time": False,
    "hess_init": 0.1,
    "initialization": "older version",
    "input_gradients": False,
    "lr_min": 0.0,
    "measure_proxies": False,
    "momentum": 0.9,
    "nesterov": False,
    "precision": "fp32",
    "pretrained": False,
    "retrain_from": "base",
    "rho": 0.05,
    "selection_subsample": "exact",  # in the record of a run on a selection
    "subsample": "exact",  # in the record of the selection itself, whose names happen to start with "selection_"
    "sync_bn": False,
    "var_version": "kfac",
    "weight_decay": 0.0,
}

# Facts that older records lack. An absent fact matches anything.
_UNKNOWN_IF_ABSENT = {"data_hash", "held_out", "images", "test_fraction", "test_seed", "training", "training_epochs"}

# Settings that take effect only in combination with others. Otherwise they are not recorded, and are ignored in older
# records.
_ACTS = {
    "adaptive": lambda settings: settings.get("optimizer", "sam") == "sam",
    "rho": lambda settings: settings.get("optimizer", "sam") == "sam",
    "hess_init": lambda settings: settings.get("optimizer", "iblr") == "iblr",
    "lr_min": lambda settings: settings.get("lr_sched") != "const",
    "cutout_length": lambda settings: bool(settings.get("cutout_holes", True)),
    "dual_c": lambda settings: settings.get("dual_beta", True),
    "finite_time": lambda settings: not settings.get("optim_var"),
    "laplace_backend": lambda settings: not settings.get("optim_var"),
    "trace_tolerance": lambda settings: settings.get("trace_probes", 1) > 0,
    "var_version": lambda settings: not settings.get("optim_var"),
}

# Settings of one object inside the record of another: the prefix of their names, and settings implied by the prefix.
_PREFIXES: dict[str, dict[str, Any]] = {
    "training_": {"optimizer": "sam"},  # for a pair of models, the settings of the SAM-trained model
    "selection_": {},
    "pretraining ": {},
}


# ------------------------------------------------------------------------------------------------------ settings


def acting_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that take effect given the others. Only these are recorded."""
    return {name: value for name, value in settings.items() if _acts(name, settings)}


def setting_value(settings: Mapping[str, Any], name: str) -> Any:
    """The effective value of a setting: its default if the record lacks it or it has no effect."""
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
    """List the settings that differ, as ``name (stored value vs. wanted value)``.

    Values are compared as json, so a tuple equals the list that it is read back as. Dictionaries are compared entry
    by entry. A setting that is missing or has no effect counts as its default, so adding a setting does not
    invalidate earlier results. Facts that earlier records could not contain match anything.
    """
    skip = set(ignore)
    lines = []
    for name in sorted((set(stored) | set(wanted)) - skip):
        there, here = setting_value(stored, name), setting_value(wanted, name)
        if {name, _split(name)[1]} & _UNKNOWN_IF_ABSENT and None in (there, here):
            continue
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            lines += [f"{name} {line}" for line in diff_settings(there, here)]
        elif json.dumps(there, sort_keys=True, default=str) != json.dumps(here, sort_keys=True, default=str):
            lines.append(f"{name} ({there} vs. {here})")
    return lines


def parse_settings(path: str | Path, text: Any) -> dict[str, Any]:
    """Parse the settings that a result contains as json text.

    Raises:
        FileError: The text is not a json object; the message names ``path``.
    """
    try:
        settings = json.loads(str(text))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise FileError(f"{path}: is damaged: its settings cannot be read; {REMAKE}")
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
        if "decoding" not in ignore and (decode := other_decode(stored, wanted)):
            remedy = f"give --decode={decode} for the same images, or {remedy.removeprefix('give ')}"
        raise FileError(f"{path}: was made with different settings: {', '.join(found)}; {remedy}")


def other_decode(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The ``--decode`` value of a stored result, if it differs from the requested one for the same photos; else None.

    Older versions always decoded at full size and did not record the setting.
    """
    there, here = ("draft" in (settings.get("decoding") or "").split(",") for settings in (stored, wanted))
    if there == here or stored.get("dataset") != wanted.get("dataset"):
        return None
    return "draft" if there else "full"


def load_result(
    path: str | Path,
    settings: Mapping[str, Any],
    read: Callable[[Path], tuple[Any, Mapping[str, Any] | None]] | None = None,
    *,
    overwrite: bool = False,
    ignore: Iterable[str] = (),
    elsewhere: str = ELSEWHERE,
) -> Any | None:
    """Load an existing result if it was made with the same settings.

    Call this before computing. The caller can reuse the returned content or resume from it. If the function returns
    None, the caller starts from scratch and may replace any existing file.

    Args:
        path: The result's file.
        settings: All settings that determine the requested result.
        read: Reads the file and returns its content and its settings (None if they are not recorded). Defaults to
            :func:`read_recorded`, which reads the json file next to the result.
        overwrite: Whether to replace a result that is damaged or has different or unknown settings.
        ignore: Settings that may differ, such as the number of epochs when a run is extended.
        elsewhere: The alternative to overwriting that the message suggests.

    Returns:
        The content; None if the file does not exist or may be replaced.

    Raises:
        FileError: The result is damaged or has different or unknown settings, and ``overwrite`` is False.
    """
    path, remedy = Path(path), REPLACE.replace(ELSEWHERE, elsewhere)
    if not path.exists():
        return None
    try:
        content, stored = (read or read_recorded)(path)
    except FileError as error:
        if overwrite:
            return None
        advised = "; " in str(error).removeprefix(str(path))
        raise FileError(f"{error}{', or' if advised else ';'} {remedy}") from error
    if not overwrite:
        if stored is None:
            raise FileError(f"{path}: does not record the settings it was made with; {remedy}")
        check_settings_match(path, stored, settings, ignore, remedy)
    elif stored is None or diff_settings(stored, settings, ignore):
        return None
    return content


def check_consistent(
    files: Iterable[tuple[str | Path, Mapping[str, Any]]],
    ignore: Iterable[str] = (),
    *,
    what: str = "cannot be combined with",
    remedy: str = "create all of them with the same settings",
) -> None:
    """Refuse to combine files that were made with different settings.

    All pairs are compared, since a fact that one file does not record matches anything.

    Args:
        files: The paths and settings.
        ignore: Settings that may differ, such as the seed.
        what: The verb phrase between the two paths in the message.
        remedy: The remedy in the message.

    Raises:
        FileError: Two files differ; the message names both files and the settings that differ.
    """
    distinct: dict[str, tuple[str | Path, Mapping[str, Any]]] = {}
    for path, settings in files:
        distinct.setdefault(json.dumps(settings, sort_keys=True, default=str), (path, settings))
    for (first, its), (second, others) in itertools.combinations(distinct.values(), 2):
        if found := diff_settings(its, others, ignore):
            raise FileError(f"{second}: {what} {first}: {', '.join(found)}; {remedy}")


def check_identity(path: str | Path, stored: Mapping[str, Any], remedy: str = REMAKE, **expected: Any) -> None:
    """Refuse a copied or renamed file, whose recorded seed, epoch, or other fact differs from its path.

    Args:
        path: The file.
        stored: The facts that the file records. Facts in ``expected`` that are not recorded are not compared.
        remedy: The remedy in the message.
        **expected: The facts that the path implies.

    Raises:
        FileError: The facts differ.
    """
    expected = {name: value for name, value in expected.items() if name in stored}
    if found := diff_settings({name: stored[name] for name in expected}, expected):
        raise FileError(
            f"{path}: its content does not match its name: {', '.join(found)}; it was copied or renamed; {remedy}"
        )


def check_same_data(
    path: str | Path, stored: Mapping[str, Any], remedy: str = "give a file made for this data set", **data: Any
) -> None:
    """Refuse a file that was made for different data.

    Args:
        path: The file.
        stored: The facts that the file records. A fact that is not recorded matches anything.
        remedy: The remedy in the message.
        **data: The data set's ``total``, ``label_hash``, and ``data_hash``; None to skip a comparison.

    Raises:
        FileError: The data differ.
    """
    known, wanted = stored.get("total"), data.get("total")
    if known and wanted and known != wanted:
        raise FileError(f"{path}: was made for {known} examples, but the data set has {wanted}; {remedy}")
    for name, what in (("label_hash", "labels"), ("data_hash", "images")):
        known, wanted = stored.get(name), data.get(name)
        if known and wanted and known != wanted:
            hint = "; read photos with the same --decode" if what == "images" else ""
            raise FileError(f"{path}: was made for different {what} (hash {known} vs. {wanted}); {remedy}{hint}")


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
    """Return an array of numbers from a file's content after checking it. Lists of numbers count as arrays.

    Args:
        path: The file, for messages.
        content: The file's values by name.
        name: The name of the array.
        ndim: The required number of axes.
        kinds: The allowed numpy dtype kinds.
        length: The required length of the first axis; None for any nonzero length.
        finite: Whether all values must be finite.
        remedy: The remedy in the message.

    Raises:
        FileError: The array is missing or fails a check.
    """
    if name not in content:
        raise FileError(f"{path}: has no array {name!r}; {remedy}")
    try:
        values = np.asarray(content[name])
    except ValueError:  # ragged lists
        values = np.array(None)
    if values.dtype.kind not in kinds:
        expected = "numbers" if "f" in kinds else "integers"
        raise FileError(f"{path}: array {name!r} has dtype {values.dtype}, expected {expected}; {remedy}")
    if values.ndim != ndim or not values.size or (length is not None and len(values) != length):
        expected = f"a {ndim}-D array" if length is None else f"{length} entries"
        raise FileError(f"{path}: array {name!r} has shape {values.shape}, expected {expected}; {remedy}")
    if finite and not np.isfinite(values).all():
        count = np.count_nonzero(~np.isfinite(values))
        raise FileError(f"{path}: array {name!r} has {count} values that are not finite; {remedy}")
    return values


# ------------------------------------------------------------------------ a pickle and the json record next to it


def record_path(path: str | Path) -> Path:
    """The path of the json file next to a result."""
    return Path(path).with_suffix(".json")


def read_record(path: str | Path) -> dict[str, Any]:
    """Read the json file next to a result, which records how it was made.

    Returns:
        The record; empty if there is no json file (as for the published files).

    Raises:
        FileError: The json file is damaged.
    """
    json_path = record_path(path)
    record = read_json(json_path) if json_path.exists() else {}
    if not isinstance(record, dict) or not isinstance(record.get("settings", {}), dict):
        raise FileError(f"{json_path}: is damaged: it has no valid settings; {REMAKE}")
    return record


def read_recorded(path: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Read the record next to a result, and the settings in it (None if it has none).

    Raises:
        FileError: The record is damaged.
    """
    record = read_record(path)
    return record, record.get("settings")


def write_recorded(path: str | Path, value: Any, record: Mapping[str, Any]) -> list[Path]:
    """Write a pickle (protocol 4) and the json file next to it. No interruption leaves a mismatched pair.

    Args:
        path: The pickle's path.
        value: Plain values and arrays, or bytes that already are the pickle.
        record: How the value was made.

    Returns:
        Both paths.
    """
    path, json_path = Path(path), record_path(path)

    def write(file: BinaryIO) -> None:
        # Steps that can fail come first. Then the old pickle is removed, the record replaced, and the pickle renamed.
        if isinstance(value, bytes):
            file.write(value)
        else:
            pickle.dump(value, file, protocol=4)
        file.flush()
        os.fsync(file.fileno())
        write_with(json_path, write_record)

    def write_record(file: BinaryIO) -> None:
        file.write(json_bytes(record))
        file.flush()
        os.fsync(file.fileno())
        path.unlink(missing_ok=True)
        path.with_suffix(".csv").unlink(missing_ok=True)  # the table of older scores

    return [write_with(path, write), json_path]


# ----------------------------------------------------------------------------------------------- averaged scores
#
# A pickle {index: score} in the published format: protocol 4, plain int keys in ascending order, finite float values.
# A file made on a subset contains only the scored examples. The json file next to it records how the scores were
# made, the number of scores (n), the size of the data set (total), and the sha256 of the pickle, which detects a
# mismatched pair.

# entries of a record that follow from the scores or their run
_DERIVED = ("n", "total", "sha256", "raw_min", "raw_max", "cost", "training_accuracy")


def write_scores(path: str | Path, scores: np.ndarray, record: Mapping[str, Any]) -> list[Path]:
    """Write an averaged score file and its json file.

    Args:
        path: The pickle's path.
        scores: ``(total,)``, NaN for examples without a score.
        record: How the scores were made.

    Returns:
        The two paths.

    Raises:
        FileError: No example has a score, or a score is infinite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    indices = np.flatnonzero(~np.isnan(scores))
    if not len(indices) or np.isinf(scores[indices]).any():
        raise FileError(f"{path}: not written, {'a score is infinite' if len(indices) else 'no example has a score'}")
    content = pickle.dumps(dict(zip(indices.tolist(), scores[indices].tolist(), strict=True)), protocol=4)
    digest = hashlib.sha256(content).hexdigest()
    return write_recorded(path, content, {**record, "n": len(indices), "total": len(scores), "sha256": digest})


def check_score_target(
    path: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False, only: Iterable[str] | None = None
) -> None:
    """Refuse to replace a score file that was made with different settings.

    Args:
        path: The file to be written.
        settings: The settings that determine its scores. Settings that the file's json lacks count as their defaults.
        overwrite: Whether to replace any file.
        only: The entries of the file's json to compare, if it also contains facts that are not known yet. By default,
            all entries that do not follow from the scores.

    Raises:
        FileError: The settings differ, or are not recorded.
    """

    def read(path: Path) -> tuple[bool, dict[str, Any] | None]:
        record = read_record(path)
        if only is not None:
            record = {name: record[name] for name in only if name in record}
        return True, record or None

    load_result(path, settings, read, overwrite=overwrite, ignore=_DERIVED)


def read_scores(path: str | Path) -> np.ndarray:
    """Read a score file into an array by index.

    Returns:
        float64 ``(total,)``; NaN for examples that a file made on a subset does not score.

    Raises:
        FileError: The file is missing, damaged, or incomplete, or does not map indices to finite numbers.
    """
    content = read_pickle(path)
    if not isinstance(content, dict) or not content:
        raise FileError(f"{path}: is not a score file (a non-empty dict index -> score); {REMAKE}")
    if any(not issubclass(kind, int | np.integer) or kind is bool for kind in set(map(type, content))):
        raise FileError(f"{path}: is not a score file: some keys are not integers; {REMAKE}")
    try:
        keys = np.fromiter(content.keys(), np.int64, len(content))
        values = np.fromiter(content.values(), np.float64, len(content))
    except (TypeError, ValueError, OverflowError) as error:
        raise FileError(f"{path}: is not a score file: some scores are not numbers; {REMAKE}") from error
    if keys.min() < 0:
        raise FileError(f"{path}: has the negative index {keys.min()}; indices start at 0")
    if not np.isfinite(values).all():
        bad = keys[~np.isfinite(values)][0]
        raise FileError(f"{path}: the score of example {bad} is {content[bad]}; {REMAKE}")
    record = read_record(path)
    total, scored = record.get("total", len(keys)), record.get("n", len(keys))
    if not isinstance(total, int) or total < 1:
        raise FileError(f"{record_path(path)}: is damaged: its total is {total}; {REMAKE}")
    if record.get("sha256", digest := file_digest(path)) != digest:
        raise FileError(
            f"{path}: does not match {record_path(path).name}; one of them was replaced; "
            "repeat the command that creates both"
        )
    if scored != len(keys):
        raise FileError(f"{path}: has {len(keys)} scores, but its json file lists {scored}; {REMAKE}")
    if keys.max() >= total:
        holes = np.setdiff1d(np.arange(min(total, len(keys) + 1)), keys)
        which = f"has no score for example {holes[0]}" if len(holes) else f"scores more than {total} examples"
        raise FileError(f"{path}: {which} ({len(keys)} scores, highest index {keys.max()}); {REMAKE}")
    scores = np.full(total, np.nan)
    scores[keys] = values
    return scores


def read_memorization(path: str | Path) -> np.ndarray:
    """Read Feldman and Zhang's estimates (key ``tr_mem``), without normalization.

    Returns:
        float64 ``(n,)``.

    Raises:
        FileError: The file is missing or damaged, or its ``tr_mem`` is missing or not finite.
    """
    scores = checked_array(path, read_npz(path, ("tr_mem",)), "tr_mem", kinds="fiu", remedy=_FETCH)
    return scores.astype(np.float64)


_FETCH = "fetch it with fetch_scores.py"


def check_score_data(
    path: str | Path,
    scores: np.ndarray,
    n: int | None = None,
    label_hash: str | None = None,
    data_hash: str | None = None,
) -> None:
    """Refuse a score file that was made for another data set.

    Args:
        path: The file.
        scores: The scores read from it.
        n: The size of the full training set.
        label_hash: ``artifacts.label_hash`` of its labels; compared if the file records its labels.
        data_hash: ``ImageSet.digest``; compared if the file records it.

    Raises:
        FileError: The number of examples, the labels or the images differ.
    """
    stored = {**read_record(path), "total": len(scores)}
    archive = read_npz(path, ("tr_labels",)) if Path(path).suffix == ".npz" else {}
    if label_hash and archive:
        labels = checked_array(path, archive, "tr_labels", kinds="iuf", length=len(scores), remedy=_FETCH)
        if np.mod(labels, 1).any():
            raise FileError(f"{path}: some of its tr_labels are not integers; {_FETCH}")
        stored["label_hash"] = hash_labels(labels)
    check_same_data(
        path, stored, "give scores made for this data set", total=n, label_hash=label_hash, data_hash=data_hash
    )
