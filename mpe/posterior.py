"""Gaussian posteriors over the weights, taken from an optimizer's state or fitted with the Laplace approximation.

The covariances (Nickl et al. 2023, Table 1 and App. I.5) for N training examples, prior precision delta, and the loss
``sum of cross-entropies + delta/2 |w|^2``: iBLR ``1 / (N h + delta)``, Adam ``1 / (N sqrt(second moments) + delta)``,
Laplace ``1 / (GGN + delta)``, elementwise or in KFAC's eigenbases.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from tqdm import tqdm

from mpe.config import STRUCTURES
from src.errors import MeasurementError
from src.jacobians import DensePosterior, Posterior, exact_ggn, ggn_diagonal, kronecker_factors
from src.optimizers import rate

log = logging.getLogger(__name__)

MOMENTUM = 0.9  # of sgd


def optimizer_posterior(
    optimizer: Optimizer, model: nn.Module, *, num_examples: int | None = None, delta: float | None = None
) -> Posterior:
    """Build the posterior from an optimizer's state, centered at the model's current parameters.

    Call this outside of ``sampled_params``, since the mean of the posterior is the model.

    Args:
        optimizer: ``src.optimizers.IBLR`` or ``ivon.IVON``, whose state has N and delta; or torch's ``Adam`` or
            ``AdamW`` after a step of every parameter (second moments without bias correction).
        model: the model. Parameters are matched by identity, in any number of groups. Frozen ones are skipped.
        num_examples: N, the number of examples in the mean training loss. Required for Adam. If given for iBLR, it
            must match the state.
        delta: prior precision, N times the coefficient of the L2 term (or of the decoupled weight decay). Required
            for Adam. If given for iBLR, it must match the state.

    Returns:
        Variances of each trainable parameter, by name.

    Raises:
        ValueError: the optimizer is not supported, a trainable parameter has no state, a number is missing or
            contradicts the state, or a variance is not positive and finite.
    """
    model = getattr(model, "_orig_mod", model)
    if all({"ess", "hess", "weight_decay"} <= group.keys() for group in optimizer.param_groups):  # IBLR, ivon.IVON
        found = _ivon_variances(optimizer, num_examples, delta)
    elif isinstance(optimizer, Adam | AdamW):
        found = _adam_variances(optimizer, num_examples, delta)
    else:
        raise ValueError(
            f"{type(optimizer).__name__} does not learn variances; give an iBLR (IVON), Adam, or AdamW optimizer, "
            "or use a Laplace posterior"
        )
    blocks = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) not in found:
            raise ValueError(
                f"the optimizer has no state for parameter {name!r}; give this model's optimizer, after a step that "
                "updated every trainable parameter"
            )
        blocks[name] = found[id(p)].view(p.shape)
        if not bool((blocks[name].isfinite() & (blocks[name] > 0)).all()):
            raise ValueError(f"the optimizer's variances of parameter {name!r} are not all positive and finite")
    return Posterior(blocks)


def sgd_time(epochs: int, lr: float, lr_min: float, count: int, batch_size: int) -> float:
    """The ``time`` of `laplace_posterior` for SGD with momentum 0.9 and a cosine schedule.

    Args:
        epochs: Number of epochs.
        lr: Learning rate of the first epoch.
        lr_min: Final learning rate of the schedule.
        count: N, the number of training examples.
        batch_size: Examples per step.
    """
    rates = [rate("cosine", epoch, epochs, lr, lr_min) for epoch in range(1, epochs + 1)]
    return math.ceil(count / batch_size) * sum(rates) / (1.0 - MOMENTUM) / count


def _ivon_variances(optimizer: Optimizer, num_examples: int | None, delta: float | None) -> dict[int, Tensor]:
    """``1 / (N (h + delta/N))``, keyed by parameter identity. The state is flat, in the order of the parameters."""
    found: dict[int, Tensor] = {}
    for group in optimizer.param_groups:
        own = {"num_examples": (num_examples, group["ess"]), "delta": (delta, group["ess"] * group["weight_decay"])}
        for name, (given, held) in own.items():
            if given is not None and abs(given - held) > 1e-6 * abs(held):
                raise ValueError(f"{name}={given} contradicts the optimizer's value {held:g}; omit it")
        flat = 1.0 / (group["ess"] * (group["hess"].detach().double() + group["weight_decay"]))
        pieces = flat.split([p.numel() for p in group["params"]])
        found.update((id(p), piece) for p, piece in zip(group["params"], pieces, strict=True))
    return found


def _adam_variances(optimizer: Optimizer, num_examples: int | None, delta: float | None) -> dict[int, Tensor]:
    """``1 / (N sqrt(second moments) + delta)``, keyed by parameter identity, for all parameters with a step."""
    if num_examples is None or delta is None:
        raise ValueError("the Adam posterior needs num_examples and delta, which Adam's state does not contain")
    if num_examples < 1 or not 0.0 < delta < float("inf"):
        raise ValueError(f"num_examples must be at least 1 and delta positive, got {num_examples} and {delta}")
    return {
        id(p): 1.0 / (num_examples * optimizer.state[p]["exp_avg_sq"].detach().double().sqrt() + delta)
        for group in optimizer.param_groups
        for p in group["params"]
        if "exp_avg_sq" in optimizer.state.get(p, {})
    }


def laplace_posterior(
    model: nn.Module,
    batches: Iterable[Tensor | Sequence[Tensor]],
    delta: float,
    *,
    structure: str = "kfac",
    time: float | None = None,
    memory_mb: float = 128.0,
    progress: bool = False,
) -> Posterior | DensePosterior:
    """Fit a Laplace posterior with the GGN of the summed cross-entropy over all batches, at the current parameters.

    With ``kfac``, linear layers and convolutions have Kronecker factors (Martens and Grosse 2015). All other
    parameters (FRN, BatchNorm, ...) have a diagonal GGN, which is logged.

    Args:
        model: the model, with outputs (b, C); unchanged.
        batches: the training examples, as images or as ``(images, ...)``; labels are not used.
        delta: prior precision (delta, not delta/N).
        structure: one of ``STRUCTURES``.
        time: training time, to account for directions along which SGD has not converged; see
            `src.jacobians.posterior.laplace_variances`. None for convergence, as in the paper.
        memory_mb: see `src.jacobians.OutputVariances`.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the structure is unknown, delta is not positive, there are no examples, or the engine does not
            support the model.
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure {structure!r} is not one of {', '.join(STRUCTURES)}")
    if not 0.0 < delta < float("inf"):
        raise ValueError(f"the prior precision delta must be positive and finite, got {delta}")
    batches = tqdm(batches, desc=f"Laplace {structure}", leave=False, disable=None if progress else True)
    with _without_tf32():
        fit = {"kfac": kronecker_factors, "diag": ggn_diagonal, "ggn": exact_ggn}[structure]
        curvature = fit(model, batches, memory_mb)
    if structure == "kfac" and curvature.diagonals:
        names = list(curvature.diagonals)
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        log.info("KFAC: using a diagonal GGN for %d parameters without Kronecker factors: %s", len(names), shown)
    return curvature.posterior(delta, time)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Disable TF32 temporarily: factors are sums of many products, and their small eigenvalues matter."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


