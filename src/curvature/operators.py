"""Products of a loss's curvature matrix with vectors: the Hessian and the generalized Gauss-Newton matrix (GGN).

The loss is the mean cross-entropy of a trained model over a set of examples. The matrices, ``(P, P)`` over all
trainable parameters, are never formed. A product is exact (no finite differences) and takes one pass over the set:
tangents ``J v`` are pushed forward through the model along with its outputs ``z``, then one backward pass pulls back
what each matrix needs (Pearlmutter 1994, "Fast exact multiplication by the Hessian"; Schraudolph 2002, "Fast
curvature matrix-vector products for second-order gradient descent"):

    GGN v      =  J^T (L J v)                                L = (diag p - p p^T) / n,   p = softmax(z)
    Hessian v  =  J^T (L J v)  +  d<e, J v> / d parameters   e = (p - onehot(y)) / n, held fixed

On one CPU thread, this takes 0.7 to 0.8 times as long as differentiating the gradient or as curvlinops' operators
(``python -m benchmarks.curvature hessian``), which serve as the reference in the tests. Keeping a batch's
graphs between products would not save time on convolutions: the second backward pass alone takes longer. No graph
outlives its batch, and a product leaves no state behind.
"""

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from src import rng
from src.datasets import Batch
from src.errors import MeasurementError
from src.jacobians import refuse_batch_statistics
from src.models.base import eval_mode

log = logging.getLogger(__name__)

_TRIED = 8  # number of examples
_TOLERANCE = 1e-3  # relative to the norm; rounding errors are far smaller, and wrong derivatives far larger
_PIECE = 2**20  # entries converted to float64 at once


