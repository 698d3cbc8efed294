"""One measurement of a loss's curvature: model, examples, eigenvalues, density and trace, with resume.

A single Lanczos run gives eigenvalues and density; it continues past the density's steps only if eigenvalues have not
converged. Additional probes of the density are separate runs. The trace comes last, because the eigenvectors found
reduce its cost. The state of an interrupted measurement is in a folder next to the result.
"""

import logging
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from src.artifacts.io import file_digest, read_checkpoint, require_writable, write_checkpoint
from src.artifacts.locks import lock
from src.artifacts.paths import standard_experiment
from src.artifacts.store import load_result, write_recorded
from src.context import RunContext
from src.curvature.config import CheckpointConfig, SpectrumConfig
from src.curvature.lanczos import (
    Basis,
    Lanczos,
    Ritz,
    TraceEstimate,
    Tridiagonal,
    add_probe,
    basis_bytes,
    mean_and_error,
    quadrature,
    rademacher,
)
from src.curvature.operators import CurvatureOperator, power_iteration, true_residuals
from src.datasets import ImageSet
from src.datasets.splits import rounded_share
from src.devices import available_memory
from src.errors import ArgumentError, FileError
from src.formatting import gib
from src.training import find_checkpoint

log = logging.getLogger(__name__)

DEFAULT_MODEL = "resnet50"
_RUN = r"(?P<model>.+)_over_.+_with_(?P<optimizer>.+)_sched_(?P<lr_sched>.+)"
_NAMES = {
    "train_full.py": re.compile(f"standard_{_RUN}"),
    "train_split.py": re.compile(rf"split_{_RUN}_val_split_(?P<samis_validation_split_index>\d+)"),
}
"""Scripts whose run names contain the flags that define them."""
_MAKERS = {
    "_static_coreset_": "runs with this name are made by train_prune.py",
    "pretrain/": "runs with this name are made by train_prune.py and select_coreset.py",
    "mpe/": "runs with this name are made by the scripts in examples/",
}

_DAMAGE = (LookupError, TypeError, ValueError, AttributeError, RuntimeError)
_DAMAGED = "its state is damaged or incomplete; remove it, or run without --resume"


@dataclass(frozen=True)
class TrainedModel:
    """The model to measure.

    Attributes:
        path: Its checkpoint.
        experiment: Its run's name.
        seed: The run's seed.
        which: Name of the result's subfolder: the epoch, or digits of the checkpoint's digest.
        digest: The checkpoint's digest.
        model: The model, in eval mode.
        state: The checkpoint without its weights.
    """

    path: Path
    experiment: str
    seed: int
    which: str
    digest: str
    model: nn.Module
    state: dict[str, Any]

    @property
    def has_batchnorm(self) -> bool:
        """Whether the model has BatchNorm, which is part of the papers' file names."""
        return any(isinstance(module, _BatchNorm) for module in self.model.modules())


def find_model(config: CheckpointConfig, models_folder: Path, context: RunContext) -> TrainedModel:
    """Find and load the requested model.

    Args:
        config: Which model.
        models_folder: The folder of checkpoints.
        context: Device, precision and data.

    Raises:
        ArgumentError: Several schedules match.
        FileError: The checkpoint does not exist (the message has the command that makes it) or does not match.
    """
    if config.checkpoint is not None:
        model, state = context.load_file(config.checkpoint, config.model)
        settings = state["settings"]
        names = (settings.get(key, "unknown") for key in ("optimizer", "lr_sched"))
        experiment = standard_experiment(state["model"], context.entry.name, *names)
        digest = file_digest(config.checkpoint)
        which, seed = f"checkpoint_{digest[:8]}", int(settings.get("seed", 0))
        return TrainedModel(config.checkpoint, experiment, seed, which, digest, model, state)
    expected: dict[str, Any] = {"seed": config.seed, "epoch": config.epochs}
    if config.exp is not None:
        name, experiment = config.model, config.exp
        path, implied = _find_named(config, models_folder, context)
        expected |= implied
    else:
        name = config.model or DEFAULT_MODEL
        experiment, flags = config.find_full_run(name, models_folder, context.entry.name, config.seed)
        found = context.find_checkpoints(models_folder, experiment, config.seed, [config.epochs], **flags)
        path = found[config.epochs]
        expected |= {**flags, "validation_split": None}
    model, state = context.load_model(path, **{**expected, "model": name})
    which = f"epoch_{config.epochs}"
    return TrainedModel(path, experiment, config.seed, which, file_digest(path), model, state)


