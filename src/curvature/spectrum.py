"""One measurement of a loss's curvature: top eigenvalues, spectral density and trace, interruptible and resumable.

A single Lanczos run gives eigenvalues and density; it continues past the density's steps only where eigenvalues have
not converged. Further probes of the density are runs of their own. The trace comes last, as the eigenvectors found
make it cheaper. The state of an interrupted measurement is in a folder beside the result.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from src.artifacts import read_checkpoint, refuse_other_settings, write_checkpoint
from src.curvature.choices import SpectrumPlan
from src.curvature.hessian import CurvatureOperator
from src.curvature.lanczos import Basis, Lanczos, TraceEstimate, Tridiagonal, add_probe, quadrature, rademacher
from src.errors import FileError

_VECTORS = ("rows_", "vectors")  # files of many vectors


class SpectrumState:
    """A folder with the newest state; each vector of a Lanczos basis is written once.

    Args:
        folder: Where.
        settings: What the measurement's numbers depend on; a state of other settings is refused.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = Path(folder), settings
        self._rows: list[list[int]] = []  # run, first vector and end of each file

    @property
    def _progress(self) -> Path:
        return self.folder / "progress.pt"

    def _rows_file(self, run: int, start: int) -> Path:
        return self.folder / f"rows_{run}_{start}.pt"

    def save(self, state: dict[str, Any], run: int, basis: Basis | None) -> None:
        """Write a state, atomically: vectors first, then what refers to them.

        Args:
            state: Tensors and plain values.
            run: Number of the Lanczos run.
            basis: Its basis; None where there is none.

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
        """The newest state, with ``rows`` the vectors of its basis (or None); None where there is no state.

        Raises:
            FileError: It is damaged, or of other settings.
        """
        if not self._progress.exists():
            return None
        state = read_checkpoint(self._progress)
        if "settings" not in state or "rows" not in state:
            raise FileError(
                f"{self._progress}: is no state of a measurement; remove {self.folder}, or leave --resume out"
            )
        refuse_other_settings(self._progress, state["settings"], self.settings)
        self._rows = state["rows"]
        parts = [read_checkpoint(self._rows_file(run, start))["rows"] for run, start, _ in self._rows]
        state["rows"] = torch.cat(parts) if parts else None
        return state

    def settings_there(self) -> dict[Path, dict[str, Any]]:
        """The settings of what is stored, by file; vectors are of the state that needs them.

        Raises:
            FileError: A file is damaged.
        """
        files = sorted(self.folder.glob("*.pt"))
        found = {
            path: read_checkpoint(path).get("settings", {}) for path in files if not path.name.startswith(_VECTORS)
        }
        for path, settings in found.items():
            if not isinstance(settings, dict):
                raise FileError(f"{path}: has no settings; remove {self.folder}, or leave --resume out")
        return found

    def keep(self, name: str, values: dict[str, Any]) -> None:
        """Write what a finished part of the measurement found."""
        write_checkpoint(self.folder / f"{name}.pt", {**values, "settings": self.settings})

    def kept(self, name: str) -> dict[str, Any] | None:
        """What ``keep`` wrote; None where there is nothing."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            return None
        values = read_checkpoint(path)
        refuse_other_settings(path, values.pop("settings", {}), self.settings)
        return values

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._rows = []


DEFLATED = 20
"""Ritz vectors that the trace takes exactly: the more, the fewer probes it needs, at P numbers each."""
_SAVE_SECONDS = 60.0  # a state is also written where a few products take longer than this


