"""What the scripts of loss geometry measure, and how: their settings. Nothing here needs torch."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src import training
from src.artifacts.paths import standard_experiment
from src.artifacts.store import acting_settings
from src.cli import SEED, fraction, number, option
from src.errors import ArgumentError
from src.metrics.registry import SCORES
from src.models import MODELS
from src.optimizers import OPTIMIZERS, SCHEDULES

OPERATOR_NAMES = ("hessian", "ggn")
EIGEN_MODES = ("lanczos", "power_iter")
EIGEN_SPLITS = ("train", "test")
NTK_CLASS_NAMES = ("all", "sum_logits", "true_label")
FLOAT_PRECISIONS = ("fp32", "tf32", "fp64")
"""The choices of ``--precision``: curvature in half precision is noise."""

STORAGES = {
    "full": "in the precision of computing",
    "half": "rounded to float16: half the memory",
    "host": "in main memory, where a GPU computes",
    "none": "not at all: no re-orthogonalization, more products",
}
"""The values of ``--basis``."""

EIGEN_ORDERS = {
    "largest": lambda values: -values,
    "magnitude": lambda values: -np.abs(values),
}
"""How eigenvalues are ranked, by the values of ``--eigen_order``: the first ones have the lowest keys."""

SKETCH_CHECKED = 4
"""Examples on which a sketch is compared with the exact kernel."""


class HighLow(NamedTuple):
    """``metric:low|high:fraction``: the examples with the lowest or the highest scores."""

    metric: str
    side: str
    fraction: float

    def __str__(self) -> str:
        return f"{self.metric}:{self.side}:{self.fraction:g}"


def high_low(text: str) -> HighLow:
    """The value of ``--high_low_spec``.

    Raises:
        argparse.ArgumentTypeError: It is malformed.
    """
    parts = text.split(":")
    if len(parts) != 3 or parts[1] not in ("low", "high"):
        raise argparse.ArgumentTypeError(f"{text!r} is not metric:low|high:fraction, such as mem:low:0.3")
    if parts[0] not in SCORES:
        raise argparse.ArgumentTypeError(f"{text!r}: there is no score {parts[0]!r}; choose from {', '.join(SCORES)}")
    return HighLow(parts[0], parts[1], fraction(parts[2]))


@dataclass(frozen=True)
class TrainedRunConfig:
    """Which runs of train_full.py."""

    optimizer: str = option("sgd", "optimizer in the run's name", choices=tuple(OPTIMIZERS))
    lr_sched: str | None = option(
        None, "schedule in the run's name (default: the only one there is)", choices=tuple(SCHEDULES)
    )

    def find_full_run(self, model: str, models_folder: Path, dataset: str, seed: int) -> tuple[str, dict[str, str]]:
        """The name of the run, and the flags that define it; the default schedule where there is no run.

        Raises:
            ArgumentError: Several schedules fit.
        """
        lr_sched = self.lr_sched
        if lr_sched is None:
            pattern = standard_experiment(model, dataset, self.optimizer, "*")
            found = training.find_schedules(models_folder, pattern, seed)
            if len(found) > 1:
                names = ", ".join(found)
                raise ArgumentError("lr_sched", f": runs of {len(found)} schedules fit; choose one of {names}")
            lr_sched = found[0] if found else "const"
        flags = {"model": model, "optimizer": self.optimizer, "lr_sched": lr_sched}
        return standard_experiment(model, dataset, self.optimizer, lr_sched), flags


NOT_FILE = (lambda args: args.checkpoint is None, "with --checkpoint, which names the file")
NOT_NAMED = (lambda args: args.exp is None, "with --exp, which names the run")


@dataclass(frozen=True)
class CheckpointConfig(TrainedRunConfig):
    """Which trained model: by the flags of train_full.py, by its run's name, or by its file."""

    model: str | None = option(
        None,
        f"one of {', '.join(MODELS)} (default: resnet50, or what --exp and --checkpoint contain)",
        choices=tuple(MODELS),
        metavar="NAME",
    )
    seed: int = option(1, "seed of the run", SEED, acts=NOT_FILE)
    epochs: int = option(160, "epoch whose checkpoint is read", number(int, 1), acts=NOT_FILE)
    exp: str | None = option(
        None,
        "any other run by its name, the folder under --models_folder, such as one of train_split.py or "
        "train_prune.py (default: that of train_full.py)",
        metavar="NAME",
        exclusive="run",
    )
    checkpoint: Path | None = option(None, "this very file (default: none)", Path, metavar="FILE", exclusive="run")


