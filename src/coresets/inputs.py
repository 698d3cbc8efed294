"""The interface of a selection method: its inputs, its output, and its registry entry."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from src.cli import check_options, number, option
from src.datasets.splits import ROUNDING, rounded_share
from src.errors import ArgumentError, UserError
from src.lazy import torch


def _refuse_not_finite(name: str, finite: np.ndarray | torch.Tensor) -> None:
    """Refuse NaN and infinite values, given one flag per example ``(n,)`` that is True if all its values are finite.

    Raises:
        UserError: An example has a non-finite value.
    """
    if not bool(finite.all()):
        first = int(np.flatnonzero(~np.asarray(finite.tolist()))[0])
        raise UserError(f"{name}: the values of example {first} are not finite; every value must be a finite number")


def _refuse_other_lengths(count: int, arrays: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an array whose number of examples differs from ``count``, given the shape of each array by name.

    Raises:
        UserError: An array has a different length.
    """
    for name, shape in arrays.items():
        if len(shape) == 0 or shape[0] != count:
            raise UserError(
                f"{name}: has shape {tuple(shape)}, but there are {count} labels; give one row per example"
            )


@dataclass(frozen=True)
class Selection:
    """The selected examples.

    Attributes:
        indices: int64 ``(k,)``, ascending, without duplicates: positions among the candidates during selection,
            original indices in files.
        weights: float64 ``(k,)``, the sample weights for training; all 1, or with mean 1 if the method assigns
            weights (InfoBatch: with sum n). Training divides by their sum.

    Raises:
        UserError: An index is negative or repeated, or a weight is missing, negative or not finite.
    """

    indices: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        if self.weights.shape != self.indices.shape:
            raise UserError(f"weights: got {self.weights.size} for {self.indices.size} indices; give one per index")
        ordered = np.sort(self.indices)  # cheaper than np.unique
        if (ordered[:1] < 0).any() or (ordered[1:] == ordered[:-1]).any():
            raise UserError("indices: an index is negative or repeated; give each position at most once")
        if not (np.isfinite(self.weights) & (self.weights >= 0)).all():
            raise UserError("weights: a weight is not finite or is negative; give finite numbers of at least 0")

    @classmethod
    def of(cls, picks: Sequence[np.ndarray], weights: Sequence[np.ndarray] | None = None) -> Selection:
        """Merge the picks of all groups, in data set order.

        Args:
            picks: One array of positions per group, each in any order.
            weights: Weights of the same shapes; 1 by default.
        """
        indices = np.concatenate([np.asarray(part, dtype=np.int64) for part in picks])
        values = np.ones(len(indices)) if weights is None else np.concatenate(weights).astype(np.float64)
        order = np.argsort(indices, kind="stable")
        return cls(indices[order], values[order])

    @property
    def weighted(self) -> bool:
        """Whether any weight differs from 1."""
        return bool((self.weights != 1).any())

    def rescaled(self) -> Selection:
        """Return the same selection with weights scaled to mean 1.

        Raises:
            UserError: All weights are 0.
        """
        mean = self.weights.mean()
        if not mean > 0:
            raise UserError("the selection's weights are all 0; choose another method or a larger fraction")
        return Selection(self.indices, self.weights / mean)


@dataclass(frozen=True)
class CandidateGroup:
    """Candidates that a method selects from together: one class, or all examples.

    Attributes:
        positions: int64 ``(m,)``, ascending.
        budget: Number to select, from 1 to m.
        label: The class; None for the group of all examples.

    Raises:
        UserError: The budget is not from 1 to m, or the positions are negative, unsorted or repeated.
    """

    positions: np.ndarray
    budget: int
    label: int | None = None

    def __post_init__(self) -> None:
        which = "the group" if self.label is None else f"class {self.label}"
        count = len(self.positions)
        if not 1 <= self.budget <= count:
            raise UserError(f"budget {self.budget}: {which} has {count} examples; choose 1 to {count}")
        if self.positions[0] < 0 or (np.diff(self.positions) <= 0).any():
            raise UserError(f"positions of {which}: must be nonnegative and ascending, without duplicates")


