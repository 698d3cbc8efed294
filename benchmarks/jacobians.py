"""Per-example gradients: variances of the outputs, and flatness scores.

python -m benchmarks.jacobians [variances flatness] [--quick]
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from benchmarks.common import Row, in_fresh_process, in_turn, peak, run
from src import _torchvision  # noqa: F401  prepares torchvision, which laplace-torch imports
from src.datasets import Batch
from src.devices import PRECISIONS, prepare
from src.jacobians import OutputVariances, Posterior, kronecker_factors
from src.metrics.flatness import epsilon_flatness, input_curvature
from src.models import build_model

DELTA = 60.0


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        channels: Channels of its images.
        size: Side of its images.
        batch: Batch size in the authors' commands.
        ours: Examples that ours is timed on.
        target: Required ratio under a diagonal posterior.
        kronecker: Required ratio under a Kronecker posterior; None where it is not measured.
    """

    channels: int
    size: int
    batch: int
    ours: int
    target: float
    kronecker: float | None = None


CHUNK = 8  # examples per Jacobian of the strongest alternative
CASES = {
    "large_mlp": Case(1, 28, 50, 1_000, 40.0, 300.0),
    "lenet": Case(1, 28, 500, 1_000, 2.5, 8.0),
    "cnn_deepobs": Case(3, 32, 20, 100, 1.6),
    "resnet20_frn": Case(3, 32, 30, 100, 1.1),
}
QUICK = {"large_mlp": Case(1, 8, 3, 5, 30.0, 150.0), "lenet": Case(1, 28, 3, 5, 2.5)}


def prepared(name: str, case: Case, count: int) -> tuple[nn.Module, Tensor, Posterior]:
    """A model, noise images, and a diagonal posterior."""
    model = build_model(name, 10, case.channels, case.size, seed=0).eval()
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(count, case.channels, case.size, case.size, generator=draw)
    variances = {n: 1.0 / (100.0 * torch.rand(p.shape, generator=draw) + DELTA) for n, p in model.named_parameters()}
    return model, images, Posterior(variances)


def jacobians_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The Jacobian of each parameter by ``vmap(jacrev)``, ``(b, C, ...)``."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def logits(chosen: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, chosen, (image.unsqueeze(0),))[0]

    return vmap(jacrev(logits), (None, 0))(values, images)


def all_pairs(model: nn.Module, images: Tensor, posterior: Posterior) -> Tensor:
    """The papers' code: the batch's Jacobian, its contraction to all pairs of classes, and the diagonal of that."""
    found = 0.0
    for name, jacobian in jacobians_of(model, images).items():
        jacobian = jacobian.flatten(2)
        found = found + (jacobian * posterior.blocks[name].flatten()) @ jacobian.mT
    return found.diagonal(dim1=1, dim2=2)


def diagonal_only(model: nn.Module, images: Tensor, posterior: Posterior) -> Tensor:
    """The strongest alternative: Jacobians of a few examples at a time, contracted to the diagonal alone."""
    return torch.cat(
        [
            sum(
                j.flatten(2).square() @ posterior.blocks[name].flatten()
                for name, j in jacobians_of(model, part).items()
            )
            for part in images.split(CHUNK)
        ]
    )


def our_variances(model: nn.Module, images: Tensor, posterior: Posterior) -> Tensor:
    with OutputVariances(model, posterior) as engine:
        return engine(images)[1]


def laplace_variances(model: nn.Module, images: Tensor, batch: int, chunk: int) -> Tensor:
    """laplace-torch with its asdl backend: a fit in batches, then Jacobians and variances in chunks."""
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
        for part in images.split(chunk):
            jacobians, _ = posterior.backend.jacobians(part)
            found.append(posterior.functional_variance(jacobians).diagonal(dim1=1, dim2=2).detach())
    return torch.cat(found)


def our_kronecker_variances(model: nn.Module, images: Tensor) -> Tensor:
    return our_variances(model, images, kronecker_factors(model, [images]).posterior(DELTA))


def compare(name: str, ours: Tensor, *others: Tensor) -> None:
    """Raise RuntimeError if the variances differ by more than rounding in single precision."""
    if not all(torch.allclose(other.double(), ours, rtol=1e-3) for other in others):
        raise RuntimeError(f"{name}: two implementations disagree")


def timed(name: str, target: float, counts: Sequence[int], ways: Sequence[Callable], repeats: int) -> Row:
    """One row, in milliseconds per example; the implementations process ``counts`` examples."""
    times = in_turn(ways, repeats)
    authors, chunks, ours = (1_000 * t / count for t, count in zip(times, counts, strict=True))
    return Row(name, authors, min(authors, chunks), ours, "ms per example", target)


def peak_of(way: Callable, name: str, case: Case, count: int) -> float:
    """Peak memory in MiB of one implementation on ``count`` images; of one image for the baseline."""
    way(*prepared(name, case, count))
    return peak()


