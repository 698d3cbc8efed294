"""Empirical neural tangent kernels of groups of examples, and how fast they change during training.

Row ``i C + c`` of the Jacobian ``Psi_t`` is the gradient of logit c of example i with respect to all parameters at
epoch t. The kernel is ``K_t = Psi_t Psi_t^T``, and its velocity is ``1 - <K_t, K_t+1> / (|K_t| |K_t+1|)``.

Source: Fort et al. 2020, "Deep learning versus kernel learning", Eq. 5; Paul et al. 2021 for groups of examples.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from src.artifacts.io import file_digest, label_hash, read_checkpoint, read_pickle, require_writable
from src.artifacts.locks import lock
from src.artifacts.paths import kernel_path, ntk_folder, ntk_run, ntk_run_folder, velocity_path
from src.artifacts.store import check_consistent, checked_array, load_result, read_record, record_path, write_recorded
from src.context import RunContext
from src.curvature.config import SKETCH_CHECKED, NtkConfig
from src.devices import available_memory
from src.errors import ArgumentError, FileError
from src.formatting import duration, gib
from src.jacobians import gram_matrix, sketch_jacobian
from src.jacobians.engine import Quantities
from src.jacobians.gram import Plan, make_plan, work
from src.jacobians.variances import logit_rows
from src.training import image_facts, training_facts

log = logging.getLogger(__name__)


NTK_CLASSES: dict[str, Quantities] = {
    "all": logit_rows,
    "sum_logits": lambda outputs, _: outputs.sum(1),
    "true_label": lambda outputs, labels: outputs.gather(1, labels[:, None])[:, 0],
}
"""What is differentiated: all logits (exact), or one value per example (1/C of the time, 1/C^2 of the memory)."""

VELOCITY_EPOCHS: Mapping[str, tuple[int, ...]] = {
    "cifar10": (1, 5, 10, 20, 50),
    "cifar100": (10, 40, 70, 100, 150),
    "svhn": (1, 5, 10, 20),
}
"""The paper's epochs; other data sets use those of svhn."""

_LOWER_INDICES = {
    "cifar100": (
        0, 1000, 2500, 5000, 7500, 10000, 15000, 20000, 25000, 30000, 35000, 40000, 45000, 47500, 49000, 49500,
    ),
}  # fmt: skip

GROUPS = 20
"""Number of groups for data sets without ranks from the paper."""