class CurvatureOperator(ABC):
    """A symmetric matrix ``(P, P)``, available through its products with vectors.

    The model runs in eval mode, and its modes, buffers, gradients and hooks are restored.

    Args:
        model: The model; derivatives are with respect to its parameters that require a gradient.
        batches: Un-augmented batches on the model's device, identical in each iteration.
        examples: Total number n of examples in the batches.

    Attributes:
        size: P, the number of trainable parameters; shared parameters count once.
        dtype: Dtype of vectors.
        device: Device of vectors.
        products: Number of products computed so far.

    Raises:
        ValueError: No parameter requires a gradient, or a BatchNorm layer has no running statistics.
    """

    name = ""

    def __init__(self, model: nn.Module, batches: Iterable[Batch], examples: int) -> None:
        self.model, self.batches, self.examples = model, batches, examples
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("no parameter of the model requires a gradient")
        with eval_mode(model):
            refuse_batch_statistics(model)
        self.names, self.parameters = list(trainable), list(trainable.values())
        self.size = sum(p.numel() for p in self.parameters)
        self.dtype, self.device = self.parameters[0].dtype, self.parameters[0].device
        self.products = 0

    def __matmul__(self, vector: Tensor) -> Tensor:
        """Multiply by a vector ``(P,)``.

        Raises:
            MeasurementError: The product is not finite.
        """
        tangents = self.unflatten(vector)
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        with eval_mode(self.model), _differentiable_forward(self.device):
            for batch in self.batches:
                if len(batch.labels):
                    total += self.flatten(self._product(batch, tangents))
        self.products += 1
        if not total.isfinite().all():
            raise MeasurementError(
                f"the product with the {self.name} is not finite; try --precision=fp64, or retrain the model with a "
                "lower --learning_rate"
            )
        return total

    @abstractmethod
    def _product(self, batch: Batch, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """One batch's contribution to a product, per parameter."""

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """Compute the mean loss over the set and its gradient ``(P,)``.

        Raises:
            MeasurementError: The loss or the gradient is not finite.
        """
        loss, gradient = 0.0, torch.zeros(self.size, dtype=self.dtype, device=self.device)
        with eval_mode(self.model), _differentiable_forward(self.device):
            for batch in self.batches:
                if not len(batch.labels):
                    continue
                outputs = self.model(batch.images)
                part = F.cross_entropy(outputs.double(), batch.labels, reduction="sum") / self.examples
                gradient += self.flatten(self._pull_back((outputs,), (torch.autograd.grad(part, outputs)[0],)))
                loss += part.item()
        for what, value in (("loss", torch.tensor(loss)), ("gradient of the loss", gradient)):
            if not value.isfinite().all():
                raise MeasurementError(
                    f"the {what} is not finite; the model has diverged, so retrain it with a lower --learning_rate"
                )
        return loss, gradient

    def flatten(self, parts: Sequence[Tensor]) -> Tensor:
        """Concatenate one tensor per parameter into a vector ``(P,)``."""
        return torch.cat([part.reshape(-1) for part in parts])

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Split a vector ``(P,)`` into one tensor per parameter."""
        pieces = vector.to(self.dtype).split([p.numel() for p in self.parameters])
        return [piece.reshape(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def _push_forward(self, images: Tensor, tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute outputs ``z`` and ``J v``, each ``(b, C)`` with its graph.

        The dual level ends before anything is pulled back: a backward pass inside it would propagate tangents too,
        and take twice as long.
        """
        with forward_ad.dual_level():
            named = zip(self.names, self.parameters, tangents, strict=True)
            duals = {name: forward_ad.make_dual(p, t) for name, p, t in named}
            outputs, pushed = forward_ad.unpack_dual(functional_call(self.model, duals, (images,)))
        return outputs, torch.zeros_like(outputs) if pushed is None else pushed

    def _pull_back(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients of the inner product of outputs and cotangents, per parameter."""
        pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        if not pairs:
            return [torch.zeros_like(p) for p in self.parameters]
        chosen, weights = zip(*pairs, strict=True)
        return torch.autograd.grad(chosen, self.parameters, weights, materialize_grads=True)

    def _loss_curvature(self, outputs: Tensor, pushed: Tensor) -> Tensor:
        """``L J v`` in float64, ``(b, C)``; in float32, the contributions of confident outputs would round to 0."""
        p, pushed = outputs.detach().double().softmax(dim=1), pushed.detach().double()
        weighted = p * pushed
        return (weighted - p * weighted.sum(dim=1, keepdim=True)) / self.examples


class GGN(CurvatureOperator):
    """The generalized Gauss-Newton matrix of the mean cross-entropy, positive semi-definite."""

    name = "ggn"

    def _product(self, batch: Batch, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        outputs, pushed = self._push_forward(batch.images, tangents)
        return self._pull_back((outputs,), (self._loss_curvature(outputs, pushed),))


class Hessian(CurvatureOperator):
    """The Hessian of the mean cross-entropy.

    Not every operation's tangent can be differentiated: softmax raises an error, and layer norm silently gives a
    wrong gradient (torch 2.13). The first product therefore tries both methods on a few examples. If they disagree,
    all products differentiate the gradient instead. If that result is not symmetric, the product fails (weight norm
    is wrong both ways).
    """

    name = "hessian"
    _trusted: bool | None = None

    def _product(self, batch: Batch, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        if self._trusted is None:
            self._trusted = self._ways_agree(batch)
        product = self._by_tangents if self._trusted else self._by_gradients
        return product(batch.images, batch.labels, tangents)

    def _by_tangents(self, images: Tensor, labels: Tensor, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        outputs, pushed = self._push_forward(images, tangents)
        logits = outputs.detach().double()
        error = (logits.softmax(dim=1) - F.one_hot(labels, logits.shape[1])) / self.examples
        return self._pull_back((outputs, pushed), (self._loss_curvature(outputs, pushed), error))

    def _by_gradients(self, images: Tensor, labels: Tensor, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        loss = F.cross_entropy(self.model(images).double(), labels, reduction="sum") / self.examples
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True)
        return self._pull_back(gradients, tangents)

    def _ways_agree(self, batch: Batch) -> bool:
        few, labels = batch.images[:_TRIED], batch.labels[:_TRIED]
        generator = rng.generator(0, 0, "vectors on which products are tried")
        vectors = torch.randn(2, self.size, generator=generator, dtype=self.dtype).to(self.device)
        expected, other = (self.flatten(self._by_gradients(few, labels, self.unflatten(v))) for v in vectors)
        try:
            found = self.flatten(self._by_tangents(few, labels, self.unflatten(vectors[0])))
            agree = bool((found - expected).norm() <= _TOLERANCE * expected.norm())
            reason = "the gradient of a tangent is wrong"
        except RuntimeError as error:
            agree, reason = False, str(error).split("\n")[0][:100]
        if not agree:
            log.info("Hessian products: differentiating the gradient instead of tangents (%s)", reason)
            ab, ba = dot(vectors[1], expected), dot(vectors[0], other)
            if abs(ab - ba) > _TOLERANCE * dot(vectors[1], vectors[1]) ** 0.5 * dot(expected, expected) ** 0.5:
                raise MeasurementError(
                    "torch differentiates an operation of this model incorrectly: its Hessian is not symmetric; "
                    "use --operator=ggn or another model"
                )
        return agree


OPERATORS: dict[str, type[CurvatureOperator]] = {operator.name: operator for operator in (Hessian, GGN)}


class _PlainFormulas(TorchFunctionMode):
    """Replaces functions whose derivative torch cannot differentiate by explicit formulas."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        if function is F.hardswish:
            return args[0] * (F.relu6(args[0] + 3) / 6)
        return function(*args, **(kwargs or {}))


@contextmanager
def _differentiable_forward(device: torch.device) -> Iterator[None]:
    """Enable gradients, disable autocast, and avoid fused attention kernels, which lack second derivatives."""
    plain = sdpa_kernel(SDPBackend.MATH), _PlainFormulas()
    with torch.enable_grad(), torch.autocast(device.type, enabled=False), plain[0], plain[1]:
        yield


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product of two vectors, summed in float64 in chunks."""
    return sum((x.double() @ y.double()).item() for x, y in zip(a.split(_PIECE), b.split(_PIECE), strict=True))


# --------------------------------------------------------------------------------------------- power iteration


class _Loader:
    """Yields batches as pairs and calls ``done`` at the end of each pass, which is one product."""

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
    """The Hessian's eigenvalues of largest magnitude, by power iteration with deflation (the pyhessian package).

    Included for comparison with the SAMIS paper, which uses it. It takes many times as many products as a Lanczos run
    and stops once an eigenvalue changes little between iterations, which is weaker evidence than a residual.

    Args:
        operator: The Hessian; its products are counted.
        top_n: Number of eigenvalues.
        iterations: Maximum iterations per eigenvalue.
        tolerance: Relative change between two iterations at which an eigenvalue is accepted.
        seed: Seed of the start vectors.
        done: Called after each product.

    Returns:
        Eigenvalues ``(top_n,)``, largest magnitude first, and unit vectors ``(top_n, P)``.
    """
    from pyhessian import hessian

    def count() -> None:
        operator.products += 1
        done()

    model, device = operator.model, operator.device
    on_gpu = device.type == "cuda"
    own_generators = torch.random.fork_rng(devices=[device] if on_gpu else [])  # pyhessian uses the global generators
    with eval_mode(model), _isolated(operator), own_generators, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
        torch.manual_seed(rng.derived_seed(seed, 0, "power iteration"))
        with torch.cuda.device(device) if on_gpu else nullcontext():
            loader = _Loader(operator.batches, count)
            package = hessian(model, _mean_loss, dataloader=loader, cuda=on_gpu)
            values, vectors = package.eigenvalues(maxIter=iterations, tol=tolerance, top_n=top_n)
        rows = []
        for vector in vectors:
            parts = {id(p): part.detach() for p, part in zip(package.params, vector, strict=True)}
            # zero for parameters that were hidden from pyhessian
            rows.append(operator.flatten([parts.get(id(p), torch.zeros_like(p)) for p in operator.parameters]))
    order = np.argsort(-np.abs(values), kind="stable")
    return np.array(values, dtype=np.float64)[order], torch.stack(rows)[torch.from_numpy(order)]


def _mean_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.double(), labels)


@contextmanager
def _isolated(operator: CurvatureOperator) -> Iterator[None]:
    """Set gradients aside (pyhessian adds to them) and hide unused parameters (pyhessian fails on them)."""
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
            parameter.grad = gradient  # pyhessian's gradients keep their graphs alive; this frees them


def true_residuals(operator: CurvatureOperator, values: np.ndarray, vectors: Tensor) -> np.ndarray:
    """Norms ``|H x - value x|`` for unit vectors ``(m, P)``, at the cost of one product each."""
    pairs = zip(values, vectors, strict=True)
    return np.array([torch.linalg.vector_norm((operator @ x) - value * x).item() for value, x in pairs])