TRAINING_SET = (lambda args: args.eigen_split == "train", "with --eigen_split=test: it chooses training examples")
_POWER = (lambda args: args.eigen_mode == "power_iter", "without --eigen_mode=power_iter")
_LANCZOS = (lambda args: args.eigen_mode == "lanczos", "with --eigen_mode=power_iter: see --power_iterations")
_TRACE = (lambda args: args.trace_probes > 0, "with --trace_probes=0")


@dataclass(frozen=True)
class SpectrumConfig:
    """What to measure of a loss's curvature, on which examples, and how well.

    Raises:
        ArgumentError: Power iteration is asked for what it cannot do.
    """

    eigen_split: str = option("train", "the part whose loss it is", choices=EIGEN_SPLITS, title="examples")
    high_low_spec: HighLow | None = option(
        None,
        "only the training examples with the lowest or highest scores, such as mem:low:0.3 (default: all)",
        high_low,
        metavar="METRIC:low|high:FRACTION",
        acts=TRAINING_SET,
        title="examples",
    )
    batch_size: int = option(512, "examples at a time", number(int, 1), title="examples")
    operator: str = option("hessian", "the Hessian, or the Gauss-Newton matrix", choices=OPERATOR_NAMES)
    eigen_mode: str = option(
        "lanczos", "the density's own Lanczos run, or power iteration (pyhessian's; slow)", choices=EIGEN_MODES
    )
    top_n: int = option(5, "number of top eigenvalues", number(int, 1))
    eigen_order: str | None = option(
        None, "which are the top ones (default: largest; of power_iter: magnitude)", choices=tuple(EIGEN_ORDERS)
    )
    tolerance: float = option(
        1e-3,
        "relative residual at which an eigenvalue has converged; power_iter: its change in an iteration",
        number(float, 0, open_low=True),
    )
    lanczos_steps: int = option(100, "Lanczos steps of the density", number(int, 1))
    max_steps: int = option(
        300, "Lanczos steps until all eigenvalues converge, at most", number(int, 1), acts=_LANCZOS
    )
    power_iterations: int = option(100, "power iterations per eigenvalue, at most", number(int, 1), acts=_POWER)
    probes: int = option(1, "start vectors of the density", number(int, 1))
    trace_probes: int = option(100, "probes of the trace, at most", number(int, 0))
    trace_tolerance: float = option(
        0.02, "relative standard error of the trace that is good enough", number(float, 0), acts=_TRACE
    )
    probe_seed: int = option(0, "seed of all random vectors", SEED)
    basis: str = option(
        "full",
        "how the Lanczos vectors are kept; " + "; ".join(f"{name}: {what}" for name, what in STORAGES.items()),
        choices=tuple(STORAGES),
    )
    resume: bool = option(False, "continue an interrupted measurement (power iteration starts again)", title="run")
    save_every: int = option(10, "products between two saves of the state", number(int, 1), title="run")
    overwrite: bool = option(False, "replace results with different settings", title="run")

    def __post_init__(self) -> None:
        if self.eigen_mode == "power_iter" and self.operator != "hessian":
            raise ArgumentError("eigen_mode", "power_iter: supports the Hessian alone; use lanczos")
        if self.eigen_mode == "power_iter" and self.eigen_order == "largest":
            raise ArgumentError("eigen_order", "largest: power_iter finds those of largest magnitude; use lanczos")

    @property
    def order(self) -> str:
        """Which eigenvalues are the top ones, a name of ``EIGEN_ORDERS``."""
        return self.eigen_order or ("magnitude" if self.eigen_mode == "power_iter" else "largest")

    @property
    def most_steps(self) -> int:
        """Lanczos steps of the run that finds eigenvalues, at most."""
        return max(self.lanczos_steps, 0 if self.eigen_mode == "power_iter" else self.max_steps)

    def as_dict(self) -> dict[str, Any]:
        """What determines the numbers, under the names that records have for it."""
        found = asdict(self)
        for name in ("resume", "save_every", "overwrite", "eigen_order", "lanczos_steps"):
            del found[name]
        power = self.eigen_mode == "power_iter"
        found |= {
            "high_low_spec": None if self.high_low_spec is None else str(self.high_low_spec),
            "order": self.order,
            "steps": self.lanczos_steps,
            "max_steps": self.lanczos_steps if power else self.max_steps,
            "power_iterations": self.power_iterations if power else None,
        }
        return acting_settings(found)