@dataclass(frozen=True)
class LastLayer:
    """The inputs and outputs of a pre-trained model's last layer for each candidate, un-augmented, in eval mode.

    The gradient of an example's cross-entropy in the last layer's bias and weights is ``[e, e (x) h]``.

    Attributes:
        logits: ``(n, C)``.
        labels: int64 ``(n,)``.
        embeddings: h, ``(n, d)``; None if the method does not need them.
        gradient_norms: ``(n,)``, norms of the gradients in all parameters; None if the method does not need them.

    Raises:
        UserError: A value is not finite, a label is outside 0 to C - 1, or the arrays differ in length.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    embeddings: torch.Tensor | None = None
    gradient_norms: torch.Tensor | None = None

    def __post_init__(self) -> None:
        optional = {"embeddings": self.embeddings, "gradient_norms": self.gradient_norms}
        given = {"logits": self.logits, **{name: values for name, values in optional.items() if values is not None}}
        _refuse_other_lengths(len(self.labels), {name: values.shape for name, values in given.items()})
        for name, values in given.items():
            _refuse_not_finite(name, values.isfinite().reshape(len(values), -1).all(dim=1))
        _refuse_other_labels(self.labels.cpu().numpy(), self.logits.shape[1])

    @cached_property
    def errors(self) -> torch.Tensor:
        """``softmax(z) - onehot(y)``, ``(n, C)``, in the logits' dtype."""
        return errors_of(self.logits, self.labels)

    @cached_property
    def losses(self) -> torch.Tensor:
        """Cross-entropies ``(n,)``, float64."""
        return torch.nn.functional.cross_entropy(self.logits.double(), self.labels, reduction="none")

    def at(self, positions: np.ndarray) -> LastLayer:
        """The last layer of a subset of the candidates; all of them, in order, are returned without a copy."""
        if np.array_equal(positions, np.arange(len(self.labels))):
            return self
        chosen = torch.from_numpy(np.ascontiguousarray(positions)).to(self.labels.device)
        optional = [None if t is None else t[chosen] for t in (self.embeddings, self.gradient_norms)]
        return LastLayer(self.logits[chosen], self.labels[chosen], *optional)


def _refuse_other_labels(labels: np.ndarray, num_classes: int) -> None:
    """Refuse a label that is not a class index.

    Raises:
        UserError: A label is not a class index.
    """
    bad = np.flatnonzero(~((labels >= 0) & (labels < num_classes) & (labels == np.floor(labels))))
    if len(bad):
        raise UserError(f"labels: label {labels[bad[0]]} of example {bad[0]} is not from 0 to {num_classes - 1}")


def errors_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute ``softmax(z) - onehot(y)``, ``(n, C)``; the softmax is in float64 to keep digits of small errors.

    Memory in addition to the result: 2048 rows in float64.
    """
    result = torch.empty_like(logits)
    for first in range(0, len(logits), 2048):
        part = slice(first, first + 2048)
        errors, right = torch.softmax(logits[part].double(), dim=1), labels[part, None]
        # compute 1 - p as the sum of the other probabilities: exact even if p rounds to 1
        errors.scatter_(1, right, 0.0)
        errors.scatter_(1, right, -errors.sum(dim=1, keepdim=True))
        result[part] = errors
    return result


@dataclass(frozen=True)
class SelectionInputs:
    """Everything that a selection may depend on; inputs that the method's entry does not request are absent.

    Attributes:
        labels: int64 ``(n,)``, labels of the candidates.
        num_classes: C.
        seed: Seed of the method's random draws.
        scores: ``(n,)``, the stored score, or the score computed from the training dynamics.
        dynamics: Recorded arrays ``(epochs, n)`` by name.
        layers: The last layers of the pre-trained models.
        names: Original indices of the candidates, ``(n,)``, for messages; the positions by default.

    Raises:
        UserError: The arrays differ in length, a label is outside 0 to C - 1 or differs from a layer's label, or
            dynamics are infinite, or NaN in every epoch. (Scores may be infinite; methods refuse NaN scores.)
    """

    labels: np.ndarray
    num_classes: int
    seed: int = 1
    scores: np.ndarray | None = None
    dynamics: Mapping[str, np.ndarray] = field(default_factory=dict)
    layers: Sequence[LastLayer] = ()
    names: np.ndarray | None = None

    def __post_init__(self) -> None:
        shapes = {name: np.shape(values) for name, values in (("scores", self.scores), ("names", self.names))
                  if values is not None}  # fmt: skip
        shapes |= {f"dynamics {name}": np.shape(values)[1:] for name, values in self.dynamics.items()}
        shapes |= {f"model {index}": layer.labels.shape for index, layer in enumerate(self.layers)}
        _refuse_other_lengths(len(self.labels), shapes)
        _refuse_other_labels(np.asarray(self.labels), self.num_classes)
        for name, values in self.dynamics.items():
            unvisited = np.isnan(values)  # allowed in some epochs, but not in all
            finite = (unvisited | np.isfinite(values)).all(axis=0) & ~unvisited.all(axis=0)
            _refuse_not_finite(f"dynamics {name}", finite)
        for index, layer in enumerate(self.layers):
            others = np.flatnonzero(layer.labels.cpu().numpy() != self.labels)
            if len(others):
                raise UserError(f"model {index}: its label of example {others[0]} differs from labels")

    def name(self, position: int) -> int:
        """The original index of an example."""
        return int(position if self.names is None else self.names[position])


# Last-layer gradients without materializing them. The gradient of an example's cross-entropy in the bias and weights
# of the last layer is g = [e, e (x) h], with the error e = softmax(z) - onehot(y) and the embedding h. It has
# C (d + 1) entries, but only C + d numbers are needed.


def gradient_norms(errors: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """``||g_i|| = ||e_i|| sqrt(1 + ||h_i||^2)``, float64 ``(n,)``, from errors ``(n, C)`` and embeddings ``(n, d)``.

    The squares are summed in float64 to avoid underflow of small errors.
    """
    error, embedding = (torch.linalg.vector_norm(t, dim=1, dtype=torch.float64) for t in (errors, embeddings))
    return error * (1.0 + embedding.square()).sqrt()


def inner_products(
    errors: torch.Tensor,
    embeddings: torch.Tensor,
    other_errors: torch.Tensor | None = None,
    other_embeddings: torch.Tensor | None = None,
) -> torch.Tensor:
    """``<g_i, g_j> = <e_i, e_j> (1 + <h_i, h_j>)``, ``(n, m)``, in the inputs' dtype.

    Args:
        errors: ``(n, C)``.
        embeddings: ``(n, d)``.
        other_errors: ``(m, C)``; the same examples by default.
        other_embeddings: ``(m, d)``.
    """
    other_errors = errors if other_errors is None else other_errors
    other_embeddings = embeddings if other_embeddings is None else other_embeddings
    return (embeddings @ other_embeddings.T).add_(1.0).mul_(errors @ other_errors.T)


def gradient_sum(errors: torch.Tensor, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum_i g_i``, as the bias part ``(C,)`` and the weight part ``(C, d)``."""
    return errors.sum(dim=0), errors.T @ embeddings


