"""Evaluate scores against a reference: read both, measure agreement with intervals, and write one table.

The statistics are in ``compare.py``. Every score and every reference is oriented so that high means atypical.
"""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.artifacts.io import read_index_file, write_json, write_text
from src.cli import SEED, check_options, number, option
from src.datasets import DataConfig
from src.errors import ArgumentError, FileError
from src.metrics.compare import Interval, bootstrap, pareto_front, top_overlap
from src.metrics.external import FORMATS, read_numbers
from src.metrics.proxy import find_score_file, given_folders, score_folders
from src.metrics.registry import SCORES, registered_scores, score_name

log = logging.getLogger(__name__)

TOPS = (0.01, 0.05, 0.1)
"""The fractions of examples whose overlap is reported."""


def _reads_file(args: Any) -> bool:
    return args.planted is None and not is_score(args.reference, args.scores_folder, args.metrics_folder)


def is_score(name: str, scores_folder: Sequence[str], metrics_folder: Path | None = None) -> bool:
    """Whether this is a built-in score, or one registered in the folders to search; otherwise it may be a file."""
    folders = score_folders(scores_folder, name, metrics_folder)
    return name in SCORES or name in registered_scores(folders)


@dataclass(frozen=True)
class EvaluationConfig:
    """Which scores to evaluate, and against what.

    Attributes:
        modes: The scores; None for all that exist.
        reference: A score, or a file with one number per training example.
        planted: A file that says which labels are wrong; replaces ``reference``.
        reference_high: What a high number in a reference file means.
        examples: ``"all"``, ``"even"``, ``"odd"`` (by index), or a file of indices.
        resamples: Number of bootstrap resamples.
        confidence: The probability content of the intervals.
        bootstrap_seed: Seed of the resamples.
        orient: Whether to warn about scores with the opposite sign.

    Raises:
        ArgumentError: A value is out of range.
    """

    modes: Sequence[str] | None = option(
        None,
        f"scores to evaluate: {', '.join(SCORES)}, or registered ones (default: all that exist, except the "
        "reference)",
        score_name,
        nargs="+",
        metavar="MODE",
    )
    reference: str = option(
        "mem",
        f"what to compare with: a score, or a file with one number per training example: {FORMATS}",
        metavar="MODE|FILE",
        exclusive="truth",
    )
    planted: Path | None = option(
        None,
        "compare with planted label noise: a file (.npy, .npz, .csv, .json) with the indices of the wrong labels, a "
        "mask, or the labels without the noise, which are compared with those of the data set (default: none)",
        Path,
        metavar="FILE",
        exclusive="truth",
    )
    reference_high: str = option(
        "atypical",
        "what a high number in the file --reference means; C-scores: typical",
        choices=("atypical", "typical"),
        acts=(_reads_file, "unless --reference is a file"),
    )
    examples: str = option(
        "all",
        "examples to compare on: all, those with an even or an odd index, or a file of indices (one per line)",
        metavar="all|even|odd|FILE",
    )
    resamples: int = option(1000, "bootstrap resamples for the intervals", number(int, 20))
    confidence: float = option(
        0.95, "probability content of the intervals", number(float, 0, 1, open_low=True, open_high=True)
    )
    bootstrap_seed: int = option(0, "seed of the bootstrap resamples", SEED)
    orient: bool = option(False, "warn where a score's sign disagrees with the reference")

    def __post_init__(self) -> None:
        check_options(self)


# ---------------------------------------------------------------------------------------------------------- inputs


def find_scores(
    dataset: str, modes: Sequence[str] | None, scores_folder: Sequence[str], metrics_folder: Path | None = None
) -> dict[str, list[Path] | None]:
    """Find the selected scores of a data set, or all that exist.

    Args:
        dataset: See :class:`src.metrics.Proxy`.
        modes: The selected scores; None for all that exist.
        scores_folder: See :func:`src.metrics.proxy.score_folders`.
        metrics_folder: See :func:`src.metrics.proxy.score_folders`.

    Returns:
        Maps each score to the folders to search, for ``Proxy``.

    Raises:
        FileError: A selected score, or one with its own folder, does not exist, or no score exists.
    """
    found = {}
    for mode in modes or [*SCORES, *registered_scores(given_folders(scores_folder, metrics_folder))]:
        folders = score_folders(scores_folder, mode, metrics_folder)
        try:
            find_score_file(mode, dataset, folders)
        except (ArgumentError, FileError):  # ArgumentError: registered, but in the folder of another score
            if modes or any(given.startswith(f"{mode}=") for given in scores_folder):
                raise
            continue
        found[mode] = folders
    if not found:
        # The error lists the searched folders and the command that creates scores.
        find_score_file("samis_loss", dataset, score_folders(scores_folder, "samis_loss", metrics_folder))
    return found