@dataclass(frozen=True)
class SpectrumQuery:
    """Which stored spectra are drawn: one group of seeds for each optimizer and part of the examples.

    Attributes:
        folder: The folder of spectra.
        dataset_name: The data set's name in paths.
        data: What ``--dataset`` and its companions were given, for messages.
        model: The model.
    """

    folder: Path
    dataset_name: str
    data: Mapping[str, Any]
    model: str
    optimizers: list[str] = option(["sgd", "sam"], "optimizers of the runs", nargs="+", choices=tuple(OPTIMIZERS))
    lr_sched: str | None = option(
        None, "schedule of the runs (default: the only one there is)", choices=tuple(SCHEDULES)
    )
    seeds: list[int] | None = option(None, "seeds to average (default: all there are)", SEED, nargs="+")
    epochs: int | None = option(None, "epoch of the checkpoints (default: the only one there is)", number(int, 1))
    eigen_split: str = option("train", "the part whose loss it is", choices=EIGEN_SPLITS)
    high_low_specs: list[str] = option(
        ["all"],
        "the parts of the examples to compare: all, or such as mem:low:0.3",
        lambda text: text if text == "all" else str(high_low(text)),
        nargs="+",
        metavar="SPEC",
    )
    operator: str = option("hessian", "the Hessian, or the Gauss-Newton matrix", choices=OPERATOR_NAMES)
    eigen_mode: str = option("lanczos", "how top eigenvalues were found", choices=EIGEN_MODES)


_SKETCH = (lambda args: args.projection_dim is not None, "without --projection_dim: kernels are exact")


@dataclass(frozen=True)
class NtkConfig(TrainedRunConfig):
    """Which kernels: of which runs and groups of examples, and how they are computed."""

    model: str = "resnet18"

    seeds: list[int] = option([2026, 4113, 5977, 7481, 9833], "seeds of the runs", SEED, nargs="+")
    ntk_chosen_metric: str = option(
        "mem", f"the score that orders the examples, of {', '.join(SCORES)}", choices=tuple(SCORES), metavar="MODE"
    )
    m_samples: int = option(50, "examples of a group", number(int, 1))
    lower_index: list[int] | None = option(
        None,
        "ranks of the groups' first examples, from 0, the lowest score (default: the paper's, or 20 groups)",
        number(int, 0),
        nargs="+",
    )
    ntk_velocity_epoch: list[int] | None = option(
        None,
        "epochs t; checkpoints of t and t + 1 are read (default: the paper's, or 1 5 10 20)",
        number(int, 1),
        nargs="+",
    )
    ntk_classes: str = option(
        "all", "gradients of all logits, or (cheaper) their sum or the true label's alone", choices=NTK_CLASS_NAMES
    )
    projection_dim: int | None = option(
        None,
        f"numbers per gradient of a random sketch; its error on {SKETCH_CHECKED} examples is told (default: exact)",
        number(int, 1),
    )
    projection_seed: int = option(0, "seed of the sketch", SEED, acts=_SKETCH)
    memory_mb: float = option(2048.0, "MiB kept of a group's examples", number(float, 0, open_low=True))
    keep_kernels: bool = option(True, "store the kernels; otherwise the velocities alone", negatable=True)
    overwrite: bool = option(False, "replace results with different settings")