def _find_named(config: CheckpointConfig, models_folder: Path, context: RunContext) -> tuple[Path, dict[str, Any]]:
    """Find the checkpoint of a run by the run's name, and the settings that follow from the name."""
    for script, pattern in _NAMES.items():
        if match := pattern.fullmatch(config.exp):
            flags = match.groupdict()
            found = context.find_checkpoints(models_folder, config.exp, config.seed, [config.epochs], script, **flags)
            path = found[config.epochs]
            split = flags.get("samis_validation_split_index")
            implied = {name: flags[name] for name in ("optimizer", "lr_sched")}
            return path, {**implied, "validation_split": None if split is None else int(split)}
    path = find_checkpoint(models_folder, config.exp, config.seed, config.epochs)
    if path is None:
        makers = (maker for sign, maker in _MAKERS.items() if sign in config.exp)
        raise FileError(
            f"{models_folder}: no checkpoint of epoch {config.epochs}, seed {config.seed} for {config.exp}; "
            + next(makers, "check the run's name in this folder")
        )
    return path, {}


def select_by_score(images: ImageSet, scores: np.ndarray, side: str, fraction: float) -> ImageSet:
    """Select the examples with the lowest or highest scores; ties are broken by position.

    Args:
        images: n examples.
        scores: Scores by original index.
        side: ``"low"`` or ``"high"``.
        fraction: Fraction of n to take, rounded half up.

    Raises:
        ArgumentError: The fraction selects no examples.
        FileError: An example has no score.
    """
    own = scores[images.indices.cpu().numpy()]
    if missing := int(np.isnan(own).sum()):
        raise FileError(
            f"--high_low_spec: {missing} of {len(own)} examples have no score; score them, or exclude them with "
            "--subset"
        )
    count = rounded_share(len(own), fraction)
    if not count:
        raise ArgumentError(
            "high_low_spec", f": {fraction:g} of {len(own)} examples selects none; use a larger fraction"
        )
    order = np.argsort(own, kind="stable")
    return images.subset(torch.from_numpy(np.sort(order[:count] if side == "low" else order[-count:])))


