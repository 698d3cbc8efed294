"""Stored spectra and kernel velocities: reading them, checking that they belong together, and making tables.

A spectrum is a pickle in the format of the papers' plotting code, with a json record next to it. Velocities are a
dict from the rank of a group's first example to its velocity, also with a json record. This module does not import
torch.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.artifacts.io import read_pickle
from src.artifacts.paths import eigen_name, hessian_path, standard_experiment, velocity_path
from src.artifacts.store import REMAKE_OVER, check_consistent, check_identity, checked_array, read_record, record_path
from src.curvature.config import EIGEN_SPLITS, OPERATOR_NAMES, SpectrumQuery
from src.errors import ArgumentError, FileError

log = logging.getLogger(__name__)

NEAR_ZERO = 0.01
"""Directions whose absolute eigenvalue is below this fraction of the largest count as flat."""

MEASURES = {
    "largest": "largest eigenvalue",
    "last": "last of the top eigenvalues",
    "trace": "trace",
    "effective": "trace / largest",
    "flat": "fraction of flat directions",
    "negative": "fraction of negative directions",
    "loss": "loss",
}
"""The columns of the table."""

_MEASURED = ("dataset", "labels", "model", "experiment", "epoch", "eigen_split", "high_low_spec", "operator",
             "subset", "examples", "images", "decoding", "training")  # fmt: skip
"""The settings that identify what was measured; averages over seeds require them to be equal."""
_OF_A_RUN = {"experiment", "seed", "checkpoint", "high_low_spec", "training"}
_OF_EXAMPLES = {"examples", "example_hash"}


# -------------------------------------------------------------------------------------------------------- spectra


@dataclass(frozen=True)
class StoredSpectrum:
    """One model's stored spectrum.

    Attributes:
        path: Its pickle.
        eigenvalues: Top eigenvalues.
        nodes: Nodes of the density, one list per probe.
        weights: Their weights.
        traces: ``v^T H v`` for each probe of the trace.
        record: The json record next to the pickle; empty if there is none.
    """

    path: Path
    eigenvalues: list[float]
    nodes: list[list[float]]
    weights: list[list[float]]
    traces: list[float]
    record: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> StoredSpectrum:
        """Read a spectrum, and its record if it has one.

        Raises:
            FileError: It is missing or damaged.
        """
        found, path = read_pickle(path), Path(path)
        try:
            values, traces = _finite_numbers(found["eigenvals"]), _finite_numbers(found["trace"])
            nodes, weights = (
                [_finite_numbers(run) for run in found[f"density_{key}"]] for key in ("eigen", "weight")
            )
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise FileError(f"{path}: is not a spectrum (a list is missing or invalid); measure it again") from error
        if not values or not nodes or not all(nodes) or list(map(len, nodes)) != list(map(len, weights)):
            raise FileError(f"{path}: is not a spectrum (lists are empty or uneven); measure it again")
        return cls(path, values, nodes, weights, traces, _read_spectrum_record(path))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in its record; empty if there is none."""
        return self.record.get("settings", {})

    @property
    def trace(self) -> float:
        """The best available estimate: from the record, else the probes' mean, else the quadrature, else NaN."""
        stored = self.record.get("trace")
        if stored is None:
            stored = np.mean(self.traces) if self.traces else self.record.get("trace_quadrature")
        return float("nan" if stored is None else stored)

    @property
    def trace_error(self) -> float:
        """Standard error of ``trace`` over the probes; NaN if it is unknown."""
        if "trace" in self.record:
            error = self.record.get("trace_standard_error")
        else:
            error = np.std(self.traces, ddof=1) / math.sqrt(len(self.traces)) if len(self.traces) > 1 else None
        return float("nan" if error is None else error)

    def share(self, low: float, high: float) -> float:
        """Fraction of the eigenvalues in ``[low, high)``, from the quadratures."""
        runs = zip(self.nodes, self.weights, strict=True)
        return float(np.mean([sum(w for n, w in zip(*run, strict=True) if low <= n < high) for run in runs]))

    def measures(self) -> dict[str, float]:
        """A value for each of ``MEASURES``; NaN if unknown."""
        largest = self.eigenvalues[0]
        near = NEAR_ZERO * abs(largest)
        return {
            "largest": largest,
            "last": self.eigenvalues[-1],
            "trace": self.trace,
            "effective": self.trace / largest if largest else np.nan,
            "flat": self.share(-near, near),
            "negative": self.share(-np.inf, -near),
            "loss": float(self.record.get("loss", np.nan)),
        }


