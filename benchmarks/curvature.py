"""Spectra of Hessians, and neural tangent kernels.

python -m benchmarks.curvature [hessian lanczos ntk] [--quick]
python -c "from benchmarks.curvature import whole; print(whole())"     # resnet18, 100 classes, 50 examples
"""

import time
from dataclasses import dataclass
from functools import partial
from operator import matmul

import numpy as np
import torch
import torch.nn.functional as F
from curvlinops import GGNLinearOperator, HessianLinearOperator
from scipy.linalg import eigh_tridiagonal
from scipy.optimize import nnls
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from benchmarks.common import Row, in_fresh_process, in_turn, peak, random_images, run, seconds
from src.curvature.config import SpectrumConfig
from src.curvature.lanczos import Lanczos, TraceEstimate, add_probe, mean_and_error, rademacher
from src.curvature.ntk import ntk_kernel
from src.curvature.operators import GGN, CurvatureOperator, Hessian, true_residuals
from src.curvature.spectrum import DEFLATED, SpectrumRun
from src.datasets import Batches, ImageSet, load_dataset
from src.devices import PRECISIONS, prepare
from src.models import build_model

TOP, TOLERANCE, STEPS = 5, 1e-3, 100


class PlainHessian(Hessian):
    """Hessian-vector products by standard double backpropagation."""

    _trusted = False


@dataclass
class Found:
    """Result and cost of one implementation."""

    values: Tensor
    residuals: Tensor
    products: int
    seconds: float = 0.0