class SpectrumState:
    """A folder with the latest state; each vector of a Lanczos basis is written once.

    Args:
        folder: The folder.
        settings: The settings that determine the measurement's numbers.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = Path(folder), settings
        self._progress = self.folder / "progress.pt"
        self._rows: list[list[int]] = []  # run, first vector and end index of each file

    def _rows_file(self, run: int, start: int) -> Path:
        return self.folder / f"rows_{run}_{start}.pt"

    def prepare(self, resume: bool, overwrite: bool) -> None:
        """Keep an earlier state to resume from; otherwise remove it, even if it is damaged.

        Args:
            resume: Whether to resume from the state.
            overwrite: Whether to remove a state with different settings, or a damaged one to resume from.

        Raises:
            FileError: Such a state exists and may not be removed.
        """

        def read(path: Path) -> tuple[bool, dict[str, Any]]:
            try:
                settings = read_checkpoint(path).get("settings")
                if not isinstance(settings, dict):
                    raise FileError(f"{path}: has no settings; remove {self.folder}")
            except FileError:
                if resume:
                    raise
                return False, self.settings  # a fresh start does not use the state
            return True, settings

        files = [path for path in sorted(self.folder.glob("*.pt")) if not path.name.startswith(("rows_", "vectors"))]
        fits = [load_result(path, self.settings, read, overwrite=overwrite) is not None for path in files]
        if files and all(fits) and not resume:
            log.info("%s: discarding an interrupted measurement; --resume would continue it", self.folder)
        if not resume or not all(fits):
            self.clear()

    def save(self, state: dict[str, Any], run: int, basis: Basis | None) -> None:
        """Write a state atomically: first the vectors, then the file that refers to them.

        Args:
            state: Tensors and plain values.
            run: Index of the Lanczos run.
            basis: Its basis, if any.

        Raises:
            FileError: It cannot be written.
        """
        kept = [row for row in self._rows if row[0] == run and basis is not None]
        start = kept[-1][2] if kept else 0
        if basis is not None and len(basis) > start:
            write_checkpoint(self._rows_file(run, start), {"rows": basis.stored(start)})
            kept.append([run, start, len(basis)])
        write_checkpoint(self._progress, {**state, "rows": kept, "settings": self.settings})
        for old in self._rows:
            if old not in kept:
                self._rows_file(*old[:2]).unlink(missing_ok=True)
        self._rows = kept

    def load(self) -> dict[str, Any] | None:
        """Load the latest state, with ``rows`` the vectors of its basis (or None); None if there is no state.

        Raises:
            FileError: A file is damaged.
        """
        if not self._progress.exists():
            return None
        state = read_checkpoint(self._progress)
        try:
            self._rows = state["rows"]
            parts = [read_checkpoint(self._rows_file(run, start))["rows"] for run, start, _ in self._rows]
            return {**state, "rows": torch.cat(parts) if parts else None}
        except _DAMAGE as error:
            raise FileError(f"{self.folder}: {_DAMAGED}") from error

    def keep(self, name: str, values: dict[str, Any]) -> None:
        """Write the results of a finished part of the measurement."""
        write_checkpoint(self.folder / f"{name}.pt", {**values, "settings": self.settings})

    def kept(self, name: str) -> dict[str, Any] | None:
        """Load what ``keep`` wrote; None if it does not exist."""
        path = self.folder / f"{name}.pt"
        return read_checkpoint(path) if path.exists() else None

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._rows = []


DEFLATED = 20
"""Number of Ritz vectors treated exactly in the trace; more vectors need fewer probes, but each has P entries."""
_SAVE_SECONDS = 60.0  # also save the state after this time, if products are slow


@dataclass
class Spectrum:
    """The results of a measurement.

    Attributes:
        eigenvalues: Top eigenvalues, ``(m,)``; fewer than requested if the matrix has fewer.
        residuals: Norms ``|H x - value x|``, ``(m,)``.
        nodes: Nodes of the density, one list per probe.
        weights: Their weights.
        steps: Lanczos steps of the run that found the eigenvalues.
        trace: Probes of the trace.
        size: P.
    """

    eigenvalues: np.ndarray = field(default_factory=lambda: np.empty(0))
    residuals: np.ndarray = field(default_factory=lambda: np.empty(0))
    nodes: list[list[float]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    steps: int = 0
    trace: TraceEstimate = field(default_factory=TraceEstimate)
    size: int = 0

    def quadrature_trace(self) -> float:
        """The trace from the density's quadratures: Hutchinson's estimate with their start vectors."""
        return self.size * float(np.mean([np.dot(n, w) for n, w in zip(self.nodes, self.weights, strict=True)]))


class SpectrumRun:
    """A measurement in progress.

    Args:
        operator: The matrix.
        config: What to measure.
        state: Where to save the state for a later process; None to save nothing.
    """

    def __init__(
        self, operator: CurvatureOperator, config: SpectrumConfig, state: SpectrumState | None = None
    ) -> None:
        self.operator, self.config, self.state = operator, config, state
        self.result = Spectrum(size=operator.size)
        self.seconds = 0.0
        self._process: Lanczos | None = None
        self._known: tuple[np.ndarray, Tensor] | None = None
        self._known_stored = False
        self._saved = (operator.products, time.monotonic())

    def resume(self) -> bool:
        """Restore the stored state; return False if there is none.

        Raises:
            FileError: It is damaged.
        """
        stored = None if self.state is None else self.state.load()
        if stored is None:
            return False
        try:
            result = stored["result"]
            self.result = Spectrum(
                *(np.array([*map(float, result[name])]) for name in ("eigenvalues", "residuals")),
                *([[*map(float, run)] for run in result[name]] for name in ("nodes", "weights")),
                int(result["steps"]),
                TraceEstimate(*([*map(float, result[name])] for name in ("samples", "deflated"))),
                self.operator.size,
            )
            if stored["lanczos"] is not None:
                self._process = self._start()
                self._process.load(stored["lanczos"], stored["rows"])
            if stored["known"]:
                known = self.state.kept("vectors")
                values = np.array(known["values"], dtype=np.float64)
                if known["vectors"].shape != (len(values), self.operator.size):
                    raise ValueError("the stored vectors have a different shape")
                self._known = values, known["vectors"].to(self.operator.device)
                self._known_stored = True
            self.operator.products, self.seconds = int(stored["products"]), float(stored["seconds"])
        except _DAMAGE as error:
            raise FileError(f"{self.state.folder}: {_DAMAGED}") from error
        return True

    def run(self, progress: bool = False) -> Spectrum:
        """Run or continue the measurement.

        Args:
            progress: Whether to show a progress bar with the remaining time.

        Raises:
            MeasurementError: A product is not finite.
            FileError: A state cannot be written.
        """
        config, began = self.config, time.monotonic()
        before = self.seconds
        total = config.probes * config.lanczos_steps + config.trace_probes
        options = {"unit": "product", "disable": None if progress else True, "dynamic_ncols": True}
        with tqdm(total=total, initial=min(self.operator.products, total), desc=self.operator.name, **options) as bar:

            def done() -> None:
                self.seconds = before + time.monotonic() - began
                bar.update()
                self._save()

            while len(self.result.nodes) < config.probes:
                self._lanczos(bar, done)
            trace = self.result.trace
            while not trace.is_done(config.trace_probes, config.trace_tolerance):
                bar.set_description(f"{self.operator.name}, trace")
                add_probe(trace, self.operator, config.probe_seed, self._known)
                done()
        return self.result

    def _start(self) -> Lanczos:
        operator, config = self.operator, self.config
        start = rademacher(operator.size, config.probe_seed, len(self.result.nodes), "lanczos")
        return Lanczos(operator, start.to(operator.device, operator.dtype), config.basis, config.probe_seed)

    def _lanczos(self, bar: tqdm, done: Callable[[], None]) -> None:
        """Run Lanczos once; the first run also finds the eigenvalues."""
        config, result, first = self.config, self.result, not self.result.nodes
        process = self._process = self._process or self._start()
        wanted = min(config.top_n, self.operator.size)
        longest = config.most_steps if first else config.lanczos_steps
        while not process.exhausted and len(process) < longest:
            if len(process) >= config.lanczos_steps:
                found = process.ritz(wanted, config.order)
                if not first or (len(found.values) == wanted and found.converged(config.tolerance)):
                    break
                bar.total += 1
            process.step()
            if first:
                top = process.ritz(1, config.order)
                bar.set_postfix_str(f"largest {top.values[0]:.4g}, residual {top.residuals[0]:.1e}", refresh=False)
            bar.set_description(f"{self.operator.name}, step {len(process)}")
            done()
        if first:
            found = process.ritz(wanted, config.order)
            result.eigenvalues, result.residuals, result.steps = found.values, found.residuals, len(process)
            if process.basis is not None and config.trace_probes:
                known = process.ritz(DEFLATED, "magnitude")
                self._known = known.values, process.vectors(known)
        alphas, betas = process.matrix
        nodes, weights = quadrature(Tridiagonal(alphas[: config.lanczos_steps], betas[: config.lanczos_steps]))
        result.nodes.append(nodes.tolist())
        result.weights.append(weights.tolist())
        self._process = None

    def _save(self) -> None:
        if self.state is None:
            return
        products, moment = self._saved
        if self.operator.products - products < self.config.save_every and time.monotonic() - moment < _SAVE_SECONDS:
            return
        if self._known is not None and not self._known_stored:  # write once: they are large and do not change
            values, vectors = self._known
            self.state.keep("vectors", {"values": values.tolist(), "vectors": vectors.cpu()})
            self._known_stored = True
        result, process = self.result, self._process
        snapshot = {
            "result": {
                "eigenvalues": result.eigenvalues.tolist(),
                "residuals": result.residuals.tolist(),
                "nodes": result.nodes,
                "weights": result.weights,
                "steps": result.steps,
                "samples": result.trace.samples,
                "deflated": result.trace.deflated,
            },
            "products": self.operator.products,
            "seconds": self.seconds,
            "lanczos": None if process is None else process.state(),
            "known": self._known is not None,
        }
        self.state.save(snapshot, len(result.nodes), None if process is None else process.basis)
        self._saved = self.operator.products, time.monotonic()


def describe(spectrum: Spectrum, config: SpectrumConfig) -> dict[str, Any]:
    """The record's entries for a spectrum; NaN becomes None, because json has no NaN."""
    found = Ritz(spectrum.eigenvalues, spectrum.residuals, None)
    trace, trace_error = _finite(spectrum.trace.mean_and_error)
    return {
        "eigenvalues": spectrum.eigenvalues.tolist(),
        "residuals": spectrum.residuals.tolist(),
        "relative_residuals": _finite(found.relative_residuals().tolist()),
        "converged": found.converged(config.tolerance) and len(found.values) >= config.top_n,
        "lanczos_steps": spectrum.steps,
        "smallest_node": min(map(min, spectrum.nodes)),
        "largest_node": max(map(max, spectrum.nodes)),
        "trace": trace,
        "trace_standard_error": trace_error,
        "trace_estimator": "hutchinson, Lanczos part exact" if spectrum.trace.deflated else "hutchinson",
        "trace_probes": len(spectrum.trace.samples),
        "trace_hutchinson": _finite(mean_and_error(spectrum.trace.samples)),
        "trace_quadrature": spectrum.quadrature_trace(),
        "trace_deflated_samples": spectrum.trace.deflated,
    }