def _finite_numbers(values: Any) -> list[float]:
    """Convert a list that may have complex numbers (from the papers' code) to finite real numbers."""
    numbers = [float(value.real) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("not finite")
    return numbers


def _read_spectrum_record(path: Path) -> dict[str, Any]:
    record = read_record(path)
    settings = record.get("settings", {})
    known = {"operator": OPERATOR_NAMES, "eigen_split": EIGEN_SPLITS}
    right = all(settings.get(name, words[0]) in words for name, words in known.items())
    if not right or not isinstance(settings.get("examples", 0), int):
        raise FileError(f"{record_path(path)}: its settings are not a spectrum's; measure it again")
    optional = int | float | None
    for name, kinds in (
        ("loss", int | float),
        ("trace", optional),
        ("trace_standard_error", optional),
        ("trace_quadrature", int | float),
    ):
        if name in record and not isinstance(record[name], kinds):
            raise FileError(f"{record_path(path)}: its {name} is not a number; measure it again")
    return record


@dataclass(frozen=True)
class SpectrumGroup:
    """Spectra drawn together: the seeds of one kind of run."""

    label: str
    spectra: list[StoredSpectrum]

    def summary(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of each measure over the seeds; the deviation for one seed is NaN."""
        rows = [spectrum.measures() for spectrum in self.spectra]
        found = {}
        for name in MEASURES:
            values = np.array([row[name] for row in rows])
            found[name] = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else np.nan
        return found


def find_spectra(query: SpectrumQuery) -> tuple[list[SpectrumGroup], str]:
    """Return the groups of a query and their common epoch.

    Raises:
        ArgumentError: Several epochs or schedules match.
        FileError: A spectrum is missing (the message has the command that makes it), does not match its path, or
            does not belong with the others.
    """
    specs = list(dict.fromkeys(query.high_low_specs))
    groups = []
    for optimizer in dict.fromkeys(query.optimizers):
        for spec in specs:
            label = optimizer.upper() if specs == ["all"] else f"{optimizer.upper()}, {spec}"
            groups.append(SpectrumGroup(label, _find_seeds(query, optimizer, spec)))
    epochs = {group.label: _epoch(group.spectra[0].path) for group in groups}
    if len(set(epochs.values())) > 1:
        found = ", ".join(f"{epoch} ({label})" for label, epoch in epochs.items())
        raise ArgumentError("epochs", f": the spectra are from different epochs: {found}; choose one")
    recorded = [spectrum for group in groups for spectrum in group.spectra if spectrum.settings]
    for spec in specs:
        alike = [one for one in recorded if (one.settings.get("high_low_spec") or "all") == spec]
        check_consistent(
            ((one.path, {"examples": one.settings.get("examples")}) for one in alike),
            what="was measured on a different number of examples than",
            remedy="measure both with the same --subset and --exclude, or list them with --files",
        )
    return groups, next(iter(epochs.values()))


def _find_seeds(query: SpectrumQuery, optimizer: str, spec: str) -> list[StoredSpectrum]:
    """The spectra of one optimizer and one subset of the examples."""
    experiment = standard_experiment(query.model, query.dataset_name, optimizer, query.lr_sched or "*")
    mode = eigen_name(query.eigen_mode, query.operator)
    which = f"epoch_{query.epochs or '*'}"
    pattern = hessian_path("", query.eigen_split, spec, experiment, "*bn", "*", which, mode)
    by_seed = [(path.parents[1].name, path) for path in sorted(query.folder.glob(str(pattern)))]
    found = [(int(seed), path) for seed, path in by_seed if seed.isdigit()]
    seeds = query.seeds if query.seeds is not None else sorted({seed for seed, _ in found})
    paths = [path for seed, path in found if seed in seeds]
    schedules = {path.parents[2].name.rsplit("_sched_", 1)[1].rsplit("_", 1)[0] for path in paths}
    for name, values in (("lr_sched", schedules), ("epochs", set(map(_epoch, paths)))):
        if len(values) > 1:
            raise ArgumentError(
                name, f": found spectra for {len(values)} values; choose one of {', '.join(sorted(values))}"
            )
    missing = sorted(set(seeds) - {seed for seed, _ in found})
    if missing or not paths:
        seed = missing[0] if missing else 1
        epoch = "" if query.epochs is None else f"epoch {query.epochs}, "
        raise FileError(
            f"{query.folder}: no spectrum of {query.model} over {query.dataset_name} with {optimizer} "
            f"({query.eigen_split}, {spec}), {epoch}seed {seed}; create it with: "
            + _command(query, optimizer, spec, seed)
        )
    spectra = [StoredSpectrum.read(path) for path in paths]
    for spectrum in spectra:
        path, settings = spectrum.path, spectrum.settings
        expected = {"seed": int(path.parents[1].name), "epoch": int(_epoch(path))}
        run = str(settings.get("experiment", ""))
        if run.removeprefix("standard_") not in path.parents[2].name:
            expected["experiment"] = path.parents[2].name
        check_identity(path, settings, "measure it again", **expected)
    recorded = [one for one in spectra if one.settings]
    names = (*_MEASURED, "example_hash") if spec == "all" else _MEASURED
    check_consistent(
        ((one.path, {name: one.settings.get(name) for name in names}) for one in recorded),
        what="measures something different from",
        remedy=f"{REMAKE_OVER}, or choose --seeds",
    )
    return spectra


def _epoch(path: Path) -> str:
    return path.parent.name.removeprefix("epoch_")


def _command(query: SpectrumQuery, optimizer: str, spec: str, seed: int) -> str:
    """The command that measures a missing spectrum."""
    flags = {
        **query.data,
        "model": query.model,
        "optimizer": optimizer,
        "lr_sched": query.lr_sched,
        "seed": seed,
        "epochs": query.epochs or "E",
        "eigen_split": query.eigen_split,
        "high_low_spec": None if spec == "all" else spec,
        "operator": query.operator,
        "eigen_mode": query.eigen_mode,
    }
    words = (f"--{name}={value}" for name, value in flags.items() if value is not None)
    return shlex.join(["python", "compute_hessian_eigen.py", *words])


def warn_of_differences(groups: Sequence[SpectrumGroup]) -> None:
    """Log which training or measurement settings differ between the spectra."""
    every = [spectrum.settings for group in groups for spectrum in group.spectra if spectrum.settings]
    every = [{**one, "lr_sched": str(one.get("experiment")).partition("_sched_")[2]} for one in every]
    specs = sorted({str(one.get("high_low_spec")) for one in every})
    for name in sorted(set().union(*every) - _OF_A_RUN):
        for spec in specs if name in _OF_EXAMPLES else [None]:  # specs use different examples by design
            alike = [one for one in every if spec in (None, str(one.get("high_low_spec")))]
            values = {str(one.get(name)) for one in alike}
            if len(values) > 1:
                log.warning("the spectra differ in %s: %s", name, ", ".join(sorted(values)))


def markdown_table(groups: Sequence[SpectrumGroup]) -> str:
    """Format means and standard deviations over seeds as Markdown, one line per group."""
    lines = [["run", "seeds", *MEASURES.values()]]
    for group in groups:
        cells = [
            "-" if np.isnan(mean) else f"{mean:.4g}" + ("" if np.isnan(deviation) else f" ± {deviation:.2g}")
            for mean, deviation in group.summary().values()
        ]
        lines.append([group.label, str(len(group.spectra)), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]]) + "\n"


def csv_table(groups: Sequence[SpectrumGroup]) -> str:
    """The same as csv, with mean and deviation in separate columns; unknown values are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "seeds", *(f"{name}{end}" for name in MEASURES for end in ("", "_sd"))])
    for group in groups:
        values = [value for pair in group.summary().values() for value in pair]
        cells = ["" if np.isnan(value) else repr(value) for value in values]
        writer.writerow([group.label, len(group.spectra), *cells])
    return text.getvalue()


