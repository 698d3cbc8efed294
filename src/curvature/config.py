"""Settings of the loss-geometry scripts. This module does not import torch."""

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
from src.metrics.registry import SCORES, score_name
from src.models import model_option
from src.optimizers import OPTIMIZERS, SCHEDULES

OPERATOR_NAMES = ("hessian", "ggn")
EIGEN_MODES = ("lanczos", "power_iter")
EIGEN_SPLITS = ("train", "test")
NTK_CLASS_NAMES = ("all", "sum_logits", "true_label")
FLOAT_PRECISIONS = ("fp32", "tf32", "fp64")
"""The choices of ``--precision``. Half precision is excluded because curvature would be mostly rounding noise."""

STORAGES = {
    "full": "in compute precision",
    "half": "rounded to float16, which halves the memory",
    "host": "in CPU memory, while a GPU computes",
    "none": "not stored: no re-orthogonalization, more products",
}
"""The values of ``--basis``."""

EIGEN_ORDERS = {
    "largest": lambda values: -values,
    "magnitude": lambda values: -np.abs(values),
}
"""Sort keys of eigenvalues for each value of ``--eigen_order``; the top eigenvalues have the lowest keys."""

SKETCH_CHECKED = 4
"""Number of examples on which a sketch is compared with the exact kernel."""


class HighLow(NamedTuple):
    """``metric:low|high:fraction``: the examples with the lowest or highest scores."""

    metric: str
    side: str
    fraction: float

    def __str__(self) -> str:
        return f"{self.metric}:{self.side}:{self.fraction:g}"


def high_low(text: str) -> HighLow:
    """Parse the value of ``--high_low_spec``.

    Raises:
        argparse.ArgumentTypeError: The text is malformed.
    """
    parts = text.split(":")
    if len(parts) != 3 or parts[1] not in ("low", "high"):
        raise argparse.ArgumentTypeError(f"{text!r} is not metric:low|high:fraction, such as mem:low:0.3")
    return HighLow(score_name(parts[0]), parts[1], fraction(parts[2]))


@dataclass(frozen=True)
class TrainedRunConfig:
    """Identifies runs of train_full.py."""

    optimizer: str = option("sgd", "optimizer in the run's name", choices=tuple(OPTIMIZERS))
    lr_sched: str | None = option(
        None, "schedule in the run's name (default: the only one found)", choices=tuple(SCHEDULES)
    )

    def find_full_run(self, model: str, models_folder: Path, dataset: str, seed: int) -> tuple[str, dict[str, str]]:
        """Return the run's name and the flags that define it; uses the default schedule if no run exists.

        Raises:
            ArgumentError: Runs with several schedules match.
        """
        lr_sched = self.lr_sched
        if lr_sched is None:
            pattern = standard_experiment(model, dataset, self.optimizer, "*")
            found = training.find_schedules(models_folder, pattern, seed)
            if len(found) > 1:
                names = ", ".join(found)
                raise ArgumentError("lr_sched", f": found runs with {len(found)} schedules; choose one of {names}")
            lr_sched = found[0] if found else "const"
        flags = {"model": model, "optimizer": self.optimizer, "lr_sched": lr_sched}
        return standard_experiment(model, dataset, self.optimizer, lr_sched), flags


NOT_FILE = (lambda args: args.checkpoint is None, "with --checkpoint, which names the model's file")
NOT_NAMED = (lambda args: args.exp is None, "with --exp, which names the run")


@dataclass(frozen=True)
class CheckpointConfig(TrainedRunConfig):
    """Identifies a trained model by the flags of train_full.py, by its run's name, or by its checkpoint file."""

    model: str | None = model_option(None, " (default: resnet50, or the model of --exp or --checkpoint)")
    seed: int = option(1, "seed of the run", SEED, acts=NOT_FILE)
    epochs: int = option(160, "epoch of the checkpoint", number(int, 1), acts=NOT_FILE)
    exp: str | None = option(
        None,
        "name of any other run, a folder under --models_folder, such as one from train_split.py or train_prune.py "
        "(default: the run of train_full.py)",
        metavar="NAME",
        exclusive="run",
    )
    checkpoint: Path | None = option(
        None,
        "checkpoint file, or with --model any state dict of that model (default: none)",
        Path,
        metavar="FILE",
        exclusive="run",
    )


