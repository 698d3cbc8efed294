"""A grid of pruning runs (methods x fractions x seeds) and the table that compares them: csv, json and Markdown."""

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
from src.artifacts.locks import lock
from src.artifacts.paths import Folders, comparison_stem
from src.artifacts.store import ELSEWHERE, REPLACE, load_result
from src.context import RunContext, TrainingRun
from src.coresets.config import GridConfig, PretrainConfig, SelectionConfig
from src.coresets.registry import METHODS, REFERENCE
from src.coresets.runner import CoresetRun
from src.errors import FileError, UserError
from src.training import RunConfig

log = logging.getLogger(__name__)

EVERYTHING = 1.0  # the fraction that keeps all examples
_DRAW_EVERY = 60.0  # seconds between updates of the figure while the grid runs

Column = tuple[bool, float]  # whether it is a fraction, and the fraction or the examples per class
Cell = tuple[str, float | None, int | None, int]  # method, fraction or None, examples per class or None, seed


def _describe(method: str, share: float | None, shots: int | None, seed: int) -> str:
    return f"{method} {f'{share:g}' if shots is None else f'{shots} shots'} seed {seed}"


class Grid:
    """All cells of the grid, the runs that fill them, and the files that compare them.

    Args:
        context: Device and data.
        config: Methods, fractions and seeds.
        selections: The selection config of each method, at any fraction.
        pretrain: Pre-training settings.
        run: The downstream run, with any seed.
        folders: Output folders.
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
        """Yield cells seed by seed, so that an unfinished grid compares all methods on the same seeds."""
        config = self.config
        shares: list[dict[str, Any]] = [
            *({"coreset_fraction": share} for share in config.fractions),
            *({"coreset_fraction": None, "shots": shots} for shots in config.shots),
            *({"coreset_fraction": None, "shots_up_to": shots} for shots in config.shots_up_to),
        ]
        chosen = [replace(self.selections[func], **share) for func in config.funcs for share in shares]
        if config.full and not (REFERENCE in config.funcs and EVERYTHING in config.fractions):
            everything: dict[str, Any] = {"coreset_fraction": EVERYTHING, "shots": None, "shots_up_to": None}
            chosen.insert(0, replace(self.selections[REFERENCE], **everything))
        for seed in config.seeds:
            run = replace(self.run_config, training=replace(self.run_config.training, seed=seed))
            for selection in chosen:
                shots = selection.shots or selection.shots_up_to
                cell = (selection.coreset_func, selection.coreset_fraction, shots, seed)
                yield cell, CoresetRun(self.context, selection, self.pretrain, run, self.folders)

    def check(self) -> None:
        """Check for errors that would stop a later run, before starting the first one.

        Raises:
            ArgumentError: A fraction does not fit the data or the method.
            FileError: A stored score is missing, or a run or table with different settings already exists.
        """
        for cell, run in self.runs.items():
            if cell[-1] == self.config.seeds[0]:
                run.check()
            if not self.run_config.overwrite:
                run.check_stored()
        if not self.run_config.overwrite:
            self._check_table()

    def _check_table(self) -> None:
        """Refuse to replace a different table: one with other settings, or with cells that this grid lacks."""

        def read(path: Path) -> tuple[set[Cell], dict[str, Any]]:
            content = read_json(path)
            try:
                cells = {(c["method"], c["share"], c["shots"], c["seed"]) for c in content.get("cells", ())}
                return cells, dict(content.get("settings", {}))
            except (TypeError, KeyError, ValueError, AttributeError) as error:
                raise FileError(f"{path}: is damaged or was not written by this script") from error

        path, elsewhere = self.stem.with_name(f"{self.stem.name}.json"), "choose another --name"
        pretrains = any(self.selections[func].method.needs.pretraining for func in self.config.funcs)
        ignore = () if pretrains else asdict(self.pretrain)
        ignore = ("selection_subsample", *ignore)  # in older tables; see settings()
        cells = load_result(path, self.settings(), read, ignore=ignore, elsewhere=elsewhere)
        if other := (cells or set()) - set(self.runs):
            cell, remedy = _describe(*min(other, key=str)), REPLACE.replace(ELSEWHERE, elsewhere)
            raise FileError(f"{path}: has {len(other)} cells that this grid lacks, such as {cell}; {remedy}")

    # ------------------------------------------------------------------------------------------------- running

    def run(self) -> dict[str, str]:
        """Train the unfinished cells; update the table after each one and the figure once a minute.

        Finished cells are not locked, because they may be in a read-only folder. If another process is training a
        cell, this one waits for it.

        Returns:
            The failed cells, with the reason for each.
        """
        failures: dict[str, str] = {}
        # never leave the new table next to the figure of the table it replaced
        drawn = -math.inf if self.run_config.overwrite else time.monotonic()
        for number, (cell, run) in enumerate(
            tqdm(self.runs.items(), unit="cell", disable=None, dynamic_ncols=True, desc="grid"), 1
        ):
            name = _describe(*cell)
            if run.is_done():
                run.files.remove_states()
                continue
            with lock(run.lock, f"training {name}", wait=True):
                if run.is_done():  # another process has finished it
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
        """The settings that all cells share."""
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
        facts.pop("selection_subsample", None)  # each cell compares what "auto" resolves to
        return facts

    def records(self) -> list[dict[str, Any]]:
        """Read one record per cell from its files; files of finished cells are read once.

        A record has ``method``, ``share`` or else ``shots``, ``seed`` and ``finished``. If finished, it also has:
        ``accuracy`` after the last epoch and the ``best`` accuracy, in [0, 1], ``epoch`` (number of epochs),
        ``examples`` (average per epoch), ``selection_seconds`` (None if unknown) and ``training_seconds``.
        """
        for cell, run in self.runs.items():
            if cell not in self._finished and (record := self._read(run)) is not None:
                self._finished[cell] = record
        nothing = {"finished": False, "accuracy": None, "best": None, "epoch": 0, "examples": None,
                   "selection_seconds": None, "training_seconds": None}  # fmt: skip
        names = ("method", "share", "shots", "seed")
        return [{**dict(zip(names, cell, strict=True)), **self._finished.get(cell, nothing)} for cell in self.runs]

    def _read(self, run: CoresetRun) -> dict[str, Any] | None:
        """Read the record of a finished run; None if it is unfinished or its files cannot be read."""
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
        """Write the table of all finished cells, from any process, and the figure; nothing if no cell is finished.

        Args:
            draw: Whether to draw the figure, which takes many times as long as the table.

        Raises:
            FileError: Another grid has written its table there since this one started.
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
            from src.coresets.plots import accuracy_figure  # imports matplotlib

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
    """One method at one fraction, summarized over the seeds whose cells are finished.

    Attributes:
        method: Value of ``--coreset_func``.
        share: As in the records.
        shots: As in the records.
        mean: Mean of the last test accuracies, in [0, 1]; None without a finished cell.
        std: Their standard deviation over seeds (n - 1 in the denominator); None for fewer than two.
        seeds: Number of finished cells.
        of_seeds: Number of seeds in the grid.
        best: Mean of the best test accuracies.
        over_random_points: Mean minus that of ``random`` at the same fraction, in percentage points; None if either
            is missing.
        examples: Mean number of training examples.
        selection_seconds: Mean selection time, where known.
        training_seconds: Mean training time.
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
    """Compute the mean and standard deviation over seeds for each method and fraction.

    Args:
        records: One per cell; see :meth:`Grid.records`. Unfinished cells are left out of all means.

    Returns:
        One row per method and fraction that has a cell. Methods are in order of first appearance; examples per class
        come before fractions, each ascending.
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
    """The mean of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _column(row: Mapping[str, Any]) -> Column:
    """The column of a row or record. Examples per class sort first, which puts the full training set last."""
    return (True, row["share"]) if row["shots"] is None else (False, row["shots"])


def markdown(rows: Sequence[Row], title: str = "") -> str:
    """Format the table as Markdown: methods by fractions, accuracies in percent, each column's best mean in bold.

    Args:
        rows: Rows from :func:`summarize`.
        title: Model and data set, for the start of the caption.
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
        best = max(means) if len(means) > 1 else None  # a single entry is not marked as best
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
    """The caption above the table: what the numbers are, the number of seeds, and the spread."""
    seeds = max((row["of_seeds"] for row in rows), default=0)
    spread = "one seed" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds"
    shots = any(row["shots"] is not None for row in rows)
    columns = "examples kept per class" if shots else "fraction of examples kept"
    marks = ["bold: best mean in the column"]
    cells = len({row["method"] for row in rows}) * len({_column(row) for row in rows})
    if cells > sum(row["mean"] is not None for row in rows):
        marks.append("-: no finished run")
    marks += [
        f"{name} trains on that fraction of each epoch's low-loss examples and on all others"
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
        stem: Folder and file name without a suffix; the folder is created.
        rows: Rows from :func:`summarize`.
        records: The cells that they summarize.
        settings: The settings that all cells share; the caption uses ``model`` and ``dataset``.

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