EPS = 1e-10
"""Lower bound on errors, on p (1 - p), and on probabilities in logarithms."""


def clamped_errors(errors: Tensor) -> Tensor:
    """Clamp the magnitudes of errors to ``[EPS, 1 - EPS]``, keeping the sign; 0 counts as positive."""
    return errors.abs().clamp(EPS, 1.0 - EPS).copysign(torch.where(errors < 0, -1.0, 1.0).to(errors))


def clamped_nll(log_probabilities: Tensor) -> Tensor:
    """``-log max(p, EPS)``: at most 23.026 nats."""
    return -log_probabilities.exp().clamp(min=EPS).log()


def refuse_not_finite(indices: Tensor, *values: Tensor) -> None:
    """Refuse values that are not finite, since a mean over examples would silently become NaN.

    Args:
        indices: (n,), the examples' original indices.
        values: each (n, ...).

    Raises:
        MeasurementError: a value is not finite; the message names the first such examples.
    """
    wrong = torch.stack([~value.isfinite().reshape(len(value), -1).all(1) for value in values]).any(0)
    found = indices[wrong.cpu()].sort().values.tolist()
    if found:
        first = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
        raise MeasurementError(
            f"the sensitivities of {len(found)} of {len(indices)} examples are not finite (indices {first}): their "
            "images are not finite, or their logits or variances are too large; fix the images, train with a "
            "lower learning rate, or choose a larger delta"
        )


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of a model with a posterior for n examples and C classes, on the CPU.

    Attributes:
        indices: int64 (n,), the examples' original indices.
        labels: int64 (n,).
        logits: float64 (n, C), at the posterior's mean.
        variances: float64 (n, C) logit variances, or (n, C, C) covariances.

    Raises:
        ValueError: the shapes do not match.
        MeasurementError: a value is not finite.
    """

    indices: Tensor
    labels: Tensor
    logits: Tensor
    variances: Tensor

    def __post_init__(self) -> None:
        n, c = self.logits.shape
        if self.variances.shape not in ((n, c), (n, c, c)) or len(self.labels) != n or len(self.indices) != n:
            shapes = [tuple(t.shape) for t in (self.indices, self.labels, self.logits, self.variances)]
            raise ValueError(f"the shapes of indices, labels, logits, and variances do not match: {shapes}")
        refuse_not_finite(self.indices, self.logits, self.variances)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def full(self) -> bool:
        """Whether the variances are (n, C, C) covariances."""
        return self.variances.ndim == 3

    @cached_property
    def probabilities(self) -> Tensor:
        """Float64 (n, C), the softmax of the logits."""
        return self.logits.softmax(1)

    @cached_property
    def residuals(self) -> Tensor:
        """Float64 (n, C): probabilities minus one-hot labels, unclamped (they sum to 0)."""
        return self.probabilities - nn.functional.one_hot(self.labels, self.logits.shape[1])

    @cached_property
    def errors(self) -> Tensor:
        """Float64 (n, C): the residuals, clamped as in the paper's experiments (`clamped_errors`)."""
        return clamped_errors(self.residuals)

    @property
    def diagonal(self) -> Tensor:
        """Float64 (n, C), the variance of each logit."""
        return self.variances.diagonal(dim1=1, dim2=2) if self.full else self.variances

    @property
    def accuracy(self) -> float:
        """Fraction of examples whose most probable class is the label."""
        return (self.logits.argmax(1) == self.labels).double().mean().item()

    @property
    def nll(self) -> float:
        """Mean of ``-log p`` over examples, where p is the label's probability, clamped to at least 1e-10."""
        return clamped_nll(self.logits.log_softmax(1).gather(1, self.labels.unsqueeze(1))).mean().item()


