"""Computations that need per-example gradients, compared with one pass per example.

python -m benchmarks.jacobians [variances flatness] [--quick]
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from benchmarks.common import Row, in_fresh_process, in_turn, peak, run
from src import _torchvision  # noqa: F401  prepares torchvision, which laplace-torch imports
from src.datasets import Batch
from src.jacobians import OutputVariances, Posterior, kronecker_factors
from src.metrics.flatness import epsilon_flatness, input_curvature
from src.models import build_model

DELTA = 60.0


@dataclass(frozen=True)
class Case:
    """Settings of one model.

    Attributes:
        channels: Channels of the images.
        size: Height and width of the images.
        batch: Batch size of the plain implementation.
        ours: Batch size of our implementation.
        target: Target ratio for a diagonal posterior.
        kronecker: Target ratio for a Kronecker posterior; None if it is not measured.
    """

    channels: int
    size: int
    batch: int
    ours: int
    target: float
    kronecker: float | None = None


CASES = {
    "large_mlp": Case(1, 28, 50, 1_000, 200.0, 150.0),
    "lenet": Case(1, 28, 500, 1_000, 6.0, 8.0),
    "cnn_deepobs": Case(3, 32, 20, 100, 8.0),
    "resnet20_frn": Case(3, 32, 30, 100, 1.5),
}
QUICK = {"large_mlp": Case(1, 8, 3, 5, 200.0, 150.0), "lenet": Case(1, 28, 3, 5, 6.0)}


def prepared(name: str, case: Case, count: int) -> tuple[nn.Module, Tensor, Posterior]:
    """Return the model, noise images and a diagonal posterior."""
    model = build_model(name, 10, case.channels, case.size, seed=0).eval()
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(count, case.channels, case.size, case.size, generator=draw)
    variances = {n: 1.0 / (100.0 * torch.rand(p.shape, generator=draw) + DELTA) for n, p in model.named_parameters()}
    return model, images, Posterior(variances)


def jacobian_variances(model: nn.Module, images: Tensor, posterior: Posterior) -> Tensor:
    """Compute the batch's Jacobian (b, C, P), contract it to (b, C, C), and return the diagonal."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def logits(chosen: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, chosen, (image.unsqueeze(0),))[0]

    jacobians = vmap(jacrev(logits), (None, 0))(values, images)
    found = 0.0
    for name, jacobian in jacobians.items():
        jacobian = jacobian.flatten(2)
        found = found + (jacobian * posterior.blocks[name].flatten()) @ jacobian.mT
    return found.diagonal(dim1=1, dim2=2)


def our_variances(model: nn.Module, images: Tensor, posterior: Posterior) -> Tensor:
    with OutputVariances(model, posterior) as engine:
        return engine(images)[1]


def laplace_variances(model: nn.Module, images: Tensor, batch: int) -> Tensor:
    """Use laplace-torch as the paper's authors do, but with its fastest backend for the Jacobians."""
    from laplace import Laplace
    from laplace.curvature.asdl import AsdlGGN
    from torch.utils.data import DataLoader, TensorDataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = Laplace(
            model, "classification", subset_of_weights="all", hessian_structure="kron", prior_precision=DELTA,
            backend=AsdlGGN,
        )  # fmt: skip
        labels = torch.zeros(len(images), dtype=torch.long)
        posterior.fit(DataLoader(TensorDataset(images, labels), batch_size=batch))
        found = []
        for part in images.split(batch):
            jacobians, _ = posterior.backend.jacobians(part)
            found.append(posterior.functional_variance(jacobians).diagonal(dim1=1, dim2=2).detach())
    return torch.cat(found)


def our_kronecker_variances(model: nn.Module, images: Tensor) -> Tensor:
    return our_variances(model, images, kronecker_factors(model, [images]).posterior(DELTA))


def compare(name: str, plain: Tensor, ours: Tensor) -> None:
    """Raise an error if two sets of variances differ by more than single-precision rounding."""
    if not torch.allclose(plain.double(), ours, rtol=1e-3):
        raise RuntimeError(f"{name}: the two implementations disagree")


