"""Input curvature and epsilon-flatness over a data set, in batches and one example at a time.

    python -m benchmarks.bench_flatness [--quick]

The same network (lenet) and images both ways; the scores of both ways are compared on the way.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Row, in_turn, run
from src.datasets import Batch
from src.metrics.flatness import epsilon_flatness, input_curvature
from src.models import build_model

BATCH = 250
TARGET = 5.0


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


def measure(quick: bool = False) -> list[Row]:
    """Time both scores both ways.

    Raises:
        RuntimeError: The two ways disagree.
    """
    torch.set_num_threads(1)
    count, repeats = (20, 1) if quick else (1_000, 2)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 28, 28, generator=draw)
    labels = torch.randint(10, (count,), generator=draw)
    model = build_model("lenet", 10, 1, 28, seed=0).eval()
    rows = []
    for name, batched, loop in (
        ("input curvature, lenet", input_curvature, curvature_loop),
        ("epsilon-flatness, lenet", epsilon_flatness, epsilon_loop),
    ):
        found: dict[str, np.ndarray] = {}
        ways = (
            lambda loop=loop, found=found: found.update(plain=loop(model, images, labels)),
            lambda batched=batched, found=found: found.update(
                ours=batched(model, in_batches(images, labels), total=count)
            ),
        )
        plain, ours = in_turn(ways, repeats)
        if not np.allclose(found["ours"], found["plain"], rtol=1e-3):
            raise RuntimeError(f"{name}: the two ways disagree")
        scale = 1_000 / count
        rows.append(Row(name, plain * scale, ours * scale, "s per 1,000 images", TARGET))
    return rows


def main() -> None:
    run(measure, __doc__)


if __name__ == "__main__":
    main()
