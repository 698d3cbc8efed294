"""A grid of pruning runs: methods x shares x seeds, shared by any number of processes."""

import csv
import io
import logging
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from tqdm import tqdm

from src.artifacts.io import read_json, save_figure, write_json, write_text
from src.artifacts.locks import lock, try_lock
from src.artifacts.paths import comparison_stem
from src.artifacts.store import ELSEWHERE, REPLACE, load_result
from src.coresets.plots import accuracy_figure
from src.coresets.registry import METHODS, REFERENCE, find_method
from src.coresets.runner import CoresetRun, SelectionJob
from src.errors import FileError, TrainingError, UserError
from src.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """One run of the grid; ``shots`` are those of ``--shots`` or ``--shots_up_to``."""

    func: str
    fraction: float | None
    shots: int | None
    seed: int

    def __str__(self) -> str:
        share = f"{self.fraction:g}" if self.shots is None else f"{self.shots} shots"
        return f"{self.func} {share} seed {self.seed}"


class Grid:
    """All cells, the runs that fill them, and the files that compare them.

    Args:
        session: The session of the first seed.
        args: The flags of ``compare_pruning.py``.
    """

    def __init__(self, session: Session, args: Namespace) -> None:
        self.session, self.args = session, args
        self.cells = list(self._cells())
        self._runs: dict[Cell, CoresetRun] = {}
        self._finished: dict[Cell, dict[str, Any]] = {}

    def _cells(self) -> Iterator[Cell]:
        """Seed by seed, so that an unfinished grid compares all methods on the seeds that it has."""
        args = self.args
        for seed in args.seeds:
            if args.full and not (REFERENCE in args.funcs and 1.0 in args.fractions):
                yield Cell(REFERENCE, 1.0, None, seed)
            for func in args.funcs:
                yield from (Cell(func, share, None, seed) for share in args.fractions)
                yield from (Cell(func, None, shots, seed) for shots in args.shots or args.shots_up_to)

    def run_of(self, cell: Cell) -> CoresetRun:
        """The run of a cell."""
        if cell not in self._runs:
            session = self.session.variant(
                coreset_func=cell.func,
                coreset_fraction=cell.fraction,
                shots=cell.shots if self.args.shots else None,
                shots_up_to=cell.shots if self.args.shots_up_to else None,
                seed=cell.seed,
            )
            self._runs[cell] = CoresetRun(session, SelectionJob.of(session))
        return self._runs[cell]

    def check(self) -> None:
        """Find before the first run what would stop a later one.

        Raises:
            FlagError: A share does not fit the data, or a method.
            FileError: A stored score is missing, or runs or a table of other settings stand where this grid's belong.
        """
        for cell in self.cells:
            run = self.run_of(cell)
            if cell.seed == self.args.seeds[0]:
                run.check()
            if not self.args.overwrite:
                run.check_stored()
        if not self.args.overwrite:
            self._check_table()

    def _check_table(self) -> None:
        """Refuse to replace another table: one of different settings, or with cells that this grid lacks."""

        def read(path: Path) -> tuple[set[tuple[Any, ...]], dict[str, Any]]:
            content = read_json(path)
            try:
                cells = {(c["method"], c["share"], c["shots"], c["seed"]) for c in content.get("cells", ())}
                return cells, dict(content.get("settings", {}))
            except (TypeError, KeyError, ValueError, AttributeError) as error:
                raise FileError(f"{path}: is damaged, or not a table of this script") from error

        path, elsewhere = self._stem.with_name(f"{self._stem.name}.json"), "choose another --name"
        cells = load_result(path, self.settings(), read, ignore=self._unread(), elsewhere=elsewhere)
        if other := (cells or set()) - {(cell.func, cell.fraction, cell.shots, cell.seed) for cell in self.cells}:
            cell, remedy = Cell(*min(other, key=str)), REPLACE.replace(ELSEWHERE, elsewhere)
            raise FileError(f"{path}: has {len(other)} cells that this grid lacks, such as {cell}; {remedy}")

    def _unread(self) -> list[str]:
        """Settings of pre-training, where no method of the grid pre-trains."""
        needs = [find_method(func).needs for func in self.args.funcs]
        names = [] if any(need.pretraining for need in needs) else ["epochs", "lr", "lr_sched", "batch_size"]
        return [*(f"coreset_pretrain_{name}" for name in names), *(["coreset_networks"] if names else [])]

    # ------------------------------------------------------------------------------------------------- running

    def run(self, after_cell: Callable[[], Any]) -> dict[Cell, str]:
        """Train what is not done; returns the cells that failed, with the reason.

        Args:
            after_cell: Called when a cell is finished.
        """
        failures: dict[Cell, str] = {}
        pending = list(self.cells)
        with tqdm(total=len(pending), unit="cell", disable=None, dynamic_ncols=True, desc="grid") as bar:
            for wait in (False, True):  # first what no other process works on, then the rest
                pending = [cell for cell in pending if not self._attempt(cell, failures, bar, after_cell, wait)]
        return failures

    def _attempt(
        self, cell: Cell, failures: dict[Cell, str], bar: tqdm, after_cell: Callable[[], Any], wait: bool
    ) -> bool:
        """Train a cell unless it is done; False if another process works on it, and ``wait`` is off."""
        run = self.run_of(cell)
        trained = False
        with try_lock(run.lock, wait=wait) as mine:
            if not mine:
                return False
            if not run.is_done():
                log.info("cell %d of %d: %s", self.cells.index(cell) + 1, len(self.cells), cell)
                try:
                    run.train()
                    trained = True
                except UserError as error:
                    log.error("%s: %s", cell, error.line)
                    failures[cell] = error.line
            if cell not in failures:
                run.session.files(run.experiment).remove_states()
        bar.update()
        if trained:
            after_cell()
        return True

    # ------------------------------------------------------------------------------------------------- comparing

    @property
    def _stem(self) -> Path:
        args = self.args
        return comparison_stem(args.plots_folder, self.session.entry.name, args.model, args.name)

    def settings(self) -> dict[str, Any]:
        """What all cells share."""
        args, session = self.args, self.session
        facts = session.settings(session.train)
        read = {option for func in args.funcs for option in find_method(func).option_names}
        facts.update({key: value for key, value in vars(args).items() if key.startswith("coreset_") or key in read})
        facts.update(per_class=args.per_class, shots_up_to=bool(args.shots_up_to) or None)
        for key in ("seed", "coreset_func", "coreset_fraction"):
            facts.pop(key, None)
        return facts

    def records(self) -> list[dict[str, Any]]:
        """One record per cell, of what its files say; those of finished cells are read once."""
        records = {cell: self._finished.get(cell) or self._record(cell) for cell in self.cells}
        self._finished.update((cell, record) for cell, record in records.items() if record["finished"])
        return list(records.values())

    def _record(self, cell: Cell) -> dict[str, Any]:
        run = self.run_of(cell)
        record: dict[str, Any] = {
            "method": cell.func, "share": cell.fraction, "shots": cell.shots, "seed": cell.seed, "finished": False,
            "accuracy": None, "best": None, "epoch": 0, "examples": None, "selection_seconds": None,
            "training_seconds": None,
        }  # fmt: skip
        try:
            if not run.is_done():
                return record
            results = run.session.files(run.experiment).read_results()
            history = results["history"]
            seconds = run.selection_seconds()
        except FileError as error:
            log.warning("%s", error)
            return record
        record.update(
            finished=True,
            accuracy=history[-1]["test_accuracy"],
            best=results["best_test_accuracy"],
            epoch=len(history),
            examples=sum(r.get("examples", results["settings"]["examples"]) for r in history) / len(history),
            selection_seconds=None if math.isnan(seconds) else seconds,
            training_seconds=results["seconds"],
        )
        return record

    def write(self) -> list[Path]:
        """Write table and figure of what is done; nothing while nothing is.

        Raises:
            FileError: Another grid has written its table there since this one began.
        """
        with lock(self._stem.with_name(f"{self._stem.name}.lock"), "writing the table", wait=True):
            if not self.args.overwrite:
                self._check_table()
            return self._write()

    def _write(self) -> list[Path]:
        records = self.records()
        if not any(record["finished"] for record in records):
            return []
        rows = summarise(records)
        paths = write_table(self._stem, rows, records, self.settings())
        drawn = [row for row in rows if not (row["share"] == 1.0 and row["method"] == REFERENCE and self.args.full)]
        full = next((row for row in rows if row["share"] == 1.0 and row["method"] == REFERENCE), None)
        title = f"{self.args.model} on {self.session.entry.name}"
        figure = accuracy_figure(
            drawn or rows, title=title, full=full and full["mean"], full_std=full and full["std"]
        )
        return [*paths, *save_figure(figure, self._stem)]

    def table(self) -> str:
        """The table as Markdown."""
        return markdown(summarise(self.records()))

    def report(self, failures: dict[Cell, str]) -> None:
        """Stop with one line if cells failed.

        Raises:
            TrainingError: Some did.
        """
        if failures:
            cell, reason = next(iter(failures.items()))
            raise TrainingError(f"{len(failures)} of {len(self.cells)} cells failed; the first is {cell}: {reason}")


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
