"""A grid of pruning runs, methods x shares x seeds, and the table that compares them: csv, json and Markdown."""

from __future__ import annotations

import csv
import io
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from tqdm import tqdm

from src.artifacts.io import read_json, save_figure, write_json, write_text
from src.artifacts.locks import lock, try_lock
from src.artifacts.paths import Folders, comparison_stem
from src.artifacts.store import ELSEWHERE, REPLACE, load_result
from src.context import RunContext, TrainingRun
from src.coresets.config import GridConfig, PretrainConfig, SelectionConfig
from src.coresets.registry import METHODS, REFERENCE
from src.coresets.runner import CoresetRun
from src.errors import FileError, UserError
from src.training import RunConfig

log = logging.getLogger(__name__)

EVERYTHING = 1.0  # the share that keeps all
_DRAW_EVERY = 60.0  # seconds between two drawings of the figure while the grid runs

Column = tuple[bool, float]  # whether it is a share, and the share or the examples per class
Cell = tuple[str, float | None, int | None, int]  # method, share, or else examples per class, seed


def _describe(method: str, share: float | None, shots: int | None, seed: int) -> str:
    return f"{method} {f'{share:g}' if shots is None else f'{shots} shots'} seed {seed}"


class Grid:
    """All cells, the runs that fill them, and the files that compare them.

    Args:
        context: Device and data.
        config: Methods, shares and seeds.
        selections: For each method, its selection at any share.
        pretrain: Settings of pre-training.
        run: The downstream run, of any seed.
        folders: Where files go.
    """

    def __init__(
        self,
        context: RunContext,
        config: GridConfig,
        selections: Mapping[str, SelectionConfig],
        pretrain: PretrainConfig,
        run: RunConfig,
        folders: Folders,
    ) -> None:
        self.context, self.config, self.selections, self.pretrain = context, config, selections, pretrain
        self.run_config, self.folders = run, folders
        self.stem = comparison_stem(folders.plots_folder, context.entry.name, run.model.model, config.name)
        self.runs = dict(self._runs())
        self._finished: dict[Cell, dict[str, Any]] = {}

    def _runs(self) -> Iterator[tuple[Cell, CoresetRun]]:
        """Seed by seed, so that an unfinished grid compares all methods on the seeds that it has."""
        config = self.config
        shares = [
            *({"coreset_fraction": share} for share in config.fractions),
            *({"coreset_fraction": None, "shots": shots} for shots in config.shots),
            *({"coreset_fraction": None, "shots_up_to": shots} for shots in config.shots_up_to),
        ]
        chosen = [replace(self.selections[func], **share) for func in config.funcs for share in shares]
        if config.full and not (REFERENCE in config.funcs and EVERYTHING in config.fractions):
            everything = {"coreset_fraction": EVERYTHING, "shots": None, "shots_up_to": None}
            chosen.insert(0, replace(self.selections[REFERENCE], **everything))
        for seed in config.seeds:
            run = replace(self.run_config, training=replace(self.run_config.training, seed=seed))
            for selection in chosen:
                shots = selection.shots or selection.shots_up_to
                cell = (selection.coreset_func, selection.coreset_fraction, shots, seed)
                yield cell, CoresetRun(self.context, selection, self.pretrain, run, self.folders)

    def check(self) -> None:
        """Check before the first run for what would stop a later one.

        Raises:
            ArgumentError: A share does not fit the data, or a method.
            FileError: A stored score is missing, or runs or a table with different settings are already there.
        """
        for cell, run in self.runs.items():
            if cell[-1] == self.config.seeds[0]:
                run.check()
            if not self.run_config.overwrite:
                run.check_stored()
        if not self.run_config.overwrite:
            self._check_table()

    def _check_table(self) -> None:
        """Refuse to replace another table: one with different settings, or with cells that this grid lacks."""

        def read(path: Path) -> tuple[set[Cell], dict[str, Any]]:
            content = read_json(path)
            try:
                cells = {(c["method"], c["share"], c["shots"], c["seed"]) for c in content.get("cells", ())}
                return cells, dict(content.get("settings", {}))
            except (TypeError, KeyError, ValueError, AttributeError) as error:
                raise FileError(f"{path}: is damaged, or not a table of this script") from error

        path, elsewhere = self.stem.with_name(f"{self.stem.name}.json"), "choose another --name"
        pretrains = any(self.selections[func].method.needs.pretraining for func in self.config.funcs)
        ignore = () if pretrains else asdict(self.pretrain)
        cells = load_result(path, self.settings(), read, ignore=ignore, elsewhere=elsewhere)
        if other := (cells or set()) - set(self.runs):
            cell, remedy = _describe(*min(other, key=str)), REPLACE.replace(ELSEWHERE, elsewhere)
            raise FileError(f"{path}: has {len(other)} cells that this grid lacks, such as {cell}; {remedy}")

    # ------------------------------------------------------------------------------------------------- running

    def run(self) -> dict[str, str]:
        """Train the cells that are not finished; update the table after each, and the figure once a minute.

        Another process may run the same grid: cells that it is training come last. Those that are finished are not
        locked, and may be in a folder that cannot be written.

        Returns:
            The cells that failed, with the reason.
        """
        failures: dict[str, str] = {}
        done: set[Cell] = set()
        # a table that replaces another's is never beside the other's figure
        drawn = -math.inf if self.run_config.overwrite else time.monotonic()
        with tqdm(total=len(self.runs), unit="cell", disable=None, dynamic_ncols=True, desc="grid") as bar:
            for wait in (False, True):
                for number, (cell, run) in enumerate(self.runs.items(), 1):
                    if cell in done:
                        continue
                    name = _describe(*cell)
                    if run.is_done():
                        done.add(cell)
                        bar.update()
                        run.files.remove_states()
                        continue
                    held = lock(run.lock, f"training {name}", wait=True) if wait else try_lock(run.lock)
                    with held as mine:
                        if not (mine or wait):
                            continue
                        done.add(cell)
                        bar.update()
                        if run.is_done():  # by another process, since the look above
                            continue
                        log.info("cell %d of %d: %s", number, len(self.runs), name)
                        try:
                            run.train()
                        except UserError as error:
                            log.error("%s: %s", name, str(error))
                            failures[name] = str(error)
                            continue
                        run.files.remove_states()
                    draw = time.monotonic() - drawn > _DRAW_EVERY
                    self.write(draw=draw)
                    if draw:
                        drawn = time.monotonic()
        return failures

    # ------------------------------------------------------------------------------------------------- comparing

    def settings(self) -> dict[str, Any]:
        """What all cells share."""
        selections = [self.selections[func] for func in self.config.funcs]
        run = TrainingRun(self.context, self.run_config, self.folders, "", self.context.train)
        facts = {
            **run.settings,
            "coreset_mode": selections[0].coreset_mode,
            "coreset_epochs": self.run_config.training.epochs,
            **asdict(self.pretrain),
            **{name: value for selection in selections for name, value in asdict(selection.options).items()},
            "per_class": selections[0].per_class,
            "shots_up_to": bool(self.config.shots_up_to) or None,
        }
        del facts["seed"]
        return facts

    def records(self) -> list[dict[str, Any]]:
        """One record per cell, of what its files contain; those of finished cells are read once.

        A record has ``method``, ``share`` or else ``shots``, ``seed``, ``finished`` and, where it is: ``accuracy``
        after the last epoch and the ``best`` one, in [0, 1], ``epoch`` (how many), ``examples`` (on average per
        epoch), ``selection_seconds`` (None if unknown) and ``training_seconds``.
        """
        for cell, run in self.runs.items():
            if cell not in self._finished and (record := self._read(run)) is not None:
                self._finished[cell] = record
        nothing = {"finished": False, "accuracy": None, "best": None, "epoch": 0, "examples": None,
                   "selection_seconds": None, "training_seconds": None}  # fmt: skip
        names = ("method", "share", "shots", "seed")
        return [{**dict(zip(names, cell, strict=True)), **self._finished.get(cell, nothing)} for cell in self.runs]

    def _read(self, run: CoresetRun) -> dict[str, Any] | None:
        """What a finished run's files contain; None where it is not finished, or they cannot be read."""
        try:
            if not run.is_done():
                return None
            results, seconds = run.files.read_results(), run.selection_seconds()
        except FileError as error:
            log.warning("%s", error)
            return None
        history = results["history"]
        return {
            "finished": True,
            "accuracy": history[-1]["test_accuracy"],
            "best": results["best_test_accuracy"],
            "epoch": len(history),
            "examples": sum(r.get("examples", results["settings"]["examples"]) for r in history) / len(history),
            "selection_seconds": None if math.isnan(seconds) else seconds,
            "training_seconds": results["seconds"],
        }

    def write(self, *, draw: bool = True) -> list[Path]:
        """Write the table of what is done, by any process, and the figure; nothing while nothing is.

        Args:
            draw: Whether to draw the figure, which takes many times as long as the table.

        Raises:
            FileError: Another grid has written its table there since this one began.
        """
        with lock(self.stem.with_name(f"{self.stem.name}.lock"), "writing the table", wait=True):
            if not self.run_config.overwrite:
                self._check_table()
            records = self.records()
            if not any(record["finished"] for record in records):
                return []
            rows = summarize(records)
            paths = write_table(self.stem, rows, records, self.settings())
            if not draw:
                return paths
            from src.coresets.plots import accuracy_figure  # takes matplotlib

            full = next((row for row in rows if (row["share"], row["method"]) == (EVERYTHING, REFERENCE)), None)
            drawn = [row for row in rows if not (self.config.full and row is full)]
            title = f"{self.run_config.model.model} on {self.context.entry.name}"
            figure = accuracy_figure(
                drawn or rows, title=title, full=full and full["mean"], full_std=full and full["std"]
            )
            return [*paths, *save_figure(figure, self.stem)]

    def table(self) -> str:
        """The table as Markdown."""
        return markdown(summarize(self.records()))


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