# ------------------------------------------------------------------------------------------------------ velocities


@dataclass(frozen=True)
class Velocities:
    """The velocities of one epoch, over seeds.

    Attributes:
        epoch: t.
        seeds: The seeds.
        lowers: Ranks of the groups' first examples, (g,).
        positions: Positions of the groups in score order, in percent, (g,); or their ranks.
        values: (seeds, g).
        in_percent: Whether ``positions`` are percentiles.
    """

    epoch: int
    seeds: tuple[int, ...]
    lowers: np.ndarray
    positions: np.ndarray
    values: np.ndarray
    in_percent: bool


def read_velocities(
    folder: Path, epochs: Sequence[int] | None = None, seeds: Sequence[int] | None = None
) -> list[Velocities]:
    """Read the stored velocities of one run and score.

    Args:
        folder: ``{ntk_folder}/{dataset}/{run}/{metric}``.
        epochs: The epochs to read; None for all epochs found.
        seeds: The seeds to read; None for all seeds of an epoch.

    Raises:
        FileError: There are none, one is missing, or their settings or groups differ.
    """
    stored: dict[int, dict[int, Path]] = {}
    for path in folder.glob("epoch_*/seed_*/vs.pkl"):
        epoch, seed = path.parts[-3].removeprefix("epoch_"), path.parts[-2].removeprefix("seed_")
        if epoch.isdigit() and seed.isdigit():
            stored.setdefault(int(epoch), {})[int(seed)] = path
    if not stored and epochs is None:
        raise FileError(f"{folder}: has no velocities; compute them with compute_ntk.py")
    found, records = [], []
    sources: dict[str, Path] = {}
    for epoch in sorted(stored) if epochs is None else dict.fromkeys(epochs):
        of_epoch = folder / f"epoch_{epoch}"
        paths = {seed: velocity_path(of_epoch / f"seed_{seed}") for seed in seeds or sorted(stored.get(epoch, ()))}
        if not paths:
            raise FileError(
                f"{of_epoch}: has no velocities; compute them with compute_ntk.py --ntk_velocity_epoch {epoch}"
            )
        for path in paths.values():
            settings = dict(read_record(path).get("settings", {}))
            checkpoints = json.dumps(settings.pop("checkpoints", str(path)))
            if (source := sources.setdefault(checkpoints, path)) != path:
                raise FileError(
                    f"{path}: was computed from the same checkpoints as {source}; one is a copy; remove it"
                )
            records.append((path, settings))
        found.append(_read_epoch(epoch, paths))
    check_consistent(records, what="was computed with different settings than")
    return found