def predict(
    engine: Callable[[Tensor], tuple[Tensor, Tensor]],
    batches: Iterable[Sequence[Tensor]],
    *,
    progress: bool = False,
) -> Predictions:
    """Compute the logits and variances of all examples in one pass.

    Args:
        engine: an entered `src.jacobians.OutputVariances`, or `mpe.laplace_torch.LaplaceTorchVariances`.
        batches: ``(images, labels)`` or ``(images, labels, indices, ...)``. A third entry is interpreted as original
            indices if it contains integers. Without indices, examples are numbered from 0 in order.
        progress: whether to show a progress bar.

    Returns:
        The predictions, in the order of the batches.

    Raises:
        ValueError: there are no examples, fewer than two classes, invalid labels, or duplicate indices.
        MeasurementError: an image, a logit, or a variance is not finite.
    """
    device = next(engine.model.parameters()).device
    parts: list[tuple[Tensor, ...]] = []
    seen = 0
    for batch in tqdm(batches, desc="Variances", leave=False, disable=None if progress else True):
        images, labels = batch[0], torch.as_tensor(batch[1]).to("cpu", torch.int64)
        if not len(labels):
            continue  # a rank may have no examples
        given = given_indices(batch)
        indices = torch.arange(seen, seen + len(labels)) if given is None else given
        refuse_not_finite(indices, images)
        logits, variances = engine(images.to(device))
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ValueError(
                f"the model must return (b, C) logits for at least two classes, got shape {tuple(logits.shape)}"
            )
        if labels.ndim != 1 or labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise ValueError(f"labels must be (b,) class numbers below {logits.shape[1]}, the number of logits")
        parts.append((indices, labels, logits.to("cpu", torch.float64), variances.to("cpu", torch.float64)))
        seen += len(labels)
    if not parts:
        raise ValueError("there are no examples to predict")
    found = Predictions(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    if len(found.indices.unique()) < len(found):
        raise ValueError("the batches contain duplicate indices")
    return found


def given_indices(batch: Sequence[Tensor]) -> Tensor | None:
    """The batch's original indices, int64 on the CPU, if its third entry contains integers; otherwise None."""
    third = batch[2] if len(batch) > 2 else None
    if not isinstance(third, Tensor) or third.is_floating_point() or third.shape != (len(batch[1]),):
        return None
    return third.to("cpu", torch.int64)


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices that divide ``count`` examples into chunks of ``size``."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
