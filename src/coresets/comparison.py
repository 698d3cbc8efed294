"""Tables that compare selection methods: means and spreads over seeds, as csv, json and Markdown."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from src.artifacts import write_json, write_text
from src.coresets.registry import METHODS

REFERENCE = "random"
EVERYTHING = 1.0  # the share that keeps all

Share = tuple[int | None, float | None]  # examples per class, or else the share


class Record(TypedDict):
    """One cell of a grid: the training on one selection.

    Attributes:
        method: Value of ``--coreset_func``.
        share: Share kept; None where examples per class are given.
        shots: Examples per class; None where the share is given.
        seed: Seed of selection and training.
        finished: Whether it has been trained to the end; if not, what follows is not read.
        accuracy: Test accuracy after the last epoch, in [0, 1].
        best: Highest test accuracy of any epoch.
        epoch: Epochs trained.
        examples: How many examples it was trained on.
        selection_seconds: What choosing took; None if unknown.
        training_seconds: What training took.
    """

    method: str
    share: float | None
    shots: int | None
    seed: int
    finished: bool
    accuracy: float | None
    best: float | None
    epoch: int
    examples: int | None
    selection_seconds: float | None
    training_seconds: float | None


class Row(TypedDict):
    """A method at one share, over the seeds whose cells are finished.

    Attributes:
        method: Value of ``--coreset_func``.
        share: As of the records.
        shots: As of the records.
        mean: Mean of the last test accuracies, in [0, 1]; None without a finished cell.
        std: Their standard deviation over seeds (n - 1 in the denominator); None for fewer than two.
        seeds: How many cells are finished.
        of_seeds: How many seeds the grid has.
        best: Mean of the best test accuracies.
        over_random_points: Mean less that of ``random`` at the same share, in percentage points; None without both.
        examples: Mean number of training examples.
        selection_seconds: Mean time of choosing, where known.
        training_seconds: Mean time of training.
    """

    method: str
    share: float | None
    shots: int | None
    mean: float | None
    std: float | None
    seeds: int
    of_seeds: int
    best: float | None
    over_random_points: float | None
    examples: float | None
    selection_seconds: float | None
    training_seconds: float | None


def summarise(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Means and spreads over seeds of each method and share.

    Args:
        records: Cells as of :class:`Record`; those that are not finished are left out of all means.

    Returns:
        One row per method and share that has a cell: methods in the order in which they first appear, examples per
        class before shares, each ascending.

    Raises:
        ValueError: Two cells have the same method, share and seed.
    """
    cells: dict[tuple[str, Share], dict[int, Mapping[str, Any]]] = {}
    for record in records:
        of_seed = cells.setdefault((record["method"], share_of(record)), {})
        if record["seed"] in of_seed:
            raise ValueError(f"two cells of {record['method']}, {share_of(record)}, seed {record['seed']}")
        of_seed[record["seed"]] = record
    order = {name: place for place, name in enumerate(dict.fromkeys(record["method"] for record in records))}
    of_seeds = len({record["seed"] for record in records})
    rows = [
        _row(method, share, [cell for _, cell in sorted(cells[method, share].items()) if cell["finished"]], of_seeds)
        for method, share in sorted(cells, key=lambda key: (order[key[0]], _place(key[1])))
    ]
    reference = {share_of(row): row["mean"] for row in rows if row["method"] == REFERENCE}
    for row in rows:
        base = reference.get(share_of(row))
        if base is not None and row["mean"] is not None:
            row["over_random_points"] = 100 * (row["mean"] - base)
    return rows