def _read_epoch(epoch: int, paths: dict[int, Path]) -> Velocities:
    """Read the velocities of several seeds, which must have the same groups."""
    rows, first = [], next(iter(paths.values()))
    lowers: list[int] = []
    for path in paths.values():
        content = read_pickle(path)
        if not isinstance(content, dict) or not all(isinstance(lower, int | np.integer) for lower in content):
            raise FileError(f"{path}: is not a dict rank -> velocity; {REMAKE_OVER}")
        own = sorted(content)
        ordered = {"velocities": [content[lower] for lower in own]}
        rows.append(checked_array(path, ordered, "velocities", kinds="iuf", remedy=REMAKE_OVER))
        lowers = lowers or own
        if own != lowers:
            raise FileError(f"{path}: has different groups than {first}; compute both with the same --lower_index")
    groups = read_record(first).get("groups", {})
    try:
        percentiles = _finite_numbers([groups[str(lower)]["percentile"] for lower in lowers])
        positions, in_percent = np.array(percentiles), True
    except (LookupError, TypeError, ValueError, AttributeError):  # written by other programs
        positions, in_percent = np.array(lowers, dtype=np.float64), False
    return Velocities(epoch, tuple(paths), np.array(lowers), positions, np.array(rows, dtype=np.float64), in_percent)
