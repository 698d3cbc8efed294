"""Logits, errors and output variances of every example, from one pass."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from tqdm import tqdm

from src.errors import MeasurementError

EPS = 1e-10
"""Guard of errors, of p (1 - p), and of probabilities inside logarithms."""


def clamped_errors(errors: Tensor) -> Tensor:
    """Errors with magnitudes in ``[EPS, 1 - EPS]``; the sign is kept, and 0 counts as positive."""
    return errors.abs().clamp(EPS, 1.0 - EPS).copysign(torch.where(errors < 0, -1.0, 1.0).to(errors))


def clamped_nll(log_probabilities: Tensor) -> Tensor:
    """``-log max(p, EPS)``: at most 23.026 nats."""
    return -log_probabilities.exp().clamp(min=EPS).log()


def refuse_not_finite(indices: Tensor, *values: Tensor) -> None:
    """Stop if a number of an example is not finite: a mean over examples would become NaN without a word.

    Args:
        indices: (n,), the examples' original positions.
        values: each (n, ...).

    Raises:
        MeasurementError: the message names the first such examples.
    """
    wrong = torch.stack([~value.isfinite().reshape(len(value), -1).all(1) for value in values]).any(0)
    found = indices[wrong].sort().values.tolist()
    if found:
        first = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
        raise MeasurementError(
            f"the sensitivities of {len(found)} of {len(indices)} examples are not finite (indices {first}): their "
            "images are not finite, or their logits or variances are too large; correct the images, train with a "
            "lower learning rate, or choose a larger delta"
        )


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a network with a posterior says about n examples of C classes. All on the CPU.

    Attributes:
        indices: int64 (n,), the examples' original positions.
        labels: int64 (n,).
        logits: float64 (n, C), at the posterior's mean.
        variances: float64 (n, C) of each logit, or (n, C, C) covariances.

    Raises:
        ValueError: the shapes do not belong together.
        MeasurementError: a number is not finite.
    """

    indices: Tensor
    labels: Tensor
    logits: Tensor
    variances: Tensor

    def __post_init__(self) -> None:
        n, c = self.logits.shape
        if self.variances.shape not in ((n, c), (n, c, c)) or len(self.labels) != n or len(self.indices) != n:
            shapes = [tuple(t.shape) for t in (self.indices, self.labels, self.logits, self.variances)]
            raise ValueError(f"indices, labels, logits and variances do not belong together: {shapes}")
        refuse_not_finite(self.indices, self.logits, self.variances)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def full(self) -> bool:
        """Whether the variances are (n, C, C) covariances."""
        return self.variances.ndim == 3

    @cached_property
    def log_probabilities(self) -> Tensor:
        """Float64 (n, C)."""
        return self.logits.log_softmax(1)

    @cached_property
    def probabilities(self) -> Tensor:
        """Float64 (n, C), the softmax of the logits."""
        return self.logits.softmax(1)

    @cached_property
    def residuals(self) -> Tensor:
        """Float64 (n, C): probabilities minus one-hot labels, as they are (they sum to 0)."""
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
        """Share of examples whose most probable class is the label."""
        return (self.logits.argmax(1) == self.labels).double().mean().item()

    @property
    def nll(self) -> float:
        """Mean of ``-log p`` of the label, p clamped at 1e-10."""
        return clamped_nll(self.log_probabilities.gather(1, self.labels.unsqueeze(1))).mean().item()


def predict(
    engine: Callable[[Tensor], tuple[Tensor, Tensor]],
    batches: Iterable[Sequence[Tensor]],
    *,
    total: int | None = None,
    progress: bool = False,
) -> Predictions:
    """Logits and variances of all examples, in one pass.

    Args:
        engine: an entered `src.jacobians.OutputVariances` or `mpe.laplace_torch.LaplaceTorchVariances`.
        batches: ``(images, labels)`` or ``(images, labels, indices, ...)``. A third entry counts as original indices
            if it holds integers; without indices examples are numbered from 0 as they come.
        total: how many batches to expect, for the progress bar; by default their own length.
        progress: whether to show the bar.

    Returns:
        The predictions, in the order of the batches.

    Raises:
        ValueError: no examples, fewer than two classes, labels that are no classes, or an index that appears twice.
        MeasurementError: an image, a logit or a variance is not finite.
    """
    device = next(engine.model.parameters()).device
    parts: list[tuple[Tensor, ...]] = []
    seen = 0
    for batch in tqdm(batches, total=total, desc="Variances", leave=False, disable=None if progress else True):
        images, labels = batch[0], torch.as_tensor(batch[1]).to("cpu", torch.int64)
        if not len(labels):
            continue  # a rank's share may be empty
        given = given_indices(batch)
        indices = torch.arange(seen, seen + len(labels)) if given is None else given
        refuse_not_finite(indices, images)
        logits, variances = engine(images.to(device))
        _check_classes(logits, labels)
        parts.append((indices, labels, logits.to("cpu", torch.float64), variances.to("cpu", torch.float64)))
        seen += len(labels)
    if not parts:
        raise ValueError("there are no examples to predict")
    found = Predictions(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    if len(found.indices.unique()) < len(found):
        raise ValueError("the batches give an index to two examples")
    return found


def given_indices(batch: Sequence[Tensor]) -> Tensor | None:
    """The batch's original indices, int64 on the CPU, if its third entry holds integers; else None."""
    third = batch[2] if len(batch) > 2 else None
    if not isinstance(third, Tensor) or third.is_floating_point() or third.shape != (len(batch[1]),):
        return None
    return third.to("cpu", torch.int64)


def _check_classes(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"the model must have a logit for each of two classes or more, got {tuple(logits.shape)}")
    if labels.ndim != 1 or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels must be (b,) class numbers below {logits.shape[1]}, the number of logits")


def chunks(count: int, size: int) -> Iterator[slice]:
    """Cuts of ``count`` examples into pieces of ``size``."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
