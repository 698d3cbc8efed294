"""The files of a measured spectrum: the pickle of the papers' plotting code, and beside it the record."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.artifacts import read_json, read_pickle, refuse_other_settings, write_json, write_pickle
from src.curvature.choices import OPERATOR_NAMES
from src.errors import FileError

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
    from src.curvature.trace import mean_and_error
    from src.curvature.tridiagonal import Ritz

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
