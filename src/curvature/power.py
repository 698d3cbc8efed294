"""Top eigenvalues by power iteration with deflation, through the ``pyhessian`` package of the SAMIS paper's ground.

Kept for comparison: it takes many times the products of a Lanczos run, and stops when an eigenvalue changes little
from one iteration to the next, which says less than a residual. Its density does not run on today's torch, and its
trace stops early; both are measured otherwise here.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.curvature.hessian import CurvatureOperator
from src.datasets import Batch
from src.models.base import eval_mode
from src.rng import derived_seed


class _Loader:
    """Batches as pairs, and a call at the end of each pass: a product, but for those that find eigenvalues."""

    def __init__(self, batches: Iterable[Batch], done: Callable[[], None]) -> None:
        self.batches, self.done = batches, done

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            if len(batch.labels):
                yield batch.images, batch.labels
        self.done()


def power_iteration(
    operator: CurvatureOperator,
    top_n: int,
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    done: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, Tensor]:
    """The Hessian's eigenvalues of largest magnitude.

    Args:
        operator: The Hessian; its products are counted.
        top_n: How many.
        iterations: Most iterations for each.
        tolerance: Relative change of an eigenvalue between two iterations at which it is taken.
        seed: Of the start vectors.
        done: Called after each product.

    Returns:
        Eigenvalues ``(top_n,)``, largest magnitude first, and unit vectors ``(top_n, P)``.
    """
    from pyhessian import hessian

    def count() -> None:
        operator.products += 1
        done()

    model, device = operator.model, operator.device
    with eval_mode(model), _alone(operator), _seeded(seed, device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
        chosen = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with chosen:
            loader = _Loader(operator.batches, count)
            package = hessian(model, _mean_loss, dataloader=loader, cuda=device.type == "cuda")
            values, vectors = package.eigenvalues(maxIter=iterations, tol=tolerance, top_n=top_n)
        names = {id(p): i for i, p in enumerate(package.params)}
        rows = [_whole(operator, names, vector) for vector in vectors]
    order = np.argsort(-np.abs(values), kind="stable")
    return np.array(values, dtype=np.float64)[order], torch.stack(rows)[torch.from_numpy(order)]


def _mean_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.double(), labels)


def _whole(operator: CurvatureOperator, places: dict[int, int], parts: list[Tensor]) -> Tensor:
    """A vector (P,) from the package's tensors per parameter; zero for parameters it was not shown."""
    tensors = [parts[places[id(p)]].detach() if id(p) in places else torch.zeros_like(p) for p in operator.parameters]
    return operator.flatten(tensors)


@contextlib.contextmanager
def _alone(operator: CurvatureOperator) -> Iterator[None]:
    """Gradients put aside (the package adds to them), and parameters that nothing uses hidden (it stops at them)."""
    gradients = [p.grad for p in operator.model.parameters()]
    hidden: list[nn.Parameter] = []
    try:
        for parameter in operator.model.parameters():
            parameter.grad = None
        batch = next(b for b in operator.batches if len(b.labels))
        loss = _mean_loss(operator.model(batch.images), batch.labels)
        found = torch.autograd.grad(loss, operator.parameters, allow_unused=True)
        hidden = [p for p, g in zip(operator.parameters, found, strict=True) if g is None]
        for parameter in hidden:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in hidden:
            parameter.requires_grad_(True)
        for parameter, gradient in zip(operator.model.parameters(), gradients, strict=True):
            parameter.grad = gradient  # the package's hold the graphs they came from: this lets them go


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The package draws from torch's global generators: seeded here, and put back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derived_seed(seed, 0, "power iteration"))
        yield
