"""Input curvature and epsilon-flatness over a data set, in batches and one example at a time.

    python benchmarks/bench_flatness.py

Same network (lenet), same images, same process; seconds for the set and how many times faster the batches are,
with one thread and with all. The largest difference between the two ways' scores stands beside them.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.datasets import Batch
from src.metrics.epsilon_flatness import epsilon_flatness
from src.metrics.input_curvature import input_curvature
from src.models import build_model

EXAMPLES, BATCH = 1000, 250


def in_batches(images: Tensor, labels: Tensor) -> Iterator[Batch]:
    for rows in torch.arange(len(labels)).split(BATCH):
        yield Batch(images[rows], labels[rows], rows, torch.ones(len(rows)))


def curvature_loop(model: nn.Module, images: Tensor, labels: Tensor, h: float = 3.0) -> np.ndarray:
    def gradient(image: Tensor, label: Tensor) -> Tensor:
        leaf = image.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(leaf), label), leaf)[0]

    scores = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        before = gradient(image, label)
        signs = before.sign()
        after = gradient(image + h * (signs + 1e-7) / (signs.norm() + 1e-7), label)
        scores.append((after - before).norm().item())
    return np.array(scores)


def epsilon_loop(model: nn.Module, images: Tensor, labels: Tensor, rho: float = 0.05) -> np.ndarray:
    parameters = list(model.parameters())
    scores = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(image), label), parameters)
        pairs = list(zip(parameters, gradients, strict=True))
        norm = torch.stack([(w.detach().abs() * g).norm() for w, g in pairs]).norm() + 1e-12
        scores.append(torch.stack([(rho * w.detach() ** 2 * g / norm).norm() for w, g in pairs]).norm().item())
    return np.array(scores)


def timed(work: Callable[[], np.ndarray], repeats: int) -> tuple[float, np.ndarray]:
    """The best of several runs, and what it returned."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        found = work()
        best = min(best, time.perf_counter() - start)
    return best, found


def main() -> None:
    """Print the table."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(EXAMPLES, 1, 28, 28, generator=draw)
    labels = torch.randint(10, (EXAMPLES,), generator=draw)
    model = build_model("lenet", 10, 1, 28, seed=0).eval()
    pairs = {
        "input curvature": (input_curvature, curvature_loop),
        "epsilon-flatness": (epsilon_flatness, epsilon_loop),
    }
    print(f"lenet, {EXAMPLES} images of 28x28, batches of {BATCH}")
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        for name, (batched, loop) in pairs.items():
            fast, found = timed(lambda b=batched: b(model, in_batches(images, labels), total=EXAMPLES), 3)
            slow, expected = timed(lambda s=loop: s(model, images, labels), 1)
            gap = np.abs(found / expected - 1).max()
            print(
                f"{name:17s} {threads} thread(s): one by one {slow:6.2f} s, batches {fast:6.3f} s, "
                f"{slow / fast:5.1f} times; largest relative difference {gap:.1e}"
            )


if __name__ == "__main__":
    main()
