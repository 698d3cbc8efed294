"""Neural tangent kernels, with and without the matrix Psi of all gradients.

    python -m benchmarks.bench_ntk [--quick]
    python -c "from benchmarks.bench_ntk import whole; print(whole())"     # resnet18, 100 classes, 50 examples

The plain way forms Psi, one row per example and class, and multiplies it with itself. Psi is made by
``vmap(jacrev)`` and by one backward pass after another, and the faster of both counts. Of ours, ten kernels of small
networks are made in a row, as a script makes those of its groups, and the time is of one. Memory is the growth of
the process's peak over that of the loaded network, against the bytes of Psi. The last row is the case that needs
224 GB of Psi: measured for few examples, extrapolated to 50 by a linear and a quadratic part.
"""

import time

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from benchmarks.bench_memory import peak
from benchmarks.common import Row, in_fresh_process, in_turn, run
from src.curvature.ntk import ntk_kernel
from src.devices import PRECISIONS, prepare
from src.models import build_model

CASES = {"large_mlp": (1, 28, 10, 50, 200.0), "lenet": (1, 28, 10, 50, None), "resnet18": (3, 32, 10, 4, 1.5)}
QUICK = {"small_mlp": (1, 8, 3, 4, None)}
IN_A_ROW = {"large_mlp": 10, "lenet": 10}
"""Kernels of ours per turn, one after the other as for the groups of a run; one where it is not said."""
FEW = (1, 2, 4)
MANY = 50


def prepared(name: str, channels: int, size: int, classes: int, examples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, noise images and labels."""
    torch.set_num_threads(1)
    prepare(torch.device("cpu"), PRECISIONS["fp32"], deterministic=False)
    model = build_model(name, classes, channels, size, seed=0).eval()
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(examples, channels, size, size, generator=draw)
    return model, images, torch.arange(examples) % classes


def psi_by_jacrev(model: nn.Module, images: Tensor) -> Tensor:
    """``Psi Psi^T``, gradients vectorised over examples and classes."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, values, (image.unsqueeze(0),))[0]

    jacobians = vmap(jacrev(outputs), (None, 0))(parameters, images)
    psi = torch.cat([j.flatten(0, 1).flatten(1) for j in jacobians.values()], dim=1)
    return psi @ psi.mT


def psi_by_loop(model: nn.Module, images: Tensor) -> Tensor:
    """``Psi Psi^T``, a backward pass for each example and class."""
    parameters, rows = list(model.parameters()), []
    for image in images.split(1):
        for logit in model(image)[0]:
            gradients = torch.autograd.grad(logit, parameters, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradients]))
    psi = torch.stack(rows)
    return psi @ psi.mT


def compare(name: str, plain: Tensor, ours: np.ndarray) -> None:
    """Stop if the two kernels are not the same."""
    error = float(np.linalg.norm(plain.numpy() - ours) / np.linalg.norm(ours))
    if not error < 1e-4:
        raise RuntimeError(f"{name}: the two ways differ by {error:.2g}")


def kernel_peak(name: str, sizes: tuple[int, int, int, int], computed: bool) -> float:
    """Peak memory in MiB with the network loaded and used once, and, where ``computed``, after a kernel."""
    model, images, labels = prepared(name, *sizes)
    with torch.no_grad():
        model(images)
    if computed:
        ntk_kernel(model, images, labels)
    return peak()


def few_examples() -> list[float]:
    """Processor seconds of kernels of resnet18 with 100 classes, for few examples."""
    model, images, labels = prepared("resnet18", 3, 32, 100, max(FEW))
    return in_turn([lambda m=m: ntk_kernel(model, images[:m], labels[:m]) for m in FEW], 1)


def extrapolated(times: list[float]) -> float:
    """``a m + b m^2`` (neither negative) fitted to few examples, where relative errors count, at many."""
    counts = np.array(FEW, dtype=np.float64)
    powers = np.stack([counts, counts**2], axis=1)
    a, b = nnls(powers / np.array(times)[:, None], np.ones(len(times)))[0]
    return float(a * MANY + b * MANY**2)


def whole(examples: int = MANY, classes: int = 100, memory_mb: float = 4096.0, threads: int = 2) -> dict[str, float]:
    """The kernel that needs 224 GB of Psi, measured: seconds by both clocks, and peak memory in MiB."""
    model, images, labels = prepared("resnet18", 3, 32, classes, examples)
    torch.set_num_threads(threads)
    wall, processor = time.perf_counter(), time.process_time()
    rows = len(ntk_kernel(model, images, labels, memory_mb=memory_mb))
    return {
        "rows": rows,
        "wall": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
        "peak_mib": peak(),
    }


def measure(quick: bool = False) -> list[Row]:
    """Time both ways, and measure memory and the large case (not where ``quick``).

    Raises:
        RuntimeError: The two ways disagree.
    """
    rows = []
    for name, (channels, size, classes, examples, target) in (QUICK if quick else CASES).items():
        model, images, labels = prepared(name, channels, size, classes, examples)
        compare(name, psi_by_loop(model, images), ntk_kernel(model, images, labels))
        loop, vectorised, ours = in_turn(
            [
                lambda model=model, images=images: psi_by_loop(model, images),
                lambda model=model, images=images: psi_by_jacrev(model, images),
                lambda model=model, images=images, labels=labels, name=name: [
                    ntk_kernel(model, images, labels) for _ in range(IN_A_ROW.get(name, 1))
                ],
            ],
            1 if quick else 3,
        )
        ours /= IN_A_ROW.get(name, 1)
        title = f"tangent kernel, {name}, {classes} classes, {examples} examples"
        rows.append(Row(title, min(loop, vectorised), ours, "s", target))
    if quick:
        return rows
    channels, size, classes, examples, _ = CASES["resnet18"]
    sizes = (channels, size, classes, examples)
    grown = in_fresh_process(kernel_peak, "resnet18", sizes, True) - in_fresh_process(
        kernel_peak, "resnet18", sizes, False
    )
    numbers = sum(p.numel() for p in model.parameters())
    psi = examples * classes * numbers * 4 / 2**20
    rows.append(Row("memory of that kernel of resnet18, against Psi's", psi, max(grown, 0.1), "MiB", 4.0))
    seconds = extrapolated(in_fresh_process(few_examples))
    rows.append(
        Row(f"tangent kernel, resnet18, 100 classes, {MANY} examples, extrapolated", float("nan"), seconds, "s")
    )
    return rows


def main() -> None:
    run(measure, __doc__)


if __name__ == "__main__":
    main()