def load_labels(data: DataConfig, datasets_folder: Path) -> tuple[str, np.ndarray | None, dict[str, Any]]:
    """Load the training labels of the data set that scores belong to.

    Returns:
        The data set's name in file names; its labels, or None if it cannot be loaded, which is logged; and the facts
        that ``Proxy`` checks.

    Raises:
        FileError: The user's own data cannot be loaded. Their name in file names is not known without them.
    """
    try:
        examples = data.examples(datasets_folder)
    except FileError as error:
        if ":" in data.dataset:
            raise
        log.warning("%s; skipping correlations within classes", error)
        return data.dataset, None, {}
    checks = {"n": len(examples.labels), "label_hash": examples.label_hash, "data_hash": examples.digest}
    return examples.name, examples.labels, checks


def planted_mask(path: Path, labels: np.ndarray) -> np.ndarray:
    """Read which labels are wrong.

    Args:
        path: A file with indices, a mask (bool, or 0 and 1), or the labels before (or after) noise was planted.
        labels: The data set's training labels ``(n,)``.

    Returns:
        bool ``(n,)``.

    Raises:
        FileError: The file is damaged, does not fit the data set, or marks no label or every label.
    """
    values, n = read_numbers(path), len(labels)
    if values.dtype.kind == "f" and (np.mod(values, 1) != 0).any():
        raise FileError(f"{path}: contains fractions; give indices, a mask, or labels")
    if values.dtype == bool or (len(values) == n and set(np.unique(values)) <= {0, 1} and labels.max() > 1):
        mask = values.astype(bool)
        if len(mask) != n:
            raise FileError(f"{path}: is a mask of {len(mask)} examples, but the data set has {n}")
    elif len(values) == n:
        mask = values != labels
    else:
        if values.min() < 0 or values.max() >= n:
            raise FileError(
                f"{path}: {values.max() if values.max() >= n else values.min():g} is not an index from 0 to {n - 1}"
            )
        mask = np.zeros(n, dtype=bool)
        mask[values.astype(np.int64)] = True
    if mask.all() or not mask.any():
        which = "every label" if mask.all() else "no label"
        raise FileError(f"{path}: marks {which} as wrong; give the data set with the noise as --dataset")
    return mask


def chosen_examples(examples: str, total: int) -> np.ndarray:
    """The indices of ``EvaluationConfig.examples``, in ascending order.

    Raises:
        ArgumentError: It is neither a word nor a file.
        FileError: The file is damaged, or an index is out of range.
    """
    if examples in ("all", "even", "odd"):
        return np.arange(examples == "odd", total, 1 if examples == "all" else 2)
    if not Path(examples).exists():
        raise ArgumentError(
            "examples", f"{examples}: no such file; choose all, even or odd, or give a file of indices"
        )
    indices = np.unique(read_index_file(examples))
    if indices[-1] >= total:
        raise FileError(f"{examples}: {indices[-1]} is not an index from 0 to {total - 1}")
    return indices


# ----------------------------------------------------------------------------------------------------------- table

MEASURES = ("spearman", "spearman_within_class", "auroc")
Row = dict[str, Any]


