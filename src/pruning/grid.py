"""A grid of pruning runs: methods x shares x seeds, shared by any number of processes."""

import logging
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from src.artifacts import claim, claimed, comparison_stem, differences, read_json, save_figure
from src.coresets import find_method
from src.coresets.comparison import markdown, summarise, write_table
from src.coresets.plots import accuracy_figure
from src.errors import FileError, TrainingError, UserError
from src.pruning.choice import Choice
from src.pruning.pretraining import Busy
from src.pruning.run import PrunedRun
from src.session import Session

log = logging.getLogger(__name__)

PAUSE = 5.0  # seconds before looking again for something that no other process works on
REFERENCE = "random"  # at share 1 it is training on everything


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
        self._runs: dict[Cell, PrunedRun] = {}
        self._announced: set[Cell] = set()
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

    def run_of(self, cell: Cell) -> PrunedRun:
        """The run of a cell."""
        if cell not in self._runs:
            session = self.session.variant(
                coreset_func=cell.func,
                coreset_fraction=cell.fraction,
                shots=cell.shots if self.args.shots else None,
                shots_up_to=cell.shots if self.args.shots_up_to else None,
                seed=cell.seed,
            )
            self._runs[cell] = PrunedRun(session, Choice.of(session))
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
                run.refuse_other_settings()
        if not self.args.overwrite:
            self._refuse_other_table()

    def _refuse_other_table(self) -> None:
        """Stop where another table would be lost: one of other settings, or with cells that this grid lacks."""
        path = self._stem.with_name(f"{self._stem.name}.json")
        if not path.exists():
            return
        content = read_json(path)
        advice = "give this one another --name, or --overwrite to replace it"
        if not isinstance(content, dict) or not isinstance(content.get("settings", {}), dict):
            raise FileError(f"{path}: is not a table of this script; {advice}")
        if found := differences(content.get("settings", {}), self.settings(), ignore=self._unread()):
            raise FileError(f"{path}: is a table of other settings: {', '.join(found)}; {advice}")
        own = {(cell.func, cell.fraction, cell.shots, cell.seed) for cell in self.cells}
        try:
            other = {(c["method"], c["share"], c["shots"], c["seed"]) for c in content.get("cells", ())} - own
        except (TypeError, KeyError) as error:
            raise FileError(f"{path}: is damaged, its cells cannot be read; {advice}") from error
        if other:
            cell = Cell(*min(other, key=str))
            raise FileError(f"{path}: has {len(other)} cells that this grid lacks, such as {cell}; {advice}")

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
            while pending:
                left = []
                for cell in pending:
                    ended = self._attempt(cell, failures)
                    bar.update(ended is not None)
                    if ended is None:
                        left.append(cell)
                    elif ended:
                        after_cell()
                if len(left) == len(pending):  # other processes work on all that is left
                    time.sleep(PAUSE)
                pending = left
        return failures

    def _attempt(self, cell: Cell, failures: dict[Cell, str]) -> bool | None:
        """Train a cell; True if it was trained here, False if it is done or failed, None if it must be seen again."""
        run = self.run_of(cell)
        if run.is_done():
            run.session.files(run.experiment).remove_states()
            return False
        with claim(run.claim) as mine:
            if not mine:
                return None
            if run.is_done():  # by another process, since the look above
                return False
            if cell not in self._announced:  # it may have to wait for another process's pre-training, and come again
                log.info("cell %d of %d: %s", self.cells.index(cell) + 1, len(self.cells), cell)
                self._announced.add(cell)
            try:
                run.train(wait=False)
            except Busy:
                return None
            except UserError as error:
                log.error("%s: %s", cell, error.line)
                failures[cell] = error.line
                return False
            run.session.files(run.experiment).remove_states()
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
        read = {option for func in args.funcs for option in find_method(func).options}
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
        with claimed(self._stem.with_name(f"{self._stem.name}.lock"), waiting="another process is writing the table"):
            if not self.args.overwrite:
                self._refuse_other_table()
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
