"""Stored spectra: the pickle of the papers' plotting code with the record beside it, and groups of them for figures.

A density is the sum of narrow Gaussians at the nodes of Gauss quadrature, with its weights (Ghorbani et al. 2019).
"""

from __future__ import annotations

import csv
import io
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.artifacts import (
    differences,
    eigen_name,
    hessian_path,
    read_json,
    read_pickle,
    refuse_other_settings,
    standard_experiment,
    write_json,
    write_pickle,
)
from src.curvature.choices import OPERATOR_NAMES
from src.errors import FileError, FlagError

if TYPE_CHECKING:
    from src.curvature.choices import SpectrumPlan
    from src.curvature.spectrum import Spectrum

KEYS = ("eigenvals", "trace", "density_eigen", "density_weight")


class HessianFiles:
    """One spectrum's files.

    Args:
        path: The pickle's path.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def record(self) -> Path:
        """The json file: settings, residuals, errors, costs."""
        return self.path.with_suffix(".json")

    @property
    def state(self) -> Path:
        """The folder of an interrupted measurement."""
        return self.path.with_suffix(".state")

    @property
    def claim(self) -> Path:
        """The lock of the process that measures it."""
        return self.path.with_suffix(".lock")

    def is_done(self, settings: dict[str, Any]) -> bool:
        """Whether a spectrum of these settings is there.

        Raises:
            FileError: One of other, or of unknown, settings is there.
        """
        if not self.path.exists():
            return False
        if not self.record.exists():
            raise FileError(
                f"{self.path}: holds a spectrum of unknown settings (there is no {self.record.name}); "
                "give --overwrite to replace it, or choose another --hessian_folder"
            )
        try:
            stored = self.read_record()["settings"]
        except FileError as error:
            raise FileError(f"{error}, with --overwrite") from error
        refuse_other_settings(self.path, stored, settings)
        return True

    def write(self, spectrum: Spectrum, record: dict[str, Any]) -> None:
        """Write both files; a reader never sees a pickle with another one's record."""
        self.path.unlink(missing_ok=True)
        write_json(self.record, record)
        write_pickle(
            self.path,
            {
                "eigenvals": spectrum.eigenvalues.tolist(),
                "trace": spectrum.trace.samples,
                "density_eigen": spectrum.nodes,
                "density_weight": spectrum.weights,
            },
        )

    def read(self) -> dict[str, Any]:
        """The pickle's lists.

        Raises:
            FileError: It is missing, damaged, or no spectrum.
        """
        found = read_pickle(self.path)
        if not isinstance(found, dict) or any(key not in found for key in KEYS):
            raise FileError(f"{self.path}: is no spectrum of compute_hessian_eigen.py; make it anew")
        try:
            values, traces = _numbers(found["eigenvals"]), _numbers(found["trace"])
            nodes, weights = ([_numbers(run) for run in found[key]] for key in ("density_eigen", "density_weight"))
        except (TypeError, AttributeError, ValueError) as error:
            raise FileError(f"{self.path}: is no spectrum (not numbers, or not finite); make it anew") from error
        if not values or not nodes or not all(nodes) or list(map(len, nodes)) != list(map(len, weights)):
            raise FileError(f"{self.path}: is no spectrum (empty or uneven); make it anew")
        return {"eigenvals": values, "trace": traces, "density_eigen": nodes, "density_weight": weights}

    def read_record(self) -> dict[str, Any]:
        """The record.

        Raises:
            FileError: It is missing or damaged.
        """
        record = read_json(self.record)
        if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
            raise FileError(f"{self.record}: holds no settings; make it anew")
        settings = record["settings"]
        known = {"operator": OPERATOR_NAMES, "eigen_split": ("train", "test")}
        right = all(settings.get(name, words[0]) in words for name, words in known.items())
        if not right or not isinstance(settings.get("examples", 0), int):
            raise FileError(f"{self.record}: its settings are not of a spectrum; compute it again")
        for name, kinds in (("loss", int | float), ("trace", int | float | None), ("trace_quadrature", int | float)):
            if name in record and not isinstance(record[name], kinds):
                raise FileError(f"{self.record}: its {name} is not a number; compute it again")
        return record


