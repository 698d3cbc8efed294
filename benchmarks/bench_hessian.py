"""Spectra of Hessians: one Lanczos run, against power iteration and a density run; products against curvlinops'.

    python -m benchmarks.bench_hessian [--quick]

A lenet, trained on digits for a few epochs, and the Hessian of its mean loss over a part of them. Wanted are the top
five eigenvalues to a relative residual of 1e-3, and the density from 100 Lanczos steps, in at most 120 products. The
plain way iterates powers, each time in what the eigenvectors before leave over, until its residuals are as small, and
then runs Lanczos for the density; its products are gradients of gradients. Products are also timed alone: against
gradients of gradients, and against curvlinops' operators, on a lenet and a residual network.
"""

import time
from dataclasses import dataclass
from functools import partial
from operator import matmul

import torch
import torch.nn.functional as F
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import Tensor, nn

from benchmarks.common import Row, in_turn, random_images, run, seconds
from src.curvature.choices import SpectrumPlan
from src.curvature.hessian import GGN, CurvatureOperator, Hessian
from src.curvature.lanczos import Lanczos, TraceEstimate, add_probe, mean_and_error, rademacher
from src.curvature.spectrum import DEFLATED, SpectrumRun, true_residuals
from src.datasets import Batches, ImageSet, load_dataset
from src.models import build_model

TOP, TOLERANCE, STEPS, MOST = 5, 1e-3, 100, 120


class PlainHessian(Hessian):
    """Gradients of gradients, as they are usually taken."""

    _trusted = False


@dataclass
class Found:
    """What a way found, and its cost."""

    values: Tensor
    residuals: Tensor
    products: int
    seconds: float = 0.0