def products_with(
    bias: torch.Tensor, weight: torch.Tensor, errors: torch.Tensor, embeddings: torch.Tensor
) -> torch.Tensor:
    """``<g_i, v>`` for ``v = [bias (C,), weight (C, d)]``, ``(n,)``."""
    return ((embeddings @ weight.T).add_(bias) * errors).sum(dim=1)


@dataclass(frozen=True)
class Needs:
    """What a method needs in addition to the labels.

    Attributes:
        stored: Name of a stored score (a mode of ``Proxy``), if any.
        reduced: Name of a score computed from the dynamics of pre-training, if any.
        dynamics: Names of the recorded arrays that the method reads directly.
        logits: Whether it reads the pre-trained model's logits.
        embeddings: Whether it reads the embeddings.
        ensemble: Whether it reads several independently initialized models instead of one.
    """

    stored: str | None = None
    reduced: str | None = None
    dynamics: tuple[str, ...] = ()
    logits: bool = False
    embeddings: bool = False
    ensemble: bool = False

    @property
    def pretraining(self) -> bool:
        """Whether a model must be pre-trained."""
        return bool(self.reduced or self.dynamics or self.logits or self.embeddings)

    def __str__(self) -> str:
        parts = []
        if self.stored:
            parts.append(f"stored score `{self.stored}`")
        if self.reduced or self.dynamics:
            parts.append("dynamics of pre-training")
        if self.logits or self.embeddings:
            what = " and ".join(["embeddings"] * self.embeddings + ["logits"] * self.logits)
            parts.append(f"{what} of {'R pre-trained models' if self.ensemble else 'a pre-trained model'}")
        return ", ".join(parts) or "labels"


@dataclass(frozen=True)
class Options:
    """Options of a method; the base class has none.

    Raises:
        ArgumentError: A value would not be accepted by the flag of the same name.
    """

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class MemoryOptions(Options):
    """Options of methods that compare all pairs.

    Attributes:
        selection_memory: Memory limit of pairwise similarities in MiB; above it, they are computed in blocks.
    """

    selection_memory: int = option(
        2048,
        "memory limit of pairwise similarities; above it, they are computed in blocks",
        number(int, 1),
        metavar="MIB",
    )