def timed(name: str, target: float, counts: tuple[int, int], plain: Callable, ours: Callable, repeats: int) -> Row:
    """Return a row in milliseconds per example. The implementations use different numbers of examples."""
    times = in_turn((plain, ours), repeats)
    per_example = [1_000 * t / count for t, count in zip(times, counts, strict=True)]
    return Row(name, *per_example, "ms per example", target)


def peak_of(way: str, name: str, case: Case, count: int) -> float:
    """Return peak memory in MiB of one implementation on one batch. ``count`` 1 gives the baseline."""
    model, images, posterior = prepared(name, case, count)
    {"plain": jacobian_variances, "ours": our_variances}[way](model, images, posterior)
    return peak()


def variances(quick: bool = False) -> list[Row]:
    """Compute variances of logits under a Gaussian posterior with and without Jacobians, and the memory used.

    Diagonal posterior: the plain implementation computes a batch's Jacobian with ``vmap(jacrev)`` and contracts it to
    all pairs of classes. Kronecker posterior: the plain implementation is laplace-torch's fit, its backend's
    Jacobians and its functional variance. Times include fit, eigendecomposition and variances on the same examples.
    The plain implementation's batch sizes are those of the Memory-Perturbation Equation's commands, except for
    resnet20_frn, whose 300 do not fit in the memory of small machines. The engine chooses our batch sizes. The
    variances of both are compared. Memory is not measured if ``quick``, because it needs separate processes.

    Raises:
        RuntimeError: The two implementations disagree.
    """
    rows = []
    repeats = 1 if quick else 2
    cases = QUICK if quick else CASES
    for name, case in cases.items():
        model, images, posterior = prepared(name, case, max(case.batch, case.ours))
        few, many = images[: case.batch], images[: case.ours]
        compare(name, jacobian_variances(model, few, posterior), our_variances(model, few, posterior))
        rows.append(
            timed(
                f"variances of the logits, diagonal posterior, {name}",
                case.target,
                (len(few), len(many)),
                lambda model=model, few=few, posterior=posterior: jacobian_variances(model, few, posterior),
                lambda model=model, many=many, posterior=posterior: our_variances(model, many, posterior),
                repeats,
            )
        )
        if case.kronecker is None:
            continue
        # the plain implementation leaves attributes on its model
        other, batch = prepared(name, case, 1)[0], case.batch
        compare(name, laplace_variances(other, few, batch), our_kronecker_variances(model, few))
        rows.append(
            timed(
                f"fit and variances, Kronecker posterior, {name}",
                case.kronecker,
                (len(few), len(many)),
                lambda other=other, few=few, batch=batch: laplace_variances(other, few, batch),
                lambda model=model, many=many: our_kronecker_variances(model, many),
                1,
            )
        )
    if quick:
        return rows
    case = cases["lenet"]
    grown = [
        in_fresh_process(peak_of, way, "lenet", case, case.batch) - in_fresh_process(peak_of, way, "lenet", case, 1)
        for way in ("plain", "ours")
    ]
    rows.append(Row(f"memory of variances, lenet, {case.batch} images", *(max(g, 0.1) for g in grown), "MiB"))
    return rows


def in_batches(images: Tensor, labels: Tensor) -> Iterator[Batch]:
    for rows in torch.arange(len(labels)).split(250):
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


def flatness(quick: bool = False) -> list[Row]:
    """Compute input curvature and epsilon-flatness of a data set, one example at a time and in batches.

    Both implementations use the same model (lenet) and images, and their scores are compared.

    Raises:
        RuntimeError: The two implementations disagree.
    """
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
            raise RuntimeError(f"{name}: the two implementations disagree")
        scale = 1_000 / count
        rows.append(Row(name, plain * scale, ours * scale, "s per 1,000 images", 5.0))
    return rows


BENCHMARKS = {"variances": variances, "flatness": flatness}

if __name__ == "__main__":
    run(BENCHMARKS, __doc__)