def evaluate(
    scores: Mapping[str, np.ndarray],
    reference: np.ndarray,
    labels: np.ndarray | None,
    costs: Mapping[str, float | None],
    config: EvaluationConfig,
) -> list[Row]:
    """Measure the agreement of scores with a reference.

    Args:
        scores: Maps each score's name to its values ``(total,)``.
        reference: ``(total,)``; bool if it marks wrong labels.
        labels: The classes ``(total,)``, or None.
        costs: Each score's cost in epoch-equivalents; None if unknown.
        config: Which examples, and the bootstrap.

    Returns:
        One row per score, best first (by AUROC for wrong labels, otherwise by Spearman's correlation): ``score``,
        ``examples``; ``spearman``, ``spearman_within_class`` and ``auroc``, each with ``_low`` and ``_high``;
        ``top_1``, ``top_5`` and ``top_10``, the fraction of the score's top 1, 5 and 10 % that is in the reference's
        top (for a bool reference: that is marked); ``cost``; and ``pareto``, whether no other score is at most as
        expensive and at least as good. A value that does not exist is None.

    Raises:
        ArgumentError: Fewer than three examples are left for a score that was requested, or for all scores. Other
            such scores are left out with a warning.
    """
    chosen = chosen_examples(config.examples, len(reference))
    reference, labels = reference[chosen], None if labels is None else labels[chosen]
    own = {name: np.asarray(values, dtype=np.float64)[chosen] for name, values in scores.items()}
    planted = reference.dtype == bool
    shared = {name: int((~np.isnan(values) & ~np.isnan(reference)).sum()) for name, values in own.items()}
    for name in [name for name, count in shared.items() if count < 3]:
        line = f"{name} and the reference share {shared[name]} examples"
        if config.modes is not None or max(shared.values()) < 3:
            raise ArgumentError("examples", f"{config.examples}: {line}; choose more")
        log.warning("left out %s: %s", name, line)
        del own[name]
    found = bootstrap(
        list(own.values()),
        reference,
        labels,
        resamples=config.resamples,
        confidence=config.confidence,
        seed=config.bootstrap_seed,
        progress=True,
    )
    rows = []
    for (name, values), intervals in zip(own.items(), found, strict=True):
        row: Row = {"score": name}
        for measure in MEASURES:
            interval = intervals.get(measure, Interval(np.nan, np.nan, np.nan))
            row |= dict(zip((measure, f"{measure}_low", f"{measure}_high"), map(_known, interval), strict=True))
        for top in TOPS:
            row[f"top_{100 * top:.0f}"] = (
                _share_marked(values, reference, top) if planted else top_overlap(values, reference, top)
            )
        rows.append({**row, "examples": shared[name], "cost": costs.get(name), "pareto": False})
    main = "auroc" if planted else "spearman"
    agreement = [np.nan if row[main] is None else row[main] for row in rows]
    for place in pareto_front([row["cost"] for row in rows], agreement):
        rows[place]["pareto"] = True
    return sorted(rows, key=lambda row: -np.inf if row[main] is None else row[main], reverse=True)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _share_marked(scores: np.ndarray, marked: np.ndarray, fraction: float) -> float:
    """The fraction of marked examples among the top ``fraction`` by score."""
    known = ~np.isnan(scores)
    scores, marked = scores[known], marked[known]
    top = np.argsort(scores, kind="stable")[-max(1, round(fraction * len(scores))) :]
    return float(marked[top].mean())


def wrong_signs(rows: Sequence[Row]) -> list[str]:
    """The scores whose rank correlation with the reference is negative, with an interval that excludes 0."""
    return [row["score"] for row in rows if row["spearman_high"] is not None and row["spearman_high"] < 0]


def markdown(rows: Sequence[Row], caption: str, confidence: float) -> str:
    """Format the rows as a Markdown table; empty columns are left out."""
    planted = any(row["auroc"] is not None for row in rows)
    columns = {"score": [f"`{row['score']}`" for row in rows]}
    names = {"auroc": "AUROC", "spearman": "Spearman", "spearman_within_class": "within class"}
    for measure in sorted(MEASURES, key=lambda name: name != "auroc"):
        if any(row[measure] is not None for row in rows):
            columns[names[measure]] = [
                "-" if row[measure] is None else f"{row[measure]:.3f} ({_range(row, measure)})" for row in rows
            ]
    for top in TOPS:
        columns[f"top {100 * top:.0f} %"] = [f"{row[f'top_{100 * top:.0f}']:.3f}" for row in rows]
    columns["cost (epochs)"] = [
        "unknown" if row["cost"] is None else f"{row['cost']:.4g}{' *' if row['pareto'] else ''}" for row in rows
    ]
    table = [[name, *cells] for name, cells in columns.items()]
    widths = [max(map(len, column)) for column in table]
    padded = [[cell.rjust(width) for cell in column] for column, width in zip(table, widths, strict=True)]
    padded[0] = [cell.strip().ljust(widths[0]) for cell in padded[0]]
    lines = [f"| {' | '.join(line)} |" for line in zip(*padded, strict=True)]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    tops = "fraction of the top examples by score whose label is wrong" if planted else "fraction of the top shared"
    notes = (
        f"In parentheses: {100 * confidence:g} % bootstrap intervals over examples. Top: {tops}. Cost: one forward "
        "and backward pass over the full training set is 1, summed over all models and seeds. *: no other score "
        "costs at most as much and agrees at least as well."
    )
    return "\n".join([caption, "", lines[0], rule, *lines[1:], "", notes, ""])


def _range(row: Row, measure: str) -> str:
    low, high = row[f"{measure}_low"], row[f"{measure}_high"]
    return "-" if low is None else f"{low:.3f} to {high:.3f}"


def write_rows(stem: Path, rows: Sequence[Row], settings: Mapping[str, Any], text: str) -> list[Path]:
    """Write a table as ``stem.csv``, ``stem.json`` (with settings) and ``stem.md`` (the text); returns the paths."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return [
        write_text(stem.with_name(f"{stem.name}.csv"), lines.getvalue()),
        write_json(stem.with_name(f"{stem.name}.json"), {"settings": settings, "rows": list(rows)}),
        write_text(stem.with_name(f"{stem.name}.md"), text),
    ]