GREEDY_LIMIT = 10**8
"""Number of gains, summed over all groups, above which greedy selection is subsampled by default.

This is a constant, so a selection depends on its settings and never on the machine. 50,000 examples in 10 classes
have 2.5e7 gains at a fraction of 0.1, selected per class."""
GREEDY_EPSILON = 0.05  # used above the limit


def subsample(text: str) -> str | float:
    """Parse the value of ``--selection_subsample``.

    Raises:
        argparse.ArgumentTypeError: The text is not a valid value.
    """
    try:
        return text if text in ("auto", "exact") else number(float, 0, 0.5, open_low=True)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not auto, exact, or a number above 0 and at most 0.5"
        ) from None


@dataclass(frozen=True)
class SubsampleOptions(Options):
    """Options of methods that pick greedily, one example at a time.

    Attributes:
        selection_subsample: ``"exact"``: each pick is the best of all examples. A number epsilon: the best of a
            random subset. ``"auto"``: exact up to ``GREEDY_LIMIT`` gains, otherwise ``GREEDY_EPSILON``.
    """

    selection_subsample: str | float = option(
        "auto",
        "candidates for each greedy pick: all (exact), or random subsets, larger for a smaller EPSILON in "
        f"(0, 0.5]; auto: {GREEDY_EPSILON} if examples times picks, summed over the groups, exceed "
        f"{GREEDY_LIMIT:,}, otherwise exact",
        subsample,
        metavar="auto|exact|EPSILON",
    )

    def epsilon(self, groups: Sequence[CandidateGroup]) -> float | None:
        """The epsilon of a selection from these groups; None if it is exact."""
        if self.selection_subsample == "auto":
            return GREEDY_EPSILON if greedy_gains(groups) > GREEDY_LIMIT else None
        return None if self.selection_subsample == "exact" else self.selection_subsample


@dataclass(frozen=True)
class GreedyOptions(SubsampleOptions, MemoryOptions):
    """Options of methods that pick greedily and compare all pairs."""


def greedy_gains(groups: Sequence[CandidateGroup]) -> int:
    """The number of gains that plain greedy evaluates: n for each of k picks, summed over the groups."""
    return sum(len(group.positions) * group.budget for group in groups)


class Draws:
    """The random candidates for each pick of stochastic greedy (Mirzasoleiman et al. 2015, "Lazier than lazy").

    Each pick is the best of ``(n / k) ln(1 / epsilon)`` unused examples drawn at random, so k picks evaluate
    ``n ln(1 / epsilon)`` gains instead of ``n k``. For monotone submodular functions, the expected value is at least
    ``1 - 1/e - epsilon`` of the optimum (theorem 1); exact greedy guarantees ``1 - 1/e``.

    Args:
        count: n.
        budget: k.
        epsilon: In (0, 1).
        generator: Random generator of the draws.
    """

    def __init__(self, count: int, budget: int, epsilon: float, generator: np.random.Generator) -> None:
        self.size = math.ceil(count / max(budget, 1) * math.log(1.0 / epsilon))
        self._unused, self._slot, self._left = np.arange(count), np.arange(count), count
        self._generator = generator

    def draw(self) -> np.ndarray:
        """Draw unused positions, ascending; returns all of them if no more than a subset are left."""
        if self._left <= self.size:
            return np.sort(self._unused[: self._left])
        chosen = self._generator.choice(self._left, self.size, replace=False, shuffle=False)
        return np.sort(self._unused[chosen])

    def take(self, position: int) -> None:
        """Mark a position as used."""
        self._left -= 1
        slot, last = self._slot[position], self._unused[self._left]
        self._unused[slot], self._slot[last] = last, slot