def _numbers(values: Any) -> list[float]:
    """A list of finite real numbers, from one that may hold complex ones (of the papers' code)."""
    numbers = [float(value.real) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("not finite")
    return numbers


def describe(spectrum: Spectrum, plan: SpectrumPlan) -> dict[str, Any]:
    """What the record says of a spectrum."""
    from src.curvature.lanczos import Ritz, mean_and_error

    found = Ritz(spectrum.eigenvalues, spectrum.residuals, None)
    relative = found.relative_residuals()
    hutchinson, deflated = mean_and_error(spectrum.trace.samples), mean_and_error(spectrum.trace.deflated)
    best = deflated if spectrum.trace.deflated else hutchinson
    nodes = [node for run in spectrum.nodes for node in run]
    return {
        "eigenvalues": spectrum.eigenvalues.tolist(),
        "residuals": spectrum.residuals.tolist(),
        "relative_residuals": [value if math.isfinite(value) else None for value in relative.tolist()],
        "converged": bool((relative <= plan.tolerance).all()) and len(relative) >= plan.top_n,
        "lanczos_steps": spectrum.steps,
        "smallest_node": min(nodes),
        "largest_node": max(nodes),
        "trace": _finite(best[0]),
        "trace_standard_error": _finite(best[1]),
        "trace_estimator": "hutchinson, Lanczos part exact" if spectrum.trace.deflated else "hutchinson",
        "trace_probes": len(spectrum.trace.samples),
        "trace_hutchinson": [_finite(value) for value in hutchinson],
        "trace_quadrature": spectrum.quadrature_trace(),
        "trace_deflated_samples": spectrum.trace.deflated,
    }


def _finite(value: float) -> float | None:
    """A number that json knows; None for NaN."""
    return value if math.isfinite(value) else None


POINTS = 10_000
"""Least number of points of a grid."""
VARIANCE = 1e-5
"""Variance of the Gaussian at each node, where the spectrum's range is below 1; else times the range."""
MOST_POINTS = 1_000_000
"""Most points of a grid, however narrow a Gaussian and however wide the range."""
_PER_WIDTH = 4  # points of the grid per standard deviation, so that no node falls between two
_LEAST_WIDTH = 2  # steps of the grid to which narrower Gaussians are widened, for the same reason


def width(low: float, high: float, variance: float = VARIANCE) -> float:
    """Standard deviation of the Gaussians for a spectrum from ``low`` to ``high``."""
    return float(np.sqrt(variance * max(1.0, high - low)))


def grid(low: float, high: float, narrow: float, wide: float | None = None) -> np.ndarray:
    """Points over spectra and their Gaussians' tails.

    Args:
        low: The smallest eigenvalue.
        high: The largest.
        narrow: The smallest standard deviation of a Gaussian, which says how close points must be.
        wide: The largest, which says how far they must reach; default the same.
    """
    margin = max(0.01, 6 * (wide or narrow))
    low, high = low - margin, high + margin
    wanted = int(np.ceil(_PER_WIDTH * (high - low) / narrow)) + 1
    return np.linspace(low, high, min(max(POINTS, wanted), MOST_POINTS))


def extent(nodes: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean smallest and mean largest node of several quadratures."""
    return float(np.mean([min(run) for run in nodes])), float(np.mean([max(run) for run in nodes]))


def density(
    nodes: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], points: np.ndarray, sigma: float
) -> np.ndarray:
    """The mean over quadratures of Gaussians at their nodes, scaled to an area of 1.

    Args:
        nodes: Per quadrature (one per start vector) its nodes.
        weights: Their weights.
        points: Where the density is wanted, evenly spaced, ``(g,)``.
        sigma: Standard deviation of each Gaussian; at least two steps between points are taken.

    Returns:
        ``(g,)``.
    """
    sigma = max(sigma, _LEAST_WIDTH * (points[1] - points[0]))
    total = np.zeros(len(points))
    reach = 9 * sigma  # beyond it a Gaussian is below what is drawn
    for run_nodes, run_weights in zip(nodes, weights, strict=True):
        for node, weight in zip(run_nodes, run_weights, strict=True):
            part = slice(*np.searchsorted(points, [node - reach, node + reach]))
            total[part] += weight * np.exp(-0.5 * ((points[part] - node) / sigma) ** 2)
    area = total.sum() * (points[1] - points[0])
    return total / area if area > 0 else total


def moment(nodes: Sequence[float], weights: Sequence[float], power: int) -> float:
    """The quadrature of ``x ** power``."""
    return float(np.dot(weights, np.power(nodes, power)))


log = logging.getLogger(__name__)

NEAR_ZERO = 0.01
"""Directions whose eigenvalue is below this share of the largest count as flat."""
MEASURES = {
    "largest": "largest eigenvalue",
    "last": "last of the top eigenvalues",
    "trace": "trace",
    "effective": "trace / largest",
    "flat": "share of flat directions",
    "negative": "share of negative directions",
    "loss": "loss",
}
"""The columns of the table."""
_MEASURED = ("dataset", "labels", "model", "experiment", "epoch", "eigen_split", "high_low_spec", "operator",
             "subset", "examples", "images", "decoding", "training")  # fmt: skip
"""The settings that say what was measured: averages over seeds are of one such thing."""
_OF_A_RUN = {"experiment", "seed", "checkpoint", "high_low_spec", "training"}
_OF_EXAMPLES = {"examples", "example_hash"}


@dataclass(frozen=True)
class Measured:
    """One network's spectrum, as it was stored.

    Attributes:
        path: Its pickle.
        eigenvalues: Top eigenvalues.
        nodes: Of the density, a list per probe.
        weights: Theirs.
        traces: ``v^T H v`` of each probe of the trace.
        record: The json beside it; empty where there is none.
    """

    path: Path
    eigenvalues: list[float]
    nodes: list[list[float]]
    weights: list[list[float]]
    traces: list[float]
    record: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> Measured:
        """Read a spectrum, and its record if there is one.

        Raises:
            FileError: It is missing or damaged.
        """
        files = HessianFiles(path)
        found = files.read()
        record = files.read_record() if files.record.exists() else {}
        lists = (found[key] for key in ("eigenvals", "density_eigen", "density_weight", "trace"))
        return cls(Path(path), *lists, record)

    @property
    def settings(self) -> dict[str, Any]:
        """What the record says it depends on; empty where there is none."""
        return self.record.get("settings", {})

    @property
    def trace(self) -> float:
        """The best estimate there is: the record's, else the probes' mean, else the quadrature's, else NaN."""
        stored = self.record.get("trace")
        if stored is None and not self.traces:
            stored = self.record.get("trace_quadrature")
        return float(np.mean(self.traces) if stored is None and self.traces else np.nan if stored is None else stored)

    def density(self, points: np.ndarray) -> np.ndarray:
        """The spectral density ``(g,)``, of area 1."""
        return density(self.nodes, self.weights, points, width(*extent(self.nodes)))

    def share(self, low: float, high: float) -> float:
        """Share of the eigenvalues in ``[low, high)``, by the quadratures."""
        shares = [
            sum(w for node, w in zip(n, ws, strict=True) if low <= node < high)
            for n, ws in zip(self.nodes, self.weights, strict=True)
        ]
        return float(np.mean(shares))

    def measures(self) -> dict[str, float]:
        """A number for each of ``MEASURES``; NaN where it is not known."""
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


@dataclass(frozen=True)
class SpectrumGroup:
    """Spectra that are drawn as one: the seeds of one kind of run."""

    label: str
    spectra: list[Measured]

    def summary(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation over the seeds of each measure; the deviation of one seed is NaN."""
        rows = [spectrum.measures() for spectrum in self.spectra]
        found = {}
        for name in MEASURES:
            values = np.array([row[name] for row in rows])
            found[name] = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else np.nan
        return found


@dataclass(frozen=True)
class Query:
    """Which spectra are wanted; see the flags of plot_hessian.py.

    Attributes:
        data: What ``--dataset`` and its companions were given, for messages.
    """

    folder: Path
    dataset: str
    data: Mapping[str, Any]
    model: str
    part: str
    operator: str
    eigen_mode: str
    seeds: Sequence[int] | None
    epoch: int | None
    lr_sched: str | None


def find_group(query: Query, optimizer: str, spec: str, label: str) -> SpectrumGroup:
    """The spectra of one optimiser and one part of the examples.

    Raises:
        FlagError: Several epochs or schedules fit.
        FileError: There are none, or one of the seeds is missing (the message has the command that makes it), or they
            are not of the same examples.
    """
    experiment = standard_experiment(query.model, query.dataset, optimizer, query.lr_sched or "*")
    which, mode = f"epoch_{query.epoch or '*'}", eigen_name(query.eigen_mode, query.operator)
    pattern = hessian_path("", query.part, spec, experiment, "*bn", "*", which, mode)
    paths = [path for path in sorted(Path(query.folder).glob(str(pattern))) if path.parents[1].name.isdigit()]
    seeds = query.seeds if query.seeds is not None else sorted({int(path.parents[1].name) for path in paths})
    paths = [path for path in paths if int(path.parents[1].name) in seeds]
    for flag, names in (("--lr_sched", set(map(_schedule, paths))), ("--epochs", set(map(_epoch, paths)))):
        if len(names) > 1:
            raise FlagError(f"{flag}: spectra of {len(names)} fit; choose one of {', '.join(sorted(names))}")
    missing = sorted(set(seeds) - {int(path.parents[1].name) for path in paths})
    if missing or not paths:
        seed = missing[0] if missing else 1
        epoch = "" if query.epoch is None else f"epoch {query.epoch}, "
        raise FileError(
            f"{query.folder}: no spectrum of {query.model} over {query.dataset} with {optimizer} "
            f"({query.part}, {spec}), {epoch}seed {seed}; make it with: {_command(query, optimizer, spec, seed)}"
        )
    group = SpectrumGroup(label, [Measured.read(path) for path in paths])
    for spectrum in group.spectra:
        _refuse_another(spectrum)
    _refuse_mixtures(group)
    return group


def _refuse_another(spectrum: Measured) -> None:
    """Stop if a record says that a spectrum is of another run, seed or epoch than its path."""
    path, settings = spectrum.path, spectrum.settings
    asked = {"seed": int(path.parents[1].name), "epoch": int(_epoch(path))}
    found = differences({name: settings.get(name, value) for name, value in asked.items()}, asked)
    experiment = str(settings.get("experiment", ""))
    if experiment.removeprefix("standard_") not in path.parents[2].name:
        found.append(f"experiment ({experiment} there)")
    if found:
        raise FileError(
            f"{path}: is not what its name says: {', '.join(found)}; it was copied or renamed; measure it again"
        )


def _schedule(path: Path) -> str:
    return path.parents[2].name.rsplit("_sched_", 1)[1].rsplit("_", 1)[0]


def _epoch(path: Path) -> str:
    return path.parent.name.removeprefix("epoch_")


def _command(query: Query, optimizer: str, spec: str, seed: int) -> str:
    """The command that measures a missing spectrum."""
    flags = {
        **query.data,
        "model": query.model,
        "optimizer": optimizer,
        "lr_sched": query.lr_sched,
        "seed": seed,
        "epochs": query.epoch or "E",
        "eigen_split": query.part,
        "high_low_spec": None if spec == "all" else spec,
        "operator": query.operator,
        "eigen_mode": query.eigen_mode,
    }
    words = (f"--{name}={value}" for name, value in flags.items() if value is not None)
    return shlex.join(["python", "compute_hessian_eigen.py", *words])


def _refuse_mixtures(group: SpectrumGroup) -> None:
    """Stop where seeds would be averaged that were not measured on the same examples, or not after the same training.

    Raises:
        FileError: Two records say so; the message names what differs.
    """
    first, *others = [spectrum for spectrum in group.spectra if spectrum.settings] or [None]
    for other in others:
        names = [*_MEASURED, *(("example_hash",) if first.settings.get("high_low_spec") is None else ())]
        here, there = ({name: spectrum.settings.get(name) for name in names} for spectrum in (first, other))
        if found := differences(there, here):
            raise FileError(
                f"{other.path}: is not of the same kind as {first.path}: {', '.join(found)}; measure one anew with "
                "--overwrite, or choose --seeds"
            )


def refuse_other_epochs(groups: Sequence[SpectrumGroup]) -> str:
    """The one epoch of the groups of :func:`find_group`.

    Raises:
        FlagError: There are several; the message names them.
    """
    epochs = {group.label: _epoch(group.spectra[0].path) for group in groups}
    if len(set(epochs.values())) > 1:
        found = ", ".join(f"{epoch} ({label})" for label, epoch in epochs.items())
        raise FlagError(f"--epochs: the spectra are of different epochs: {found}; choose one")
    return _epoch(groups[0].spectra[0].path)


def refuse_other_examples(groups: Sequence[SpectrumGroup]) -> None:
    """Stop if spectra of one choice of examples were measured on different numbers of them.

    Raises:
        FileError: Two were; the message names them.
    """
    first: dict[str, Measured] = {}
    for spectrum in (spectrum for group in groups for spectrum in group.spectra if spectrum.settings):
        settings = spectrum.settings
        other = first.setdefault(str(settings.get("high_low_spec")), spectrum)
        if settings.get("examples") != other.settings.get("examples"):
            raise FileError(
                f"{spectrum.path}: was measured on {settings.get('examples')} examples, {other.path} on "
                f"{other.settings.get('examples')}; measure both with the same --subset, or name them as --files"
            )


def warn_of_differences(groups: Sequence[SpectrumGroup]) -> None:
    """Say in the log which settings of training or measurement are not the same in all spectra."""
    every = [spectrum.settings for group in groups for spectrum in group.spectra if spectrum.settings]
    every = [{**one, "lr_sched": str(one.get("experiment")).partition("_sched_")[2]} for one in every]
    names = set().union(*every) - _OF_A_RUN
    for name in sorted(names - _OF_EXAMPLES):
        _warn(name, every)
    for spec in sorted({str(one.get("high_low_spec")) for one in every}):  # examples differ where they are meant to
        alike = [one for one in every if str(one.get("high_low_spec")) == spec]
        for name in sorted(names & _OF_EXAMPLES):
            _warn(name, alike)


def _warn(name: str, settings: Sequence[Mapping[str, Any]]) -> None:
    values = {str(one.get(name)) for one in settings}
    if len(values) > 1:
        log.warning("the spectra differ in %s: %s", name, ", ".join(sorted(values)))


def sources(groups: Sequence[SpectrumGroup]) -> list[dict[str, Any]]:
    """What the table's numbers come from: for each group its files, and their settings."""
    return [
        {
            "run": group.label,
            "spectra": [{"file": str(one.path), "settings": one.settings or None} for one in group.spectra],
        }
        for group in groups
    ]


def markdown_table(groups: Sequence[SpectrumGroup]) -> str:
    """Means and standard deviations over seeds, one line per group."""
    lines = [["run", "seeds", *MEASURES.values()]]
    for group in groups:
        cells = [_cell(*value) for value in group.summary().values()]
        lines.append([group.label, str(len(group.spectra)), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]]) + "\n"


def _cell(mean: float, deviation: float) -> str:
    if np.isnan(mean):
        return "-"
    return f"{mean:.4g}" if np.isnan(deviation) else f"{mean:.4g} ± {deviation:.2g}"


def csv_table(groups: Sequence[SpectrumGroup]) -> str:
    """The same as csv, with the mean and the deviation in columns of their own; what is unknown is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "seeds", *(f"{name}{end}" for name in MEASURES for end in ("", "_sd"))])
    for group in groups:
        values = [value for pair in group.summary().values() for value in pair]
        cells = ["" if np.isnan(value) else repr(value) for value in values]
        writer.writerow([group.label, len(group.spectra), *cells])
    return text.getvalue()