TRAINING_SET = (lambda args: args.eigen_split == "train", "with --eigen_split=test: it selects training examples")
_POWER = (lambda args: args.eigen_mode == "power_iter", "without --eigen_mode=power_iter")
_LANCZOS = (lambda args: args.eigen_mode == "lanczos", "with --eigen_mode=power_iter: see --power_iterations")
_TRACE = (lambda args: args.trace_probes > 0, "with --trace_probes=0")


@dataclass(frozen=True)
class SpectrumConfig:
    """What to measure of a loss's curvature, on which examples, and how accurately.

    Raises:
        ArgumentError: An option is not supported by power iteration.
    """

    eigen_split: str = option("train", "split whose loss is measured", choices=EIGEN_SPLITS, title="examples")
    high_low_spec: HighLow | None = option(
        None,
        "only the training examples with the lowest or highest scores, such as mem:low:0.3 (default: all)",
        high_low,
        metavar="METRIC:low|high:FRACTION",
        acts=TRAINING_SET,
        title="examples",
    )
    batch_size: int = option(512, "examples per batch", number(int, 1), title="examples")
    operator: str = option("hessian", "Hessian or Gauss-Newton matrix (ggn)", choices=OPERATOR_NAMES)
    eigen_mode: str = option(
        "lanczos", "the density's own Lanczos run, or power iteration (pyhessian, slow)", choices=EIGEN_MODES
    )
    top_n: int = option(5, "number of top eigenvalues", number(int, 1))
    eigen_order: str | None = option(
        None, "order of the top eigenvalues (default: largest; power_iter: magnitude)", choices=tuple(EIGEN_ORDERS)
    )
    tolerance: float = option(
        1e-3,
        "relative residual at which an eigenvalue has converged; power_iter: its relative change per iteration",
        number(float, 0, open_low=True),
    )
    lanczos_steps: int = option(100, "Lanczos steps for the density", number(int, 1))
    max_steps: int = option(
        300, "maximum Lanczos steps until all eigenvalues converge", number(int, 1), acts=_LANCZOS
    )
    power_iterations: int = option(100, "maximum power iterations per eigenvalue", number(int, 1), acts=_POWER)
    probes: int = option(1, "start vectors for the density", number(int, 1))
    trace_probes: int = option(100, "maximum number of probes for the trace", number(int, 0))
    trace_tolerance: float = option(
        0.02, "relative standard error at which the trace has converged", number(float, 0), acts=_TRACE
    )
    probe_seed: int = option(0, "seed of all random vectors", SEED)
    basis: str = option(
        "full",
        "how to store the Lanczos vectors; " + "; ".join(f"{name}: {what}" for name, what in STORAGES.items()),
        choices=tuple(STORAGES),
    )
    resume: bool = option(False, "continue an interrupted measurement (power iteration starts over)", title="run")
    save_every: int = option(10, "products between saves of the state", number(int, 1), title="run")
    overwrite: bool = option(False, "replace results with different settings", title="run")

    def __post_init__(self) -> None:
        if self.eigen_mode == "power_iter" and self.operator != "hessian":
            raise ArgumentError("eigen_mode", "power_iter: supports only the Hessian; use lanczos")
        if self.eigen_mode == "power_iter" and self.eigen_order == "largest":
            raise ArgumentError("eigen_order", "largest: power_iter finds the largest magnitudes; use lanczos")

    @property
    def order(self) -> str:
        """The order of the top eigenvalues, a name in ``EIGEN_ORDERS``."""
        return self.eigen_order or ("magnitude" if self.eigen_mode == "power_iter" else "largest")

    @property
    def most_steps(self) -> int:
        """The maximum number of Lanczos steps of the run that finds eigenvalues."""
        return max(self.lanczos_steps, 0 if self.eigen_mode == "power_iter" else self.max_steps)

    def as_dict(self) -> dict[str, Any]:
        """The settings that determine the numbers, under the names used in records."""
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
    """Which stored spectra to draw: one group of seeds for each optimizer and subset of examples.

    Attributes:
        folder: The folder of spectra.
        dataset_name: The data set's name in paths.
        data: Values of ``--dataset`` and related flags, for messages.
        model: The model.
    """

    folder: Path
    dataset_name: str
    data: Mapping[str, Any]
    model: str
    optimizers: list[str] = option(["sgd", "sam"], "optimizers of the runs", nargs="+", choices=tuple(OPTIMIZERS))
    lr_sched: str | None = option(
        None, "schedule of the runs (default: the only one found)", choices=tuple(SCHEDULES)
    )
    seeds: list[int] | None = option(None, "seeds to average (default: all found)", SEED, nargs="+")
    epochs: int | None = option(None, "epoch of the checkpoints (default: the only one found)", number(int, 1))
    eigen_split: str = option("train", "split whose loss was measured", choices=EIGEN_SPLITS)
    high_low_specs: list[str] = option(
        ["all"],
        "subsets of examples to compare: all, or a spec such as mem:low:0.3",
        lambda text: text if text == "all" else str(high_low(text)),
        nargs="+",
        metavar="SPEC",
    )
    operator: str = option("hessian", "Hessian or Gauss-Newton matrix (ggn)", choices=OPERATOR_NAMES)
    eigen_mode: str = option("lanczos", "how the top eigenvalues were computed", choices=EIGEN_MODES)


