"""What a neural tangent kernel will take: memory from its sizes, time from trials on a few examples."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from src.curvature.ntk import NTK_CLASSES, ntk_kernel
from src.jacobians.gram_plan import make_plan, work

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