@dataclass
class Spectrum:
    """What was measured.

    Attributes:
        eigenvalues: Top eigenvalues, ``(m,)``; fewer than asked for where the matrix has fewer.
        residuals: Norms ``|H x - value x|``, ``(m,)``.
        nodes: Of the density, a list per probe.
        weights: Theirs.
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
        """The trace that the density's quadratures give: Hutchinson's estimate from their start vectors."""
        if not self.nodes:
            return float("nan")
        return self.size * float(np.mean([np.dot(n, w) for n, w in zip(self.nodes, self.weights, strict=True)]))


class SpectrumRun:
    """A measurement.

    Args:
        operator: The matrix.
        plan: What to measure.
        state: Where to keep what a later process continues from; None for nowhere.
        save_every: Products between two saves.
    """

    def __init__(
        self,
        operator: CurvatureOperator,
        plan: SpectrumPlan,
        state: SpectrumState | None = None,
        save_every: int = 10,
    ) -> None:
        self.operator, self.plan, self.state, self.save_every = operator, plan, state, save_every
        self.result = Spectrum(size=operator.size)
        self.seconds = 0.0
        self._process: Lanczos | None = None
        self._known: tuple[np.ndarray, Tensor] | None = None
        self._known_stored = False
        self._saved = (operator.products, time.monotonic())

    def resume(self) -> bool:
        """Continue from the stored state; False if there is none.

        Raises:
            FileError: It is damaged, or of other settings.
        """
        try:
            return self._resume()
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise FileError(
                f"{self.state.folder}: its state is damaged ({error}); remove it, or leave --resume out"
            ) from error

    def _resume(self) -> bool:
        stored = None if self.state is None else self.state.load()
        if stored is None:
            return False
        known = self.state.kept("vectors") if stored["known"] else None
        if stored["known"] and known is None:
            raise FileError(f"{self.state.folder}: has lost its vectors; remove it, or leave --resume out")
        result = stored["result"]
        self.result = Spectrum(
            np.array(_numbers(result["eigenvalues"])),
            np.array(_numbers(result["residuals"])),
            [_numbers(run) for run in result["nodes"]],
            [_numbers(run) for run in result["weights"]],
            int(result["steps"]),
            TraceEstimate(_numbers(result["samples"]), _numbers(result["deflated"])),
            self.operator.size,
        )
        self.operator.products, self.seconds = int(stored["products"]), float(stored["seconds"])
        if stored["lanczos"] is not None:
            self._process = self._start()
            self._process.load(stored["lanczos"], stored["rows"])
        if known is not None:
            values = np.array(known["values"], dtype=np.float64)
            if known["vectors"].shape != (len(values), self.operator.size):
                raise ValueError("its vectors have another shape")
            self._known = values, known["vectors"].to(self.operator.device)
            self._known_stored = True
        return True

    def run(self, progress: bool = False) -> Spectrum:
        """Measure, or go on with it.

        Args:
            progress: Whether to show a bar with the remaining time.

        Raises:
            MeasurementError: A product is not finite.
            FileError: A state cannot be written.
        """
        plan, began = self.plan, time.monotonic()
        before = self.seconds
        total = plan.probes * plan.steps + plan.trace_probes
        options = {"unit": "product", "disable": None if progress else True, "dynamic_ncols": True}
        with tqdm(total=total, initial=min(self.operator.products, total), desc=self.operator.name, **options) as bar:

            def done() -> None:
                self.seconds = before + time.monotonic() - began
                bar.update()
                self._save()

            while len(self.result.nodes) < plan.probes:
                self._lanczos(bar, done)
            trace = self.result.trace
            while not trace.is_done(plan.trace_probes, plan.trace_tolerance):
                bar.set_description(f"{self.operator.name}, trace")
                add_probe(trace, self.operator, plan.seed, self._known)
                done()
        return self.result

    def _start(self) -> Lanczos:
        operator, plan = self.operator, self.plan
        start = rademacher(operator.size, plan.seed, len(self.result.nodes), "lanczos")
        return Lanczos(operator, start.to(operator.device, operator.dtype), plan.basis, plan.seed)

    def _lanczos(self, bar: tqdm, done: Callable[[], None]) -> None:
        """One run: the first one finds eigenvalues as well."""
        plan, result, first = self.plan, self.result, not self.result.nodes
        process = self._process = self._process or self._start()
        wanted = min(plan.top_n, self.operator.size)
        longest = max(plan.max_steps, plan.steps) if first else plan.steps
        while not process.exhausted and len(process) < longest:
            if len(process) >= plan.steps:
                found = process.ritz(wanted, plan.order)
                if not first or (len(found.values) == wanted and found.converged(plan.tolerance)):
                    break
                bar.total += 1
            process.step()
            if first:
                top = process.ritz(1, plan.order)
                bar.set_postfix_str(f"largest {top.values[0]:.4g}, residual {top.residuals[0]:.1e}", refresh=False)
            bar.set_description(f"{self.operator.name}, step {len(process)}")
            done()
        if first:
            found = process.ritz(wanted, plan.order)
            result.eigenvalues, result.residuals, result.steps = found.values, found.residuals, len(process)
            if process.basis is not None and plan.trace_probes:
                known = process.ritz(DEFLATED, "magnitude")
                self._known = known.values, process.vectors(known)
        alphas, betas = process.matrix
        nodes, weights = quadrature(Tridiagonal(alphas[: plan.steps], betas[: plan.steps]))
        result.nodes.append(nodes.tolist())
        result.weights.append(weights.tolist())
        self._process = None

    def _save(self) -> None:
        if self.state is None:
            return
        products, moment = self._saved
        if self.operator.products - products < self.save_every and time.monotonic() - moment < _SAVE_SECONDS:
            return
        if self._known is not None and not self._known_stored:  # once: they are large, and stay as they are
            values, vectors = self._known
            self.state.keep("vectors", {"values": values.tolist(), "vectors": vectors.cpu()})
            self._known_stored = True
        self.state.save(self._snapshot(), len(self.result.nodes), self._process and self._process.basis)
        self._saved = self.operator.products, time.monotonic()

    def _snapshot(self) -> dict[str, Any]:
        result = self.result
        return {
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
            "lanczos": None if self._process is None else self._process.state(),
            "known": self._known is not None,
        }


def true_residuals(operator: CurvatureOperator, values: np.ndarray, vectors: Tensor) -> np.ndarray:
    """Norms ``|H x - value x|`` of unit vectors ``(m, P)``, at one product each."""
    found = [
        torch.linalg.vector_norm((operator @ x) - value * x).item() for value, x in zip(values, vectors, strict=True)
    ]
    return np.array(found)


def _numbers(values: Any) -> list[float]:
    """A stored list of numbers, checked."""
    return [float(value) for value in values]