def variances(quick: bool = False) -> list[Row]:
    """Variances of logits under a Gaussian posterior, and their memory.

    Diagonal posterior. Authors: the Jacobian of a batch by ``vmap(jacrev)``, contracted to all pairs of classes.
    Kronecker posterior: laplace-torch with its asdl backend, fit, eigendecomposition and variances. Strongest
    alternative: the faster of that and chunks of 8 examples, with Jacobians contracted to the diagonal alone. The
    authors' batch sizes are from their commands (except for resnet20_frn, where 300 examples exceed the memory of
    small machines); this project's engine chooses its own batch size. The variances are compared. Memory is not
    measured in quick mode.

    Raises:
        RuntimeError: Two implementations disagree.
    """
    prepare(torch.device("cpu"), PRECISIONS["fp32"], deterministic=False)  # keeps freed memory, for all ways
    rows = []
    repeats = 1 if quick else 2
    cases = QUICK if quick else CASES
    for name, case in cases.items():
        model, images, posterior = prepared(name, case, max(case.batch, case.ours))
        few, some, many = images[: case.batch], images[: min(case.batch, 40)], images[: case.ours]
        counts = (len(few), len(some), len(many))
        ours = our_variances(model, few, posterior)
        compare(name, ours, all_pairs(model, few, posterior), diagonal_only(model, few, posterior))
        ways = [
            lambda model=model, few=few, posterior=posterior: all_pairs(model, few, posterior),
            lambda model=model, some=some, posterior=posterior: diagonal_only(model, some, posterior),
            lambda model=model, many=many, posterior=posterior: our_variances(model, many, posterior),
        ]
        title = f"output variances, diagonal posterior, {name}"
        rows.append(timed(title, case.target, counts, ways, repeats))
        if case.kronecker is None:
            continue
        other, batch = (
            prepared(name, case, 1)[0],
            case.batch,
        )  # a copy, as laplace-torch leaves attributes on its model
        theirs = laplace_variances(other, few, batch, CHUNK)
        compare(name, our_kronecker_variances(model, few), theirs)
        ways = [
            lambda other=other, few=few, batch=batch: laplace_variances(other, few, batch, batch),
            lambda other=other, few=few, batch=batch: laplace_variances(other, few, batch, CHUNK),
            lambda model=model, many=many: our_kronecker_variances(model, many),
        ]
        title = f"KFAC: fit and output variances, {name}"
        rows.append(timed(title, case.kronecker, (len(few), len(few), len(many)), ways, 1))
    if quick:
        return rows
    case = cases["lenet"]
    grown = [
        in_fresh_process(peak_of, way, "lenet", case, case.batch) - in_fresh_process(peak_of, way, "lenet", case, 1)
        for way in (all_pairs, diagonal_only, our_variances)
    ]
    rows.append(Row(f"memory of output variances, lenet, {case.batch} images", *(max(g, 0.1) for g in grown), "MiB"))
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


def curvature_in_batches(model: nn.Module, images: Tensor, labels: Tensor, h: float = 3.0) -> np.ndarray:
    """The strongest alternative: input gradients of whole batches, as examples are independent."""

    def gradients(batch: Tensor, targets: Tensor) -> Tensor:
        leaf = batch.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(leaf), targets, reduction="sum"), leaf)[0]

    scores = []
    for batch, targets in zip(images.split(250), labels.split(250), strict=True):
        before = gradients(batch, targets)
        signs = before.sign()
        norms = signs.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        after = gradients(batch + h * (signs + 1e-7) / (norms + 1e-7), targets)
        scores.append((after - before).flatten(1).norm(dim=1))
    return torch.cat(scores).numpy()


def epsilon_in_batches(model: nn.Module, images: Tensor, labels: Tensor, rho: float = 0.05) -> np.ndarray:
    """The strongest alternative: per-example gradients by ``vmap(grad)`` in chunks."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (image[None],)), label[None])

    gradients, scores = vmap(grad(loss), (None, 0, 0)), []
    for part, targets in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
        found = gradients(parameters, part, targets)
        steps = sum((w * found[name]).flatten(1).square().sum(dim=1) for name, w in parameters.items()).sqrt() + 1e-12
        moved = sum((w.square() * found[name]).flatten(1).square().sum(dim=1) for name, w in parameters.items())
        scores.append(rho * moved.sqrt() / steps)
    return torch.cat(scores).numpy()


def flatness(quick: bool = False) -> list[Row]:
    """Input curvature and epsilon-flatness of 1,000 images, lenet.

    The column of the authors has the definition applied to one example at a time. Strongest alternatives: input
    gradients of whole batches, where a ratio of 1 is the best possible, and ``vmap(grad)`` in chunks of 8.

    Raises:
        RuntimeError: Two implementations disagree.
    """
    count, repeats = (20, 1) if quick else (1_000, 2)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 28, 28, generator=draw)
    labels = torch.randint(10, (count,), generator=draw)
    model = build_model("lenet", 10, 1, 28, seed=0).eval()
    rows = []
    for name, loop, batched, engine, target in (
        ("input curvature, lenet", curvature_loop, curvature_in_batches, input_curvature, 0.9),
        ("epsilon-flatness, lenet", epsilon_loop, epsilon_in_batches, epsilon_flatness, 3.0),
    ):
        found: dict[str, np.ndarray] = {}
        ways = (
            lambda loop=loop, found=found: found.update(authors=loop(model, images, labels)),
            lambda batched=batched, found=found: found.update(strongest=batched(model, images, labels)),
            lambda engine=engine, found=found: found.update(
                ours=engine(model, in_batches(images, labels), total=count)
            ),
        )
        times = in_turn(ways, repeats)
        if not all(np.allclose(found["ours"], other, rtol=1e-3) for other in found.values()):
            raise RuntimeError(f"{name}: two implementations disagree")
        rows.append(Row(name, *(1_000 / count * t for t in times), "s per 1,000 images", target))
    return rows


BENCHMARKS = {"variances": variances, "flatness": flatness}

if __name__ == "__main__":
    run(BENCHMARKS, __doc__)
