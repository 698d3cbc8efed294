"""Empirical neural tangent kernels of groups of examples, and how fast they turn during training.

Row ``i C + c`` of the Jacobian ``Psi_t`` is the gradient of logit c of example i with respect to all parameters, at
epoch t; the kernel is ``K_t = Psi_t Psi_t^T``, and its velocity ``1 - <K_t, K_t+1> / (|K_t| |K_t+1|)``.

Source: Fort et al. 2020, "Deep learning versus kernel learning", Eq. 5; Paul et al. 2021 for groups of examples.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from src.curvature.choices import NTK_CLASS_NAMES
from src.jacobians import gram_matrix, sketch_jacobian
from src.jacobians.engine import Quantities
from src.jacobians.gram import make_plan, work
from src.jacobians.variances import logit_rows


def _sum_of_logits(outputs: Tensor, _: Tensor) -> Tensor:
    return outputs.sum(1)


def _own_logit(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs.gather(1, labels[:, None])[:, 0]


NTK_CLASSES: dict[str, Quantities] = dict(zip(NTK_CLASS_NAMES, (logit_rows, _sum_of_logits, _own_logit), strict=True))
"""What is differentiated: all logits (exact), or one number per example, C times as cheap in time, C^2 in memory."""

VELOCITY_EPOCHS: Mapping[str, tuple[int, ...]] = {
    "cifar10": (1, 5, 10, 20, 50),
    "cifar100": (10, 40, 70, 100, 150),
    "svhn": (1, 5, 10, 20),
}
"""The paper's epochs; other data sets take those of svhn."""

_LOWER_INDICES = {
    "cifar100": (
        0, 1000, 2500, 5000, 7500, 10000, 15000, 20000, 25000, 30000, 35000, 40000, 45000, 47500, 49000, 49500,
    ),
}  # fmt: skip

GROUPS = 20
"""Groups of a data set for which the paper names none."""


def velocity_epochs(dataset: str) -> tuple[int, ...]:
    """The epochs at which the velocity of a data set is taken by default."""
    return VELOCITY_EPOCHS.get(dataset, VELOCITY_EPOCHS["svhn"])