def network(name: str, images: ImageSet, epochs: int) -> nn.Module:
    """A network trained by plain SGD, a few epochs."""
    net = build_model(name, images.entry.num_classes, images.entry.channels, images.entry.image_size, seed=0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    batches = Batches(images, 64, normalisation=images.entry.normalisations["samis"], order="shuffled")
    for epoch in range(epochs):
        for batch in batches.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(net(batch.images), batch.labels).backward()
            optimizer.step()
    return net.eval()


def operator(kind: type[CurvatureOperator], net: nn.Module, images: ImageSet) -> CurvatureOperator:
    """The matrix of the mean loss over ``images``."""
    return kind(net, Batches(images, 128, normalisation=images.entry.normalisations["samis"]), len(images))


def deflate(vector: Tensor, known: list[Tensor]) -> Tensor:
    """Take eigenvectors found before out of a vector, in place."""
    for other in known:
        vector -= (other @ vector) * other
    return vector


def plain(matrix: CurvatureOperator, top: int, steps: int) -> Found:
    """Power iteration with deflation for each eigenvalue, and a Lanczos run for the density."""
    vectors, values, residuals = [], [], []
    for number in range(top):
        vector = rademacher(matrix.size, 1, number, "power iteration")
        deflate(vector, vectors)
        while True:
            vector /= vector.norm()
            product = deflate(matrix @ vector, vectors)
            value = vector @ product
            residual = (product - value * vector).norm()
            if residual <= TOLERANCE * value.abs():
                break
            vector = product
        vectors.append(vector)
        values.append(value)
        residuals.append(residual)
    process = Lanczos(matrix, rademacher(matrix.size, 0, 0, "lanczos"))
    for _ in range(steps):
        process.step()
    return Found(torch.stack(values), torch.stack(residuals), matrix.products)


def ours(matrix: CurvatureOperator, top: int, steps: int) -> Found:
    """One run for both."""
    plan = SpectrumPlan(top_n=top, order="magnitude", tolerance=TOLERANCE, steps=steps, trace_probes=0)
    found = SpectrumRun(matrix, plan).run()
    return Found(torch.tensor(found.eigenvalues), torch.tensor(found.residuals), matrix.products)


def spectrum_rows(quick: bool) -> list[Row]:
    """Eigenvalues and density.

    Raises:
        RuntimeError: The two ways differ, or a residual is not what it should be.
    """
    train, _ = load_dataset("digits", "data")
    net = network("lenet", train, 1 if quick else 8)
    examples = train.subset(torch.arange(40 if quick else 160))
    top, steps = (1, 20) if quick else (TOP, STEPS)
    found: dict[str, Found] = {}
    for name, way, kind in (("plain", plain, PlainHessian), ("ours", ours, Hessian)):
        matrix = operator(kind, net, examples)
        matrix @ torch.ones(matrix.size)  # warms up
        matrix.products = 0
        took = seconds(lambda way=way, matrix=matrix, name=name: found.update({name: way(matrix, top, steps)}),
                       time.process_time)  # fmt: skip
        found[name].seconds = took
    a, b = found["plain"], found["ours"]
    if not torch.allclose(a.values.double(), b.values.double(), rtol=2 * TOLERANCE):
        raise RuntimeError(f"eigenvalues differ: {a.values} by powers, {b.values} by Lanczos")
    check = Lanczos(matrix, rademacher(matrix.size, 0, 0, "lanczos"))
    for _ in range(steps):
        check.step()
    pairs = check.ritz(top, "magnitude")
    true = true_residuals(matrix, pairs.values, check.vectors(pairs))
    if (true > TOLERANCE * abs(pairs.values)).any():
        raise RuntimeError(f"residuals of {true} at eigenvalues {pairs.values}")
    matrix.products = 0
    alone = ours(matrix, top, 1)  # no density, but for one step
    what = f"top {top} and density, lenet on {len(examples)} digits"
    return [
        Row(f"{what}: allowed / one Lanczos run", MOST, b.products, "products", 1.0),
        Row(f"{what}: powers and Lanczos / one run", a.products, b.products, "products"),
        Row(f"{what}: powers and Lanczos / one run, time", a.seconds, b.seconds, "cpu s"),
        Row(f"top {top} alone: powers / Lanczos", a.products - steps, alone.products, "products"),
        trace_row(matrix, check, probes=4 if quick else 20),
    ]


def trace_row(matrix: CurvatureOperator, process: Lanczos, probes: int) -> Row:
    """How many more probes the trace takes to the same standard error where a Lanczos run is not used."""
    known = process.ritz(DEFLATED, "magnitude")
    estimate, vectors = TraceEstimate(), process.vectors(known)
    for _ in range(probes):
        add_probe(estimate, matrix, 0, (known.values, vectors))
    errors = [mean_and_error(samples)[1] for samples in (estimate.samples, estimate.deflated)]
    title = "trace to the same standard error: Hutchinson / with the Lanczos run's eigenvectors"
    return Row(title, probes * (errors[0] / errors[1]) ** 2, probes, "probes")


def product_rows(quick: bool) -> list[Row]:
    """Single products."""
    rows = []
    for name, dataset, count in (("lenet", "mnist", 512), ("resnet8", "cifar10", 128)):
        images = random_images(dataset, 8 if quick else count)
        net = network(name, images, 0)
        batches = list(Batches(images, 128, normalisation=images.entry.normalisations["samis"]))
        data = [(batch.images, batch.labels) for batch in batches]
        parameters, repeats = list(net.parameters()), 1 if quick else 3
        vector = torch.randn(sum(p.numel() for p in parameters), generator=torch.Generator().manual_seed(0))
        for kind, oracle in ((Hessian, HessianLinearOperator), (GGN, GGNLinearOperator)):
            matrices = {
                "ours": kind(net, batches, len(images)),
                "curvlinops": oracle(net, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False),
            }
            if kind is Hessian:
                matrices["gradient of gradient"] = PlainHessian(net, batches, len(images))
            ways = [partial(matmul, matrix, vector) for matrix in matrices.values()]
            times = dict(zip(matrices, in_turn(ways, repeats), strict=True))
            for other in list(matrices)[1:]:
                title = f"{kind.name} product, {name}, {len(images)} examples: {other} / ours"
                rows.append(Row(title, 1e3 * times[other], 1e3 * times["ours"], "cpu ms"))
    return rows


def measure(quick: bool = False) -> list[Row]:
    """All rows, on one thread.

    Raises:
        RuntimeError: A result is wrong.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*spectrum_rows(quick), *product_rows(quick)]
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    run(measure, __doc__)


if __name__ == "__main__":
    main()