def _finite(values: Any) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def measure_spectrum(
    operator: CurvatureOperator,
    config: SpectrumConfig,
    path: Path,
    settings: dict[str, Any],
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure, write the result, and remove the state.

    Args:
        operator: The matrix.
        config: What to measure.
        path: The result: a pickle in the format of the papers' plotting code, with a json record next to it.
        settings: The settings that determine the numbers.
        facts: Additional entries of the record.

    Returns:
        The record: settings, eigenvalues, residuals, standard errors, costs.

    Raises:
        MeasurementError: A value is not finite.
        FileError: A file cannot be written, the state does not match, or another process is measuring this.
    """
    require_writable(path.parent)
    with lock(path.with_suffix(".lock"), "measuring this spectrum"):
        _announce(operator, config)
        began = time.monotonic()
        state = SpectrumState(path.with_suffix(".state"), settings)
        state.prepare(config.resume, config.overwrite)
        run = SpectrumRun(operator, config, state)
        try:
            resumed = run.resume()
        except FileError:
            if not config.overwrite:
                raise
            state.clear()
            run, resumed = SpectrumRun(operator, config, state), False
        if resumed:
            log.info("resuming after %d products", operator.products)
        loss, gradient = operator.loss_and_gradient()
        norm = torch.linalg.vector_norm(gradient).item()
        log.debug("loss %.6g over %d examples, gradient norm %.4g", loss, operator.examples, norm)
        power = _power(operator, config, state) if config.eigen_mode == "power_iter" else None
        spectrum = run.run(progress=True)
        if power is not None:
            spectrum.eigenvalues, spectrum.residuals = np.array(power["values"]), np.array(power["residuals"])
        record = {
            "settings": settings,
            **(facts or {}),
            "parameters": operator.size,
            "loss": loss,
            "gradient_norm": norm,
            **describe(spectrum, config),
            "products": operator.products,
            "seconds": run.seconds + (0.0 if power is None else power["seconds"]),
            "last_start_seconds": time.monotonic() - began,
            "resumed": resumed,
            "device": str(operator.device),
        }
        content = {
            "eigenvals": spectrum.eigenvalues.tolist(),
            "trace": spectrum.trace.samples,
            "density_eigen": spectrum.nodes,
            "density_weight": spectrum.weights,
        }
        write_recorded(path, content, record)
        state.clear()
        return record


def _announce(operator: CurvatureOperator, config: SpectrumConfig) -> None:
    """Log the usual and the maximum memory of the vectors."""
    counts = [min(steps, operator.size) + 1 for steps in (config.lanczos_steps, config.most_steps)]
    usual, most = (basis_bytes(count, operator.size, operator.dtype, config.basis) for count in counts)
    ritz = 0
    if config.basis != "none" and config.trace_probes:
        ritz = min(DEFLATED, operator.size) * operator.size * operator.dtype.itemsize
    log.info(
        "%d parameters; the Lanczos basis takes %s (%d vectors), up to %s (%d) if eigenvalues converge slowly; "
        "the trace's vectors take %s",
        operator.size, gib(usual), counts[0], gib(most), counts[1], gib(ritz),
    )  # fmt: skip
    where = torch.device("cpu") if config.basis == "host" else operator.device
    need = most + (ritz if where == operator.device else 0)
    free = available_memory(where)
    if free is not None and need > free:
        less = "" if config.basis == "half" else "--basis=half (half the memory), "
        log.warning("only %s are free; use %s--basis=none (no memory) or a lower --max_steps", gib(free), less)


def _power(operator: CurvatureOperator, config: SpectrumConfig, state: SpectrumState) -> dict[str, Any]:
    """Power iteration's eigenvalues, loaded from an earlier start or computed now."""
    kept = state.kept("power")
    if kept is None:
        began = time.monotonic()
        with tqdm(desc="power iteration", unit="product", disable=None) as bar:
            values, vectors = power_iteration(
                operator,
                config.top_n,
                iterations=config.power_iterations,
                tolerance=config.tolerance,
                seed=config.probe_seed,
                done=bar.update,
            )
        residuals = true_residuals(operator, values, vectors)
        kept = {"values": values.tolist(), "residuals": residuals.tolist(), "products": operator.products}
        kept["seconds"] = time.monotonic() - began
        state.keep("power", kept)
    kinds = {"values": list, "residuals": list, "products": int | float, "seconds": int | float}
    if not all(isinstance(kept.get(name), kind) for name, kind in kinds.items()):
        raise FileError(f"{state.folder}: {_DAMAGED}")
    operator.products = max(operator.products, kept["products"])
    return kept