def lower_indices(dataset: str, n: int, size: int) -> list[int]:
    """Where the groups of ``size`` examples start in the order of the scores, by default.

    The paper's places where it names some and ``n`` examples have them; else every ``n // 20``-th from 0. Groups that
    would not be whole are left out.

    Args:
        dataset: The data set's name.
        n: Scored examples.
        size: m, examples of a group.
    """
    named = _LOWER_INDICES.get(dataset, ())
    places = named if named and named[-1] < n else range(0, n, max(n // GROUPS, 1))
    return [place for place in places if place + size <= n]


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
    """The kernel of some examples; the matrix Psi is never formed.

    Args:
        model: The network, evaluated in eval mode and left as it was; all trainable parameters count.
        images: (m, ...) inputs as the network saw them in training, un-augmented.
        labels: (m,).
        classes: A name of ``NTK_CLASSES``.
        projection_dim: Numbers to which each row of Psi is reduced by a random sketch; None for the exact kernel.
        seed: Seed of the sketch.
        memory_mb: MiB that what is kept of the examples may take.

    Returns:
        float32 (m C, m C) for all classes, else (m, m).

    Raises:
        ValueError: The network mixes the examples of a batch (see ``gram_matrix``), or its outputs are not (b, C).
    """
    quantities = NTK_CLASSES[classes]
    if projection_dim is None:
        found = gram_matrix(model, images, quantities, labels, memory_mb=memory_mb)
    else:
        rows = sketch_jacobian(model, images, quantities, labels, projection_dim, seed)
        found = rows @ rows.mT
    return found.to("cpu", torch.float32).numpy()


def velocity(first: np.ndarray, second: np.ndarray) -> float:
    """``1 - <K, K'>_F / (|K|_F |K'|_F)``: 0 where the kernel only grew or shrank, at most 1 for kernels.

    Args:
        first: K, (N, N).
        second: K', (N, N).

    Raises:
        ValueError: The shapes differ, a kernel is not finite, or all of it is zero.
    """
    if first.shape != second.shape:
        raise ValueError(f"kernels of shapes {first.shape} and {second.shape} cannot be compared")
    sums = [0.0, 0.0, 0.0]
    for rows, others in zip(first, second, strict=True):  # row by row: no copy of a large kernel in float64
        a, b = rows.astype(np.float64), others.astype(np.float64)
        for place, value in enumerate((a @ b, a @ a, b @ b)):
            sums[place] += value
    if not np.isfinite(sums).all() or sums[1] <= 0 or sums[2] <= 0:
        raise ValueError("a kernel is zero or not finite")
    return float(np.clip(1.0 - sums[0] / np.sqrt(sums[1] * sums[2]), 0.0, 1.0))


def relative_error(exact: np.ndarray, found: np.ndarray) -> float:
    """``|found - exact|_F / |exact|_F``."""
    return float(np.linalg.norm(found.astype(np.float64) - exact) / np.linalg.norm(exact.astype(np.float64)))


def refuse_groups(lowers: Sequence[int], size: int, n: int) -> str | None:
    """Why groups cannot be had, as a line about the flags; None if they can.

    Args:
        lowers: Ranks of their first examples.
        size: m, examples of a group.
        n: Scored examples.
    """
    if size > n:
        return f"--m_samples {size}: is more than the {n} examples that are scored; give at most {n}"
    beyond = [lower for lower in lowers if lower + size > n]
    if beyond:
        return (
            f"--lower_index {beyond[0]}: no {size} of {n} scored examples begin there; "
            f"give ranks of at most {n - size}, or a smaller --m_samples"
        )
    return None


TRIED = 4
"""Examples of the larger of two trials."""


@dataclass(frozen=True)
class Forecast:
    """What one kernel takes.

    Attributes:
        rows: Rows of the kernel.
        kernel_bytes: The kernel, and the other epoch's.
        kept_bytes: What is kept of the examples meanwhile.
        psi_bytes: The matrix Psi, which is not formed.
        seconds: Time, extrapolated.
    """

    rows: int
    kernel_bytes: int
    kept_bytes: int
    psi_bytes: int
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """Memory above that of the network and the data."""
        return self.kernel_bytes + self.kept_bytes


def kernel_bytes(rows: int) -> int:
    """Memory of two kernels of so many rows, in float32."""
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
    """Try the kernel of one example and of a few, and extrapolate.

    Args:
        model: The network.
        images: (n, ...) some examples.
        labels: (n,).
        size: m, examples of the kernel that is meant.
        classes: A name of ``NTK_CLASSES``.
        projection_dim: See ``ntk_kernel``.
        memory_mb: See ``ntk_kernel``.
    """

    def plan(n: int):
        like = images[:1].expand(n, *images.shape[1:])
        return make_plan(model, like, NTK_CLASSES[classes], labels[:1].expand(n), memory_mb)

    def multiplications(n: int) -> float:
        if projection_dim is not None:  # no pairs
            return float(n)
        meant = plan(n)
        return sum(sum(work(meant, band, n)) for band in meant.bands)

    def trial(n: int) -> float:
        started = time.perf_counter()
        ntk_kernel(model, images[:n], labels[:n], classes, projection_dim=projection_dim, memory_mb=memory_mb)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - started

    few = min(TRIED, size, len(images))
    trial(1)  # the first call pays for what is set up once
    times, works = (trial(1), trial(few)), (multiplications(1), multiplications(few))
    per_work = max(times[1] - times[0], 0.0) / (works[1] - works[0]) if few > 1 else times[0] / works[0]
    at_start = max(times[0] - per_work * works[0], 0.0)
    chosen = plan(size)
    q, element = chosen.quantities, chosen.dtype.itemsize
    numbers = [chosen.numbers(shape) for shape in chosen.shapes.values()]
    kept = min(size * sum(numbers), max(chosen.limit, 2 * max(numbers))) * element  # two examples at the least
    if projection_dim is not None:
        kept = size * q * projection_dim * element
    return Forecast(
        rows=size * q,
        kernel_bytes=kernel_bytes(size * q),
        kept_bytes=int(kept),
        psi_bytes=size * q * sum(shape.numbers for shape in chosen.shapes.values()) * element,
        seconds=at_start + per_work * multiplications(size),
    )