def summarize(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Means and spreads over seeds of each method and share.

    Args:
        records: One per cell, see :meth:`Grid.records`; those that are not finished are left out of all means.

    Returns:
        One row per method and share that has a cell: methods in the order in which they first appear, examples per
        class before shares, each ascending.
    """
    cells: dict[tuple[str, Column], list[Mapping[str, Any]]] = {}
    for record in records:
        cells.setdefault((record["method"], _column(record)), []).append(record)
    methods = list(dict.fromkeys(record["method"] for record in records))
    rows: list[Row] = []
    for method, column in sorted(cells, key=lambda key: (methods.index(key[0]), key[1])):
        own = sorted(cells[method, column], key=lambda record: record["seed"])
        finished = [record for record in own if record["finished"]]
        accuracies = [record["accuracy"] for record in finished]
        row: Row = {
            "method": method,
            "share": own[0]["share"],
            "shots": own[0]["shots"],
            "mean": _mean(accuracies),
            "std": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None,
            "seeds": len(finished),
            "of_seeds": len({record["seed"] for record in records}),
            "best": _mean(record["best"] for record in finished),
            "over_random_points": None,
            "examples": _mean(record["examples"] for record in finished),
            "selection_seconds": _mean(record["selection_seconds"] for record in finished),
            "training_seconds": _mean(record["training_seconds"] for record in finished),
        }
        rows.append(row)
    reference = {_column(row): row["mean"] for row in rows if row["method"] == REFERENCE}
    for row in rows:
        base = reference.get(_column(row))
        if base is not None and row["mean"] is not None:
            row["over_random_points"] = 100 * (row["mean"] - base)
    return rows


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _column(row: Mapping[str, Any]) -> Column:
    """The column of a row or record; columns sort with examples per class first, so that everything comes last."""
    return (True, row["share"]) if row["shots"] is None else (False, row["shots"])


def markdown(rows: Sequence[Row], title: str = "") -> str:
    """The table as Markdown: methods by shares, accuracies in percent, the best mean of each share in bold.

    Args:
        rows: Of :func:`summarize`.
        title: What was trained on what, the caption's beginning.
    """
    methods = dict.fromkeys(row["method"] for row in rows)
    columns = sorted({_column(row) for row in rows})
    of = {(row["method"], _column(row)): row for row in rows}
    lines = [["method"], *([method] for method in methods)]
    for column in columns:
        is_share, value = column
        share = "all" if value == EVERYTHING else f"{value:g}"
        lines[0].append(share if is_share else f"{value} per class")
        found = [of.get((method, column)) for method in methods]
        means = [row["mean"] for row in found if row is not None and row["mean"] is not None]
        best = max(means) if len(means) > 1 else None  # alone, nothing is best
        for line, row in zip(lines[1:], found, strict=True):
            line.append(_entry(row, best))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    header, *table = [f"| {' | '.join(line)} |" for line in aligned]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([_caption(rows, title), "", header, rule, *table, ""])


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


def _caption(rows: Sequence[Row], title: str = "") -> str:
    """The line above the table: what the numbers are, over how many seeds, and with which spread."""
    seeds = max((row["of_seeds"] for row in rows), default=0)
    spread = "one seed" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds"
    shots = any(row["shots"] is not None for row in rows)
    columns = "examples kept of each class" if shots else "share of the examples kept"
    marks = ["bold: the best mean of a column"]
    cells = len({row["method"] for row in rows}) * len({_column(row) for row in rows})
    if cells > sum(row["mean"] is not None for row in rows):
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

    In the csv file, accuracies are in [0, 1], and unknown values are empty.

    Args:
        stem: Folder and name; the folder is made.
        rows: Of :func:`summarize`.
        records: The cells that they summarize.
        settings: What all cells share; the caption has ``model`` and ``dataset``.

    Returns:
        The three paths.

    Raises:
        FileError: A file cannot be written.
    """
    stem = Path(stem)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(Row.__annotations__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    title = f"{settings['model']} on {settings['dataset']}"
    contents = {"settings": dict(settings), "rows": list(rows), "cells": [dict(record) for record in records]}
    return [
        write_text(stem.with_name(f"{stem.name}.csv"), text.getvalue()),
        write_json(stem.with_name(f"{stem.name}.json"), contents),
        write_text(stem.with_name(f"{stem.name}.md"), markdown(rows, title)),
    ]