def lower_indices(dataset: str, n: int, size: int) -> list[int]:
    """Default start ranks of the groups of ``size`` examples, in score order.

    The paper's ranks if it has some for this data set and there are enough examples; otherwise every ``n // 20``-th
    rank from 0. Groups that would not be full are left out.

    Args:
        dataset: The data set's name.
        n: Number of scored examples.
        size: m, examples per group.
    """
    named = _LOWER_INDICES.get(dataset, ())
    ranks = named if named and named[-1] < n else range(0, n, max(n // GROUPS, 1))
    return [rank for rank in ranks if rank + size <= n]


def ntk_kernel(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    classes: str = "all",
    *,
    projection_dim: int | None = None,
    seed: int = 0,
    memory_mb: float = 2048.0,
) -> np.ndarray:
    """Compute the kernel of some examples without forming the matrix Psi.

    Args:
        model: The model, evaluated in eval mode and restored afterwards; all trainable parameters count.
        images: (m, ...) inputs, preprocessed as in training, un-augmented.
        labels: (m,).
        classes: A name in ``NTK_CLASSES``.
        projection_dim: Size of a random sketch of each row of Psi; None for the exact kernel.
        seed: Seed of the sketch.
        memory_mb: Memory limit for intermediate values of the examples, in MiB.

    Returns:
        float32 (m C, m C) for all classes, otherwise (m, m).

    Raises:
        ValueError: The model mixes the examples of a batch (see ``gram_matrix``), or its outputs are not (b, C).
    """
    quantities = NTK_CLASSES[classes]
    if projection_dim is None:
        found = gram_matrix(model, images, quantities, labels, memory_mb=memory_mb)
    else:
        rows = sketch_jacobian(model, images, quantities, labels, projection_dim, seed)
        found = rows @ rows.mT
    return found.to("cpu", torch.float32).numpy()


def velocity(first: np.ndarray, second: np.ndarray) -> float:
    """``1 - <K, K'>_F / (|K|_F |K'|_F)``: 0 if the kernels differ only in scale, at most 1 for kernels.

    Args:
        first: K, (N, N).
        second: K', (N, N).

    Raises:
        ValueError: The shapes differ, or a kernel is zero or not finite.
    """
    if first.shape != second.shape:
        raise ValueError(f"kernels of shapes {first.shape} and {second.shape} cannot be compared")
    sums = np.zeros(3)
    for rows, others in zip(first, second, strict=True):  # row by row, to avoid a float64 copy of a large kernel
        a, b = rows.astype(np.float64), others.astype(np.float64)
        sums += a @ b, a @ a, b @ b
    if not np.isfinite(sums).all() or sums[1] <= 0 or sums[2] <= 0:
        raise ValueError("a kernel is zero or not finite")
    return float(np.clip(1.0 - sums[0] / np.sqrt(sums[1] * sums[2]), 0.0, 1.0))


def relative_error(exact: np.ndarray, found: np.ndarray) -> float:
    """``|found - exact|_F / |exact|_F``."""
    return float(np.linalg.norm(found.astype(np.float64) - exact) / np.linalg.norm(exact.astype(np.float64)))


def check_groups(lowers: Sequence[int], size: int, n: int) -> None:
    """Refuse incomplete groups.

    Args:
        lowers: Ranks of their first examples.
        size: m, examples per group.
        n: Number of scored examples.

    Raises:
        ArgumentError: A group is incomplete.
    """
    if size > n:
        raise ArgumentError("m_samples", f"{size}: exceeds the {n} scored examples; use at most {n}")
    beyond = [lower for lower in lowers if lower + size > n]
    if beyond:
        raise ArgumentError(
            "lower_index",
            f"{beyond[0]}: a group of {size} examples from this rank exceeds the {n} scored examples; use ranks "
            f"up to {n - size}, or a smaller --m_samples",
        )


_TRIED = 4  # examples in the larger of two trials


@dataclass(frozen=True)
class Forecast:
    """The estimated cost of one kernel.

    Attributes:
        rows: Rows of the kernel.
        kernel_bytes: Memory of the kernel and of the other epoch's kernel.
        kept_bytes: Memory of intermediate values of the examples.
        psi_bytes: Size of the matrix Psi, which is never formed.
        seconds: Extrapolated time.
    """

    rows: int
    kernel_bytes: int
    kept_bytes: int
    psi_bytes: int
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """Memory in addition to the model and the data."""
        return self.kernel_bytes + self.kept_bytes


def kernel_bytes(rows: int) -> int:
    """Memory of two float32 kernels with this many rows."""
    return rows * rows * (4 + 4)


def forecast(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    size: int,
    classes: str,
    *,
    projection_dim: int | None,
    memory_mb: float,
) -> Forecast:
    """Time the kernel of one example and of a few, and extrapolate.

    Args:
        model: The model.
        images: (n, ...) some examples.
        labels: (n,).
        size: m, examples of the planned kernel.
        classes: A name in ``NTK_CLASSES``.
        projection_dim: See ``ntk_kernel``.
        memory_mb: See ``ntk_kernel``.
    """

    def plan(n: int) -> Plan:
        like = images[:1].expand(n, *images.shape[1:])
        return make_plan(model, like, NTK_CLASSES[classes], labels[:1].expand(n), memory_mb)

    def multiplications(n: int) -> float:
        if projection_dim is not None:  # a sketch does not compare pairs
            return float(n)
        meant = plan(n)
        return sum(sum(work(meant, band, n)) for band in meant.bands)

    def trial(n: int) -> float:
        started = time.perf_counter()
        ntk_kernel(model, images[:n], labels[:n], classes, projection_dim=projection_dim, memory_mb=memory_mb)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - started

    few = min(_TRIED, size, len(images))
    trial(1)  # warm up: the first call includes one-time setup
    times, works = (trial(1), trial(few)), (multiplications(1), multiplications(few))
    per_work = max(times[1] - times[0], 0.0) / (works[1] - works[0]) if few > 1 else times[0] / works[0]
    at_start = max(times[0] - per_work * works[0], 0.0)
    chosen = plan(size)
    q, element = chosen.quantities, chosen.dtype.itemsize
    numbers = [chosen.numbers(shape) for shape in chosen.shapes.values()]
    kept = min(size * sum(numbers), max(chosen.limit, 2 * max(numbers))) * element  # at least two examples
    if projection_dim is not None:
        kept = size * q * projection_dim * element
    return Forecast(
        rows=size * q,
        kernel_bytes=kernel_bytes(size * q),
        kept_bytes=int(kept),
        psi_bytes=size * q * sum(shape.numbers for shape in chosen.shapes.values()) * element,
        seconds=at_start + per_work * multiplications(size),
    )


# ---------------------------------------------------------------------------------- kernels and velocities of runs

_KEPT_BYTES = 2**31  # total size of checkpoints kept in memory after the first read


class KernelVelocities:
    """Kernels and velocities of the groups of several runs, loaded from files or computed and stored.

    Args:
        config: Which kernels to compute.
        context: Device, precision and data.
        models_folder: The folder of checkpoints.
        folder: The folder of kernels.
        ranked: Indices in score order.
        scores: All scores by index.

    Attributes:
        epochs: The epochs t.
        lowers: Ranks of the groups' first examples.
        seeds: The seeds.

    Raises:
        ArgumentError: A group is incomplete, or several schedules match.
        FileError: A checkpoint is missing, or the runs were trained with different settings.
    """

    def __init__(
        self,
        config: NtkConfig,
        context: RunContext,
        models_folder: Path,
        folder: Path,
        ranked: np.ndarray,
        scores: np.ndarray,
    ) -> None:
        self.config, self.context, self.ranked, self.scores = config, context, ranked, scores
        name = context.entry.name
        self.lowers = sorted(set(config.lower_index or lower_indices(name, len(ranked), config.m_samples)))
        check_groups(self.lowers, config.m_samples, len(ranked))
        if config.checkpoint is not None:
            self.seeds, self.epochs = [0], [0]
            self.paths = {(0, i): path for i, path in enumerate(config.checkpoint)}
            run = f"{config.model}_checkpoints"
        else:
            self.seeds = list(dict.fromkeys(config.seeds))
            self.epochs = sorted(set(config.ntk_velocity_epoch or VELOCITY_EPOCHS.get(name, VELOCITY_EPOCHS["svhn"])))
            experiment, flags = config.find_full_run(config.model, models_folder, name, self.seeds[0])
            self._expected = {**flags, "validation_split": None}
            wanted = sorted({e for t in self.epochs for e in (t, t + 1)})
            self.paths = {
                (seed, epoch): path
                for seed in self.seeds
                for epoch, path in context.find_checkpoints(models_folder, experiment, seed, wanted, **flags).items()
            }
            run = ntk_run(**flags)
        self._read_checkpoints()
        self._where = (folder, name, run, config.ntk_chosen_metric)
        self.common = {
            "dataset": name,
            "labels": context.label_hash,
            **image_facts(context.full_train),
            "subset": context.data_settings["subset"],
            "m_samples": config.m_samples,
            "ntk_classes": config.ntk_classes,
            "projection_dim": config.projection_dim,
            "projection_seed": config.projection_seed if config.projection_dim is not None else None,
            "precision": context.compute.precision,
        }
        require_writable(folder)
        self._load = lru_cache(maxsize=2)(
            self._load_model
        )  # a velocity needs two models; consecutive velocities share one
        self._announced = False
        self._sketch_error: float | None = None

    def _read_checkpoints(self) -> None:
        """Read every checkpoint once: its digest, its training settings, and its weights up to a memory limit."""
        self._digests, self._states, facts, kept = {}, {}, [], 0
        for key, path in self.paths.items():
            self._digests[key] = file_digest(path)
            if self.config.checkpoint is not None:
                continue
            state = read_checkpoint(path)
            settings = state.get("settings")
            facts.append((path, training_facts(settings if isinstance(settings, dict) else {})))
            kept += path.stat().st_size
            if kept <= _KEPT_BYTES:
                self._states[key] = state
        if self.config.checkpoint is not None:  # the digests identify them, and they need not be of one run
            self.training: dict[str, Any] = {}
            return
        check_consistent(
            facts,
            what="was trained with different settings than",
            remedy="train all seeds with the same settings, or choose others",
        )
        self.training = facts[0][1]

    def compute(self) -> dict[int, np.ndarray]:
        """Compute the velocities of all groups by epoch, ``(seeds, groups)``; each is stored once computed."""
        found: dict[int, list[list[float]]] = {epoch: [] for epoch in self.epochs}
        total = len(self.seeds) * len(self.epochs) * len(self.lowers)
        with tqdm(total=total, unit="velocity", disable=None) as bar:
            for seed in self.seeds:
                for epoch in self.epochs:
                    found[epoch].append(self._velocities(seed, epoch, bar))
        return {epoch: np.array(values) for epoch, values in found.items()}

    def folder(self, seed: int, epoch: int) -> Path:
        """The folder of one seed's kernels at an epoch and velocities from it to the next, or those of files."""
        if self.config.checkpoint is not None:
            names = [self._digests[key][:8] for key in self.paths]
            return ntk_run_folder(*self._where) / f"checkpoints_{'_'.join(names)}" / f"file_{epoch + 1}"
        return ntk_folder(*self._where, epoch, seed)

    def _velocities(self, seed: int, epoch: int, bar: tqdm) -> list[float]:
        """The velocities of all groups between an epoch and the next one."""
        path = velocity_path(self.folder(seed, epoch))
        settings = {
            **self.common,
            "metric": self.config.ntk_chosen_metric,
            "training": self.training,
            "ranking": label_hash(self.ranked),
            "checkpoints": [self._digests[seed, epoch], self._digests[seed, epoch + 1]],
        }
        overwrite = self.config.overwrite
        groups = stored_groups(path, settings, overwrite)
        for lower in self.lowers:
            if str(lower) not in groups:
                started = time.perf_counter()
                kernels = [self._kernel(seed, e, lower) for e in (epoch, epoch + 1)]
                try:
                    found = velocity(*kernels)
                except ValueError as error:
                    raise FileError(f"{self.paths[seed, epoch]}: {error}; retrain the model") from error
                chosen = self.scores[self._group(lower)]
                group = {
                    "velocity": found,
                    "mean_score": float(chosen.mean()),
                    "percentile": 100 * (lower + len(chosen) / 2) / len(self.ranked),
                    "seconds": time.perf_counter() - started,
                    "sketch_error": self._sketch_error,
                }
                groups = add_groups(path, settings, {str(lower): group}, overwrite)
            bar.update()
        if not path.exists():  # an earlier run was interrupted after writing the json record
            add_groups(path, settings, {}, overwrite)
        return [groups[str(lower)]["velocity"] for lower in self.lowers]

    def _group(self, lower: int) -> np.ndarray:
        """The indices of a group's examples."""
        return self.ranked[lower : lower + self.config.m_samples]

    def _kernel(self, seed: int, epoch: int, lower: int) -> np.ndarray:
        """Load or compute a group's kernel; a computed one is stored if kernels are kept."""
        indices, source = self._group(lower), self.paths[seed, epoch]
        path = kernel_path(self.folder(seed, epoch), lower, self.config.m_samples)
        settings = {**self.common, "indices": label_hash(indices), "checkpoint": self._digests[seed, epoch]}
        if load_result(path, settings, overwrite=self.config.overwrite) is not None:
            return read_kernel(path, len(indices) * self._rows_per_example)
        model, state = self._load(seed, epoch)
        images = self.context.full_train.subset(torch.from_numpy(indices))
        batch = next(iter(self.context.batches(images, len(indices), normalization=state["normalisation"])))
        if not self._announced:
            self._announce(source, model, batch.images, batch.labels)
        started = time.perf_counter()
        kernel = self._compute(model, batch.images, batch.labels)
        if not np.isfinite(kernel).all():
            raise FileError(f"{source}: its kernel is not finite; retrain the model with a lower --learning_rate")
        if self.config.keep_kernels:
            facts = {"seconds": time.perf_counter() - started, "example_indices": indices.tolist()}
            write_recorded(path, kernel, {"settings": settings, **facts})
        return kernel

    @property
    def _rows_per_example(self) -> int:
        return self.context.entry.num_classes if self.config.ntk_classes == "all" else 1

    def _compute(self, model: nn.Module, images: Tensor, labels: Tensor, *, exact: bool = False) -> np.ndarray:
        """Compute the kernel as configured, or the exact one."""
        config = self.config
        return ntk_kernel(
            model,
            images,
            labels,
            config.ntk_classes,
            projection_dim=None if exact else config.projection_dim,
            seed=config.projection_seed,
            memory_mb=config.memory_mb,
        )

    def _load_model(self, seed: int, epoch: int) -> tuple[nn.Module, dict[str, Any]]:
        """Load a model and its checkpoint's metadata."""
        if self.config.checkpoint is not None:
            return self.context.load_file(self.paths[seed, epoch], self.config.model)
        path, state = self.paths[seed, epoch], self._states.pop((seed, epoch), None)
        model, state = self.context.load_model(path, state, **self._expected, seed=seed, epoch=epoch)
        trained_on = state["settings"].get("subset")
        if trained_on is not None and trained_on != self.common["subset"]:
            raise FileError(f"{path}: was trained on a subset of the data; use the same --subset and --exclude")
        return model, state

    def _announce(self, path: Path, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Log the cost of a kernel and the error of a sketch; refuse a kernel that does not fit in memory.

        Args:
            path: The model's checkpoint, for messages.
            model: The model used for the estimate.
            images: A group's images.
            labels: Their labels.

        Raises:
            ArgumentError: The kernel does not fit in memory; the message names cheaper options.
        """
        config, self._announced = self.config, True
        free = available_memory(self.context.device)
        size, per_example = len(images), self._rows_per_example
        least = kernel_bytes(size * per_example)
        if free is not None and least > free:
            fits = int((free / kernel_bytes(1)) ** 0.5 // per_example)
            cheaper = f"--ntk_classes=true_label or sum_logits ({gib(kernel_bytes(size))}), or "
            raise ArgumentError(
                "m_samples",
                f"{size}: a kernel with {size * per_example} rows takes {gib(least)}, but {gib(free)} are free; use "
                f"{cheaper if per_example > 1 else ''}--m_samples={max(fits // 2, 1)}",
            )
        try:
            cost = forecast(model, images, labels, size, config.ntk_classes, projection_dim=config.projection_dim,
                            memory_mb=config.memory_mb)  # fmt: skip
        except ValueError as error:
            raise FileError(f"{path}: {error}") from error
        log.info(
            "a kernel of %d examples has %d rows and takes about %s and %s (Psi, never formed, would take %s)",
            size, cost.rows, gib(cost.peak_bytes), duration(cost.seconds), gib(cost.psi_bytes),
        )  # fmt: skip
        if config.keep_kernels:
            on_disk = 4 * cost.rows**2
            every = len(self.paths) * len(self.lowers) * on_disk
            log.info("kernels take %s on disk, %s each", gib(every), gib(on_disk))
        if free is not None and cost.peak_bytes > free:
            log.warning(
                "only %s are free; use a smaller --memory_mb or --m_samples, or --ntk_classes=true_label", gib(free)
            )
        if config.projection_dim is not None:
            few = slice(0, SKETCH_CHECKED)
            exact = self._compute(model, images[few], labels[few], exact=True)
            self._sketch_error = relative_error(exact, self._compute(model, images[few], labels[few]))
            log.info(
                "sketch of size %d: relative error %.2g of the kernel's norm (measured on %d examples)",
                config.projection_dim, self._sketch_error, len(images[few]),
            )  # fmt: skip


def read_kernel(path: Path, rows: int) -> np.ndarray:
    """Read a stored float32 kernel with this many rows.

    Raises:
        FileError: It is damaged, not finite, or has a different shape.
    """
    remedy = "remove it and run the script again"
    found = checked_array(path, {"kernel": read_pickle(path)}, "kernel", 2, kinds="f", length=rows, remedy=remedy)
    if found.shape != (rows, rows):
        raise FileError(f"{path}: is not a kernel with {rows} rows; {remedy}")
    return found


def stored_groups(path: Path, settings: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
    """The groups with velocities stored under these settings, by rank; may be empty.

    The json record is authoritative: the pickle is made from it, and an interruption may leave only the json.

    Raises:
        FileError: The stored velocities are damaged or have different settings, and may not be replaced.
    """

    def read(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
        record = read_record(path)
        groups = record.get("groups", {})
        try:
            right = all(
                lower.isdecimal() and isinstance(group["velocity"], float) and math.isfinite(group["velocity"])
                for lower, group in groups.items()
            )
        except (AttributeError, TypeError, LookupError):
            right = False
        if not right:
            raise FileError(f"{record_path(path)}: does not contain valid velocities")
        return groups, record.get("settings")

    return load_result(path if path.exists() else record_path(path), settings, read, overwrite=overwrite) or {}


def add_groups(
    path: Path, settings: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]], overwrite: bool
) -> dict[str, Any]:
    """Add groups to the stored velocities of these settings; a lock serializes processes that add other groups.

    Returns:
        All stored groups, in the form of ``stored_groups``.
    """
    with lock(path.with_suffix(".lock"), "writing velocities", wait=True):
        stored = {**stored_groups(path, settings, overwrite), **groups}
        velocities = {lower: stored[str(lower)]["velocity"] for lower in sorted(map(int, stored))}
        write_recorded(path, velocities, {"settings": dict(settings), "groups": stored})
    return stored