def network(name: str, images: ImageSet, epochs: int) -> nn.Module:
    """A model trained by SGD for a few epochs."""
    net = build_model(name, images.entry.num_classes, images.entry.channels, images.entry.image_size, seed=0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    batches = Batches(images, 64, normalization=images.entry.normalizations["samis"], order="shuffled")
    for epoch in range(epochs):
        for batch in batches.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(net(batch.images), batch.labels).backward()
            optimizer.step()
    return net.eval()


def operator(kind: type[CurvatureOperator], net: nn.Module, images: ImageSet) -> CurvatureOperator:
    """The curvature matrix of the mean loss over ``images``."""
    return kind(net, Batches(images, 128, normalization=images.entry.normalizations["samis"]), len(images))


def deflate(vector: Tensor, known: list[Tensor]) -> Tensor:
    """Project known eigenvectors out of a vector, in place."""
    for other in known:
        vector -= (other @ vector) * other
    return vector


def plain(matrix: CurvatureOperator, top: int, steps: int) -> Found:
    """The papers' code: power iteration with deflation for each eigenvalue, and a Lanczos run for the density."""
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
    """One Lanczos run for eigenvalues and density."""
    config = SpectrumConfig(
        top_n=top, eigen_order="magnitude", tolerance=TOLERANCE, lanczos_steps=steps, trace_probes=0
    )
    found = SpectrumRun(matrix, config).run()
    return Found(torch.tensor(found.eigenvalues), torch.tensor(found.residuals), matrix.products)


class Counted(LinearOperator):
    """curvlinops' Hessian for scipy, with the number of its products."""

    def __init__(self, matrix: HessianLinearOperator, size: int) -> None:
        self.matrix, self.products = matrix, 0
        super().__init__(dtype=np.float32, shape=(size, size))

    def _matvec(self, vector: np.ndarray) -> np.ndarray:
        self.products += 1
        return (self.matrix @ torch.from_numpy(vector.ravel().astype(np.float32))).detach().numpy()


def by_scipy(matrix: Counted, top: int, steps: int) -> Found:
    """The strongest alternative: scipy's eigsh, and a Lanczos run in numpy of ``steps`` steps for the density."""
    draw = np.random.default_rng(0)
    start = draw.choice([-1.0, 1.0], matrix.shape[0]).astype(np.float32)
    values, vectors = eigsh(matrix, k=top, which="LM", tol=TOLERANCE, v0=start)
    order = np.argsort(-np.abs(values))
    basis, alphas, betas = np.zeros((steps + 1, matrix.shape[0]), np.float32), [], []
    basis[0] = start / np.linalg.norm(start)
    for step in range(steps):
        product = matrix.matvec(basis[step])
        alphas.append(product @ basis[step])
        for _ in range(2):
            product -= basis[: step + 1].T @ (basis[: step + 1] @ product)
        betas.append(np.linalg.norm(product))
        basis[step + 1] = product / betas[-1]
    if steps:
        eigh_tridiagonal(alphas, betas[:-1])  # nodes and weights of the density
    products = matrix.products
    residuals = [np.linalg.norm(matrix.matvec(vectors[:, k]) - values[k] * vectors[:, k]) for k in order]
    matrix.products = products  # do not count the products of the check
    return Found(torch.from_numpy(values[order]), torch.tensor(np.array(residuals)), products)


def spectrum_rows(quick: bool) -> list[Row]:
    """Benchmark eigenvalues and density.

    Raises:
        RuntimeError: Two implementations differ, or a residual is too large.
    """
    train, _ = load_dataset("digits", "data")
    net = network("lenet", train, 1 if quick else 8)
    examples = train.subset(torch.arange(40 if quick else 160))
    top, steps = (1, 20) if quick else (TOP, STEPS)
    batches = Batches(examples, 128, normalization=examples.entry.normalizations["samis"])
    data = [(batch.images, batch.labels) for batch in batches]
    parameters = list(net.parameters())
    curvlinops = HessianLinearOperator(net, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
    matrices = {
        "authors": operator(PlainHessian, net, examples),
        "strongest": Counted(curvlinops, sum(p.numel() for p in parameters)),
        "ours": operator(Hessian, net, examples),
    }
    ways = {"authors": plain, "strongest": by_scipy, "ours": ours}
    found: dict[str, Found] = {}
    for name, matrix in matrices.items():
        matrix @ np.ones(matrix.shape[0], np.float32) if name == "strongest" else matrix @ torch.ones(matrix.size)
        matrix.products = 0  # after the warm-up
        took = seconds(lambda name=name, matrix=matrix: found.update({name: ways[name](matrix, top, steps)}),
                       time.process_time)  # fmt: skip
        found[name].seconds = took
    for name, other in found.items():
        if not torch.allclose(other.values.double(), found["ours"].values.double(), rtol=2 * TOLERANCE):
            raise RuntimeError(f"eigenvalues differ: {other.values} of {name}, {found['ours'].values} of ours")
    matrix = matrices["ours"]
    check = Lanczos(matrix, rademacher(matrix.size, 0, 0, "lanczos"))
    for _ in range(steps):
        check.step()
    pairs = check.ritz(top, "magnitude")
    true = true_residuals(matrix, pairs.values, check.vectors(pairs))
    if (true > TOLERANCE * abs(pairs.values)).any():
        raise RuntimeError(f"residuals of {true} at eigenvalues {pairs.values}")
    a, b, c = found.values()
    matrix.products = matrices["strongest"].products = 0
    alone = ours(matrix, top, 1)  # one step for the density
    scipy_alone = by_scipy(matrices["strongest"], top, 0)
    what = f"Hessian of lenet: top {top}"
    return [
        Row(f"{what} and density", a.products, b.products, c.products, "products", 1.2),
        Row(f"{what} and density, time", a.seconds, b.seconds, c.seconds, "s", 1.2),
        Row(f"{what} alone", a.products - steps, scipy_alone.products, alone.products, "products"),
        trace_row(matrix, check, probes=4 if quick else 20),
    ]


def trace_row(matrix: CurvatureOperator, process: Lanczos, probes: int) -> Row:
    """Number of probes for the same standard error of the trace; compared only with plain Hutchinson."""
    known = process.ritz(DEFLATED, "magnitude")
    estimate, vectors = TraceEstimate(), process.vectors(known)
    for _ in range(probes):
        add_probe(estimate, matrix, 0, (known.values, vectors))
    errors = [mean_and_error(samples)[1] for samples in (estimate.samples, estimate.deflated)]
    title = "Hessian of lenet: trace to the same standard error"
    return Row(title, None, probes * (errors[0] / errors[1]) ** 2, probes, "probes")


def product_rows(quick: bool) -> list[Row]:
    """Benchmark single matrix-vector products."""
    rows = []
    for name, dataset, count in (("lenet", "mnist", 512), ("resnet8", "cifar10", 128)):
        images = random_images(dataset, 8 if quick else count)
        net = network(name, images, 0)
        batches = list(Batches(images, 128, normalization=images.entry.normalizations["samis"]))
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
            theirs, own = 1e3 * times["curvlinops"], 1e3 * times["ours"]
            twice = 1e3 * times["gradient of gradient"] if kind is Hessian else None
            strongest = theirs if twice is None else min(theirs, twice)
            rows.append(
                Row(f"{kind.__name__} product, {name}, {len(images)} examples", twice, strongest, own, "ms", 1.0)
            )
    return rows


def hessian(quick: bool = False) -> list[Row]:
    """Hessian spectrum, and single matrix-vector products.

    A lenet, trained on digits for a few epochs, and the Hessian of its mean loss over some of them. Wanted: the top
    five eigenvalues to a relative residual of 1e-3, and the density from 100 Lanczos steps.
    Authors: power iteration with deflation to the same residuals, then Lanczos for the density, on gradients of
    gradients. Strongest alternative: scipy's eigsh and a Lanczos run on curvlinops' operator. Ours takes both from
    one Lanczos run. Single products on a lenet and a residual network: gradients of gradients (authors; Hessian
    only), and the faster of them and curvlinops' operator.

    Raises:
        RuntimeError: A result is wrong.
    """
    return [*spectrum_rows(quick), *product_rows(quick)]


def lanczos(quick: bool = False) -> list[Row]:
    """Time of 60 Lanczos steps, excluding matrix products: each vector is orthogonalized against all earlier ones.

    large_mlp (545,810 parameters) and the Hessian of 128 examples. The only sensible alternative keeps the vectors as
    rows of a matrix and subtracts the components twice at each step. Both methods must find the same eigenvalues.

    Raises:
        RuntimeError: The eigenvalues differ.
    """
    steps, images = (10, random_images("mnist", 8)) if quick else (60, random_images("mnist", 128))
    matrix = operator(Hessian, network("large_mlp", images, 0), images)
    start = rademacher(matrix.size, 0, 0, "lanczos")
    matrix @ start  # warms up
    spent = {}

    class Timed:
        """The operator, with the total time of its products in seconds."""

        size, dtype, device, seconds = matrix.size, matrix.dtype, matrix.device, 0.0

        def __matmul__(self, vector: Tensor) -> Tensor:
            found = []
            self.seconds += seconds(lambda: found.append(matrix @ vector), time.process_time)
            return found[0]

    def plainly(timed: Timed) -> np.ndarray:
        basis, alphas, betas = torch.zeros(steps + 1, matrix.size), [], []
        basis[0] = start / start.norm()
        for step in range(steps):
            product = timed @ basis[step]
            alphas.append(float(product @ basis[step]))
            for _ in range(2):
                product -= basis[: step + 1].T @ (basis[: step + 1] @ product)
            betas.append(float(product.norm()))
            basis[step + 1] = product / betas[-1]
        values = eigh_tridiagonal(alphas, betas[:-1], eigvals_only=True)
        return values[np.argsort(-np.abs(values))][:TOP]

    def with_basis(storage: str, timed: Timed) -> np.ndarray:
        process = Lanczos(timed, start, storage)
        for _ in range(steps):
            process.step()
        return process.ritz(TOP, "magnitude").values

    ways = {"plain": plainly, "full": partial(with_basis, "full"), "half": partial(with_basis, "half")}
    for _ in range(1 if quick else 5):
        for name, way in ways.items():
            timed, found = Timed(), []
            took = seconds(lambda way=way, timed=timed, found=found: found.append(way(timed)), time.process_time)
            spent.setdefault(name, []).append((took - timed.seconds, timed.seconds, *found))
    if any(not np.allclose(run[2], spent["plain"][0][2], rtol=1e-3) for runs in spent.values() for run in runs):
        raise RuntimeError(f"eigenvalues differ: {spent}")
    rest, products = ({name: min(run[k] for run in runs) for name, runs in spent.items()} for k in (0, 1))
    what = f"{steps} Lanczos steps of large_mlp without the products"
    return [
        Row(what, None, rest["plain"], rest["full"], "s"),
        Row(f"{what}, vectors in half precision", None, rest["plain"], rest["half"], "s"),
        Row(f"{what}: products / the rest", None, products["full"], rest["full"], "s", variant=True),
    ]


CASES = {"large_mlp": (1, 28, 10, 50, 150.0), "lenet": (1, 28, 10, 50, 5.0), "resnet18": (3, 32, 10, 4, 1.3)}
QUICK = {"small_mlp": (1, 8, 3, 4, None)}
IN_A_ROW = {"large_mlp": 10, "lenet": 10}
"""Kernels that this project computes in a row per timing, as for the groups of a run; 1 if not listed."""
FEW = (1, 2, 4)
MANY = 50


def prepared(name: str, channels: int, size: int, classes: int, examples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model, noise images and labels."""
    prepare(torch.device("cpu"), PRECISIONS["fp32"], deterministic=False)
    model = build_model(name, classes, channels, size, seed=0).eval()
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(examples, channels, size, size, generator=draw)
    return model, images, torch.arange(examples) % classes


def kernel_by_layers(model: nn.Module, images: Tensor) -> Tensor:
    """The kernel as in torch's tutorial: ``vmap(jacrev)``, contracted parameter by parameter."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, values, (image.unsqueeze(0),))[0]

    jacobians = vmap(jacrev(outputs), (None, 0))(parameters, images)
    rows = (j.flatten(0, 1).flatten(1) for j in jacobians.values())  # (m C, p) each
    return sum(j @ j.mT for j in rows)


def psi_by_loop(model: nn.Module, images: Tensor) -> Tensor:
    """The papers' code: Psi by one backward pass per example and class, and ``Psi Psi^T``."""
    parameters, rows = list(model.parameters()), []
    for image in images.split(1):
        for logit in model(image)[0]:
            gradients = torch.autograd.grad(logit, parameters, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradients]))
    psi = torch.stack(rows)
    return psi @ psi.mT


def compare_kernels(name: str, plain: Tensor, ours: np.ndarray) -> None:
    """Raise RuntimeError if the kernels differ."""
    error = float(np.linalg.norm(plain.numpy() - ours) / np.linalg.norm(ours))
    if not error < 1e-4:
        raise RuntimeError(f"{name}: the two kernels have a relative difference of {error:.2g}")


def kernel_peak(name: str, sizes: tuple[int, int, int, int], computed: bool) -> float:
    """Return peak memory in MiB after one forward pass and, if ``computed``, one kernel computation."""
    model, images, labels = prepared(name, *sizes)
    with torch.no_grad():
        model(images)
    if computed:
        ntk_kernel(model, images, labels)
    return peak()


def few_examples() -> list[float]:
    """Return CPU seconds of resnet18 kernels with 100 classes, for few examples."""
    model, images, labels = prepared("resnet18", 3, 32, 100, max(FEW))
    return in_turn([lambda m=m: ntk_kernel(model, images[:m], labels[:m]) for m in FEW], 1)


def extrapolated(times: list[float]) -> float:
    """Extrapolate to ``MANY`` examples with a nonnegative least-squares fit of ``a m + b m^2`` in relative error."""
    counts = np.array(FEW, dtype=np.float64)
    powers = np.stack([counts, counts**2], axis=1)
    a, b = nnls(powers / np.array(times)[:, None], np.ones(len(times)))[0]
    return float(a * MANY + b * MANY**2)


def whole(examples: int = MANY, classes: int = 100, memory_mb: float = 4096.0, threads: int = 2) -> dict[str, float]:
    """Measure the kernel whose Psi takes 224 GB: wall and CPU seconds, and peak memory in MiB."""
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


def ntk(quick: bool = False) -> list[Row]:
    """Neural tangent kernels.

    Authors: the matrix Psi of all gradients, with one backward pass for each row (example and class). Strongest
    alternative: the faster of that and ``vmap(jacrev)`` contracted parameter by parameter. For small models, this
    project's time is the time per kernel of ten kernels in a row, as a script computes them for its groups. Memory
    (not measured in quick mode) is the increase in peak memory over the loaded model; it is compared only with the
    size of Psi. In the last row Psi would take 224 GB: times are measured on a few examples and extrapolated to 50
    with a linear and a quadratic term.

    Raises:
        RuntimeError: Two implementations disagree.
    """
    rows = []
    for name, (channels, size, classes, examples, target) in (QUICK if quick else CASES).items():
        model, images, labels = prepared(name, channels, size, classes, examples)
        compare_kernels(name, psi_by_loop(model, images), ntk_kernel(model, images, labels))
        loop, vectorised, ours = in_turn(
            [
                lambda model=model, images=images: psi_by_loop(model, images),
                lambda model=model, images=images: kernel_by_layers(model, images),
                lambda model=model, images=images, labels=labels, name=name: [
                    ntk_kernel(model, images, labels) for _ in range(IN_A_ROW.get(name, 1))
                ],
            ],
            1 if quick else 3,
        )
        ours /= IN_A_ROW.get(name, 1)
        title = f"tangent kernel, {name}, {classes} classes, {examples} examples"
        rows.append(Row(title, loop, min(loop, vectorised), ours, "s", target))
    if quick:
        return rows
    channels, size, classes, examples, _ = CASES["resnet18"]
    sizes = (channels, size, classes, examples)
    grown = in_fresh_process(kernel_peak, "resnet18", sizes, True) - in_fresh_process(
        kernel_peak, "resnet18", sizes, False
    )
    numbers = sum(p.numel() for p in model.parameters())
    psi = examples * classes * numbers * 4 / 2**20
    title = f"memory of the tangent kernel, resnet18, {classes} classes, {examples} examples"
    rows.append(Row(title, None, psi, max(grown, 0.1), "MiB", 4.0))
    seconds = extrapolated(in_fresh_process(few_examples))
    rows.append(
        Row(f"tangent kernel, resnet18, 100 classes, {MANY} examples (extrapolated)", None, None, seconds, "s")
    )
    return rows


BENCHMARKS = {"hessian": hessian, "lanczos": lanczos, "ntk": ntk}

if __name__ == "__main__":
    run(BENCHMARKS, __doc__)