_SKETCH = (lambda args: args.projection_dim is not None, "without --projection_dim: kernels are exact")


@dataclass(frozen=True)
class NtkConfig(TrainedRunConfig):
    """Which kernels to compute, from which runs and groups of examples, and how."""

    model: str = "resnet18"

    seeds: list[int] = option([2026, 4113, 5977, 7481, 9833], "seeds of the runs", SEED, nargs="+", acts=NOT_FILE)
    checkpoint: list[Path] | None = option(
        None,
        "two files to measure the velocity between, checkpoints or state dicts of the model (default: the runs of "
        "train_full.py)",
        Path,
        nargs=2,
        metavar="FILE",
    )
    ntk_chosen_metric: str = option(
        "mem",
        f"score that orders the examples: {', '.join(SCORES)}, or a registered one",
        score_name,
        metavar="MODE",
    )
    m_samples: int = option(50, "examples per group", number(int, 1))
    lower_index: list[int] | None = option(
        None,
        "rank of each group's first example; 0 is the lowest score (default: the paper's ranks, or 20 groups)",
        number(int, 0),
        nargs="+",
    )
    ntk_velocity_epoch: list[int] | None = option(
        None,
        "epochs t; reads the checkpoints of t and t + 1 (default: the paper's, or 1 5 10 20)",
        number(int, 1),
        nargs="+",
        acts=NOT_FILE,
    )
    ntk_classes: str = option(
        "all",
        "gradients of all logits; cheaper: of their sum (sum_logits) or of the true label's logit (true_label)",
        choices=NTK_CLASS_NAMES,
    )
    projection_dim: int | None = option(
        None,
        f"size of a random sketch of each gradient; logs its error on {SKETCH_CHECKED} examples (default: exact)",
        number(int, 1),
    )
    projection_seed: int = option(0, "seed of the sketch", SEED, acts=_SKETCH)
    memory_mb: float = option(
        2048.0, "memory limit for intermediate values of a group, in MiB", number(float, 0, open_low=True)
    )
    keep_kernels: bool = option(True, "store the kernels, not only the velocities", negatable=True)
    overwrite: bool = option(False, "replace results with different settings")