def random_parts(
    groups: Sequence[CandidateGroup], epsilon: float, generator: np.random.Generator
) -> list[CandidateGroup]:
    """Split each group into random parts of about ``2 ln(1 / epsilon) / epsilon^2`` examples and divide its budget.

    For objectives that are sums over examples: a random part estimates the mean to within epsilon (GreeDi;
    Mirzasoleiman et al., JMLR 2016, on decomposable functions). Here, each part's picks are part of the final
    selection. The cost grows with n; at a fixed fraction, that of greedy selection grows with n^2 or n^3.

    Args:
        groups: The groups of candidates.
        epsilon: In (0, 1).
        generator: Random generator of the split.
    """
    size = 2.0 * math.log(1.0 / epsilon) / epsilon**2
    parts = []
    for group in groups:
        count = len(group.positions)
        number_of_parts = max(1, min(round(count / size), group.budget // 2))
        ends = np.arange(number_of_parts + 1) * count // number_of_parts
        budgets = np.diff(ends * group.budget // count)
        order = generator.permutation(count) if number_of_parts > 1 else np.arange(count)
        parts += [
            CandidateGroup(np.sort(group.positions[order[start:end]]), int(budget), group.label)
            for start, end, budget in zip(ends[:-1], ends[1:], budgets, strict=True)
        ]
    return parts


@dataclass(frozen=True)
class WindowOptions(Options):
    """Options of methods whose score is computed over windows of epochs.

    Attributes:
        score_window: Window length in epochs.
    """

    score_window: int = option(10, "dual, tdds: window length in epochs", number(int, 2))


@dataclass(frozen=True)
class Method:
    """A selection method.

    Attributes:
        name: The value of ``--coreset_func``.
        select: The selection function; None for a method that selects again in each training epoch.
        needs: Its required inputs.
        paper: Citation.
        equation: What the code implements, in one line.
        cost: Cost after its needs are met, for n candidates in a group, k picks, C classes, embeddings of size d.
        options: The dataclass of its options.
        weighted: Whether its weights may differ from 1.
    """

    name: str
    select: Callable[[SelectionInputs, Sequence[CandidateGroup], Any], Selection] | None
    needs: Needs
    paper: str
    equation: str
    cost: str
    options: type[Options] = Options
    weighted: bool = False

    @property
    def dynamic(self) -> bool:
        """Whether it selects again in each training epoch."""
        return self.select is None

    @property
    def option_names(self) -> tuple[str, ...]:
        """The names of its options."""
        return tuple(field.name for field in fields(self.options))


def class_budgets(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """``ceil(fraction * n_c)`` for each class, robust to rounding errors; 0 for empty classes.

    Args:
        sizes: ``(C,)``.
        fraction: Fraction to keep, in (0, 1].
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    wanted = np.ceil(fraction * sizes - ROUNDING).astype(np.int64)
    return np.clip(wanted, np.minimum(sizes, 1), sizes)


def make_groups(
    labels: np.ndarray,
    num_classes: int,
    *,
    fraction: float | None = None,
    shots: int | None = None,
    shots_up_to: int | None = None,
    per_class: bool = True,
    class_names: Sequence[str] = (),
) -> list[CandidateGroup]:
    """Split the candidates into the groups to select from.

    Args:
        labels: int64 ``(n,)``, labels of the candidates.
        num_classes: C.
        fraction: Fraction to keep, in (0, 1].
        shots: Examples per class, instead of a fraction.
        shots_up_to: The same, but a class with fewer examples is kept in full.
        per_class: Whether to form one group per class that has candidates, instead of a single group.
        class_names: Names of the classes, for messages.

    Returns:
        Groups in label order.

    Raises:
        ArgumentError: The fraction or the shots do not fit the candidates.
    """
    labels = np.asarray(labels)
    sizes = np.bincount(labels, minlength=num_classes)
    count = shots_up_to if shots is None else shots
    if count is not None:
        _check_shots("shots_up_to" if shots is None else "shots", count, sizes, per_class, class_names)
        budgets = np.minimum(sizes, count)
    elif fraction is None or not 0.0 < fraction <= 1.0:
        raise ArgumentError("fraction", f"{fraction}: must be above 0 and at most 1")
    elif not per_class:
        budget = rounded_share(len(labels), fraction)
        if not budget:
            raise ArgumentError(
                "fraction",
                f"{fraction:g}: keeps none of {len(labels)} examples; use a larger fraction",
            )
        return [CandidateGroup(np.arange(len(labels)), budget)]
    else:
        budgets = class_budgets(sizes, fraction)
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.cumsum(sizes)[:-1])
    return [CandidateGroup(members[c], int(budgets[c]), c) for c in range(num_classes) if sizes[c]]


def _check_shots(name: str, count: int, sizes: np.ndarray, per_class: bool, class_names: Sequence[str]) -> None:
    if count < 1:
        raise ArgumentError(name, f"{count}: must be at least 1")
    if not per_class:
        raise ArgumentError(name, ": counts examples per class; leave per_class enabled")
    present = np.flatnonzero(sizes)
    smallest = present[sizes[present].argmin()]
    if name == "shots" and count > sizes[smallest]:
        which = f"{class_names[smallest]!r}" if len(class_names) else smallest
        raise ArgumentError(
            "shots",
            f"{count}: class {which} has only {sizes[smallest]} examples; use at most that many, or "
            f"shots_up_to={count}, which keeps smaller classes in full",
        )