def _row(method: str, share: Share, finished: Sequence[Mapping[str, Any]], of_seeds: int) -> Row:
    accuracies = [cell["accuracy"] for cell in finished]
    return {
        "method": method,
        "share": share[1],
        "shots": share[0],
        "mean": _mean(accuracies),
        "std": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None,
        "seeds": len(finished),
        "of_seeds": of_seeds,
        "best": _mean(cell["best"] for cell in finished),
        "over_random_points": None,
        "examples": _mean(cell["examples"] for cell in finished),
        "selection_seconds": _mean(cell["selection_seconds"] for cell in finished),
        "training_seconds": _mean(cell["training_seconds"] for cell in finished),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def share_of(row: Mapping[str, Any]) -> Share:
    """What a row or record keeps: examples per class, or else the share."""
    return (row["shots"], None) if row["shots"] is not None else (None, row["share"])


def _place(share: Share) -> tuple[bool, float]:
    """Sort key of shares: examples per class first, so that everything comes last."""
    shots, fraction = share
    return (shots is None, fraction if shots is None else shots)


def share_label(share: Share) -> str:
    """A share as people read it."""
    shots, fraction = share
    if shots is not None:
        return f"{shots} per class"
    return "all" if fraction == EVERYTHING else f"{fraction:g}"


def markdown(rows: Sequence[Row], title: str = "") -> str:
    """The table as Markdown: methods by shares, accuracies in percent, the best mean of each share in bold.

    Args:
        rows: Of :func:`summarise`.
        title: What was trained on what, the caption's beginning.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    shares = sorted({share_of(row) for row in rows}, key=_place)
    of = {(row["method"], share_of(row)): row for row in rows}
    best = {share: _best([row["mean"] for row in rows if share_of(row) == share]) for share in shares}
    lines = [["method", *map(share_label, shares)]]
    lines += [[method, *(_entry(of.get((method, share)), best[share]) for share in shares)] for method in methods]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [_line(line, widths) for line in lines]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([caption(rows, title), "", table[0], rule, *table[1:], ""])


def _best(means: Sequence[float | None]) -> float | None:
    """The highest mean; None where there is nothing to compare."""
    known = [mean for mean in means if mean is not None]
    return max(known) if len(known) > 1 else None


def _line(entries: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = entries
    cells = [first.ljust(widths[0]), *(entry.rjust(width) for entry, width in zip(others, widths[1:], strict=True))]
    return f"| {' | '.join(cells)} |"


def _entry(row: Row | None, best: float | None) -> str:
    if row is None or row["mean"] is None:
        return "-"
    text = f"{100 * row['mean']:.1f}"
    if row["std"] is not None:
        text += f" ± {100 * row['std']:.1f}"
    if row["mean"] == best:
        text = f"**{text}**"
    if row["seeds"] < row["of_seeds"]:
        text += f" ({row['seeds']} of {row['of_seeds']} seeds)"
    return text


def caption(rows: Sequence[Row], title: str = "") -> str:
    """The line that says what the numbers are, over how many seeds, and which spread."""
    seeds = max((row["of_seeds"] for row in rows), default=0)
    spread = "one seed" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds"
    shots = any(row["shots"] is not None for row in rows)
    columns = "examples kept of each class" if shots else "share of the examples kept"
    marks = ["bold: the best mean of a column"]
    places = len({row["method"] for row in rows}) * len({share_of(row) for row in rows})
    if places > sum(row["mean"] is not None for row in rows):
        marks.append("-: none finished")
    marks += [
        f"{name} visits that share of each epoch's low-loss examples, and all others"
        for name in dict.fromkeys(row["method"] for row in rows)
        if name in METHODS and METHODS[name].dynamic
    ]
    start = f"{title}: test" if title else "Test"
    return f"{start} accuracy in percent after the last epoch, {spread}; columns: {columns}; {'; '.join(marks)}."


def write_table(
    stem: str | Path, rows: Sequence[Row], records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[Path]:
    """Write a table as ``stem.csv``, ``stem.json`` (with every cell and the settings) and ``stem.md``.

    Args:
        stem: Folder and name; the folder is made.
        rows: Of :func:`summarise`.
        records: The cells that they summarise.
        settings: What all cells share; ``model`` and ``dataset`` stand in the caption.

    Returns:
        The three paths.

    Raises:
        FileError: A file cannot be written.
    """
    stem = Path(stem)
    title = f"{settings['model']} on {settings['dataset']}" if {"model", "dataset"} <= set(settings) else ""
    contents = {"settings": dict(settings), "rows": list(rows), "cells": [dict(record) for record in records]}
    return [
        write_text(stem.with_name(f"{stem.name}.csv"), _csv(rows)),
        write_json(stem.with_name(f"{stem.name}.json"), contents),
        write_text(stem.with_name(f"{stem.name}.md"), markdown(rows, title)),
    ]


def _csv(rows: Sequence[Row]) -> str:
    """One line per row, accuracies in [0, 1]; what is unknown is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(Row.__annotations__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
