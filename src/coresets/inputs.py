"""The contract of a selection method: what it reads and returns, and what its entry in the registry states."""

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
    """Stop at the first example with a NaN or an infinity, given which examples ``(n,)`` have none.

    Raises:
        UserError: There is one.
    """
    if not bool(finite.all()):
        first = int(np.flatnonzero(~np.asarray(finite.tolist()))[0])
        raise UserError(f"{name}: those of example {first} are not finite; every value must be a finite number")


def _refuse_other_lengths(count: int, arrays: Mapping[str, tuple[int, ...]]) -> None:
    """Stop at an array of another number of examples than ``count``, given each one's name and shape.

    Raises:
        UserError: There is one.
    """
    for name, shape in arrays.items():
        if len(shape) == 0 or shape[0] != count:
            raise UserError(f"{name}: has the shape {tuple(shape)}, but there are {count} labels, one per example")


@dataclass(frozen=True)
class Selection:
    """The chosen examples.

    Attributes:
        indices: int64 ``(k,)``, ascending, each once: positions among the candidates while methods compute,
            original indices in files.
        weights: float64 ``(k,)``, the sample weights of training; all 1, or with mean 1 where a method weights
            (InfoBatch: with a sum of n). Training divides by their sum.

    Raises:
        UserError: An index is negative or there twice, or a weight is missing, negative or not finite.
    """

    indices: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        if self.weights.shape != self.indices.shape:
            raise UserError(f"weights: there are {self.weights.size} for {self.indices.size} indices; give one each")
        ordered = np.sort(self.indices)  # cheaper than np.unique
        if (ordered[:1] < 0).any() or (ordered[1:] == ordered[:-1]).any():
            raise UserError("indices: one is negative or there twice; choose an example by its position, once")
        if not (np.isfinite(self.weights) & (self.weights >= 0)).all():
            raise UserError("weights: one is not a finite number of at least 0")

    @classmethod
    def of(cls, picks: Sequence[np.ndarray], weights: Sequence[np.ndarray] | None = None) -> Selection:
        """Put the picks of all groups together, in the order of the data set.

        Args:
            picks: One array of positions per group, each in any order.
            weights: Weights of the same shapes; default 1.
        """
        indices = np.concatenate([np.asarray(part, dtype=np.int64) for part in picks])
        values = np.ones(len(indices)) if weights is None else np.concatenate(weights).astype(np.float64)
        order = np.argsort(indices, kind="stable")
        return cls(indices[order], values[order])

    @property
    def weighted(self) -> bool:
        """Whether the weights differ from 1."""
        return bool((self.weights != 1).any())

    def rescaled(self) -> Selection:
        """The same selection with weights of mean 1.

        Raises:
            UserError: All weights are 0.
        """
        mean = self.weights.mean()
        if not mean > 0:
            raise UserError("the selection's weights are all 0; choose another method or a larger fraction")
        return Selection(self.indices, self.weights / mean)


@dataclass(frozen=True)
class CandidateGroup:
    """Candidates among which a method chooses at once: a class, or all of them.

    Attributes:
        positions: int64 ``(m,)``, ascending.
        budget: How many to choose, from 1 to m.
        label: The class; None for the group of all.

    Raises:
        UserError: The budget is not from 1 to m, or the positions are not ascending from 0 on, each once.
    """

    positions: np.ndarray
    budget: int
    label: int | None = None

    def __post_init__(self) -> None:
        which = "the group" if self.label is None else f"class {self.label}"
        count = len(self.positions)
        if not 1 <= self.budget <= count:
            raise UserError(f"budget {self.budget}: {which} has {count} examples; choose 1 to {count} of them")
        if self.positions[0] < 0 or (np.diff(self.positions) <= 0).any():
            raise UserError(f"positions of {which}: must be ascending from 0 on, each once")


@dataclass(frozen=True)
class LastLayer:
    """What a pre-trained model's last layer receives and returns for each candidate, un-augmented, in eval mode.

    The gradient of an example's cross-entropy in the last layer's bias and weights is ``[e, e (x) h]``.

    Attributes:
        logits: ``(n, C)``.
        labels: int64 ``(n,)``.
        embeddings: h, ``(n, d)``; None where the method needs none.
        gradient_norms: ``(n,)``, norms of the gradients in all parameters; None where the method needs none.

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
        """``softmax(z) - onehot(y)``, ``(n, C)``, in the logits' type."""
        return errors_of(self.logits, self.labels)

    @cached_property
    def losses(self) -> torch.Tensor:
        """Cross-entropies ``(n,)``, float64."""
        return torch.nn.functional.cross_entropy(self.logits.double(), self.labels, reduction="none")

    def at(self, positions: np.ndarray) -> LastLayer:
        """The same of some candidates; of all in their order itself, without a copy."""
        if np.array_equal(positions, np.arange(len(self.labels))):
            return self
        chosen = torch.from_numpy(np.ascontiguousarray(positions)).to(self.labels.device)
        optional = [None if t is None else t[chosen] for t in (self.embeddings, self.gradient_norms)]
        return LastLayer(self.logits[chosen], self.labels[chosen], *optional)


def _refuse_other_labels(labels: np.ndarray, num_classes: int) -> None:
    """Stop at the first label that is no class.

    Raises:
        UserError: There is one.
    """
    bad = np.flatnonzero(~((labels >= 0) & (labels < num_classes) & (labels == np.floor(labels))))
    if len(bad):
        raise UserError(f"labels: {labels[bad[0]]}, of example {bad[0]}, is not one of 0 to {num_classes - 1}")


def errors_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """``softmax(z) - onehot(y)``, ``(n, C)``; the softmax is taken in float64, so that small errors keep digits.

    Beside the result, 2048 rows in float64 take memory.
    """
    result = torch.empty_like(logits)
    for first in range(0, len(logits), 2048):
        part = slice(first, first + 2048)
        errors, right = torch.softmax(logits[part].double(), dim=1), labels[part, None]
        # 1 - p as the sum of the others: exact where p rounds to 1
        errors.scatter_(1, right, 0.0)
        errors.scatter_(1, right, -errors.sum(dim=1, keepdim=True))
        result[part] = errors
    return result


@dataclass(frozen=True)
class SelectionInputs:
    """Everything that a selection may depend on; what a method's entry does not ask for is absent.

    Attributes:
        labels: int64 ``(n,)`` of the candidates.
        num_classes: C.
        seed: Seed of what a method draws.
        scores: ``(n,)``, the stored score, or the reduction of the dynamics that the entry names.
        dynamics: Recorded arrays ``(epochs, n)`` by name.
        layers: The pre-trained models' last layers.
        names: Original indices of the candidates, ``(n,)``, for messages; default the positions.

    Raises:
        UserError: The arrays differ in length, a label is outside 0 to C - 1 or not that of a layer, or dynamics are
            infinite or NaN in every epoch. (Scores may be infinite, and the methods refuse those that are NaN.)
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
            unvisited = np.isnan(values)  # in some epochs, not in all
            finite = (unvisited | np.isfinite(values)).all(axis=0) & ~unvisited.all(axis=0)
            _refuse_not_finite(f"dynamics {name}", finite)
        for index, layer in enumerate(self.layers):
            others = np.flatnonzero(layer.labels.cpu().numpy() != self.labels)
            if len(others):
                raise UserError(f"model {index}: the label of example {others[0]} differs from labels")

    def name(self, position: int) -> int:
        """An example's original index."""
        return int(position if self.names is None else self.names[position])


# Last-layer gradients without materializing them: the gradient of an example's cross-entropy in the bias and weights
# of the last layer is g = [e, e (x) h] with the error e = softmax(z) - onehot(y) and the embedding h: C (d + 1)
# numbers, of which C + d matter.


def gradient_norms(errors: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """``||g_i|| = ||e_i|| sqrt(1 + ||h_i||^2)``, float64 ``(n,)``, from errors ``(n, C)`` and embeddings ``(n, d)``.

    The squares are summed in float64, where those of small errors do not vanish.
    """
    error, embedding = (torch.linalg.vector_norm(t, dim=1, dtype=torch.float64) for t in (errors, embeddings))
    return error * (1.0 + embedding.square()).sqrt()


def inner_products(
    errors: torch.Tensor,
    embeddings: torch.Tensor,
    other_errors: torch.Tensor | None = None,
    other_embeddings: torch.Tensor | None = None,
) -> torch.Tensor:
    """``<g_i, g_j> = <e_i, e_j> (1 + <h_i, h_j>)``, ``(n, m)``, in the inputs' type.

    Args:
        errors: ``(n, C)``.
        embeddings: ``(n, d)``.
        other_errors: ``(m, C)``; default the same examples.
        other_embeddings: ``(m, d)``.
    """
    other_errors = errors if other_errors is None else other_errors
    other_embeddings = embeddings if other_embeddings is None else other_embeddings
    return (embeddings @ other_embeddings.T).add_(1.0).mul_(errors @ other_errors.T)


def gradient_sum(errors: torch.Tensor, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum_i g_i`` as bias part ``(C,)`` and weight part ``(C, d)``."""
    return errors.sum(dim=0), errors.T @ embeddings


def products_with(
    bias: torch.Tensor, weight: torch.Tensor, errors: torch.Tensor, embeddings: torch.Tensor
) -> torch.Tensor:
    """``<g_i, v>`` for ``v = [bias (C,), weight (C, d)]``, ``(n,)``."""
    return ((embeddings @ weight.T).add_(bias) * errors).sum(dim=1)


@dataclass(frozen=True)
class Needs:
    """What a method must be given beside the labels.

    Attributes:
        stored: Name of a stored score (a mode of ``Proxy``); None if it reads none.
        reduced: Name of a score that is reduced from the dynamics of pre-training.
        dynamics: Names of the recorded arrays that it reads itself.
        logits: Whether it reads the pre-trained model's logits.
        embeddings: Whether it reads its embeddings too.
        ensemble: Whether it reads several independently initialized models in place of one.
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
            what = "embeddings and logits" if self.embeddings else "logits"
            parts.append(f"{what} of {'R pre-trained models' if self.ensemble else 'a pre-trained model'}")
        return ", ".join(parts) or "labels"


@dataclass(frozen=True)
class Options:
    """What a method takes beside its inputs; this one nothing.

    Raises:
        ArgumentError: A value is not one that the flag of this name accepts.
    """

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class MemoryOptions(Options):
    """What a method takes that compares all pairs.

    Attributes:
        selection_memory: MiB that pairwise similarities may take; above, they are computed in blocks.
    """

    selection_memory: int = option(
        2048,
        "memory for pairwise similarities; larger ones are computed in blocks",
        number(int, 1),
        metavar="MIB",
    )


GREEDY_LIMIT = 10**8
"""Gains of all groups together above which a greedy choice is subsampled by default.

A constant, so that a selection depends on its settings, never on the machine. 50,000 examples in 10 classes have
2.5e7 at a share of 0.1, chosen class by class."""
GREEDY_EPSILON = 0.05  # what is used above


def subsample(text: str) -> str | float:
    """The value of ``--selection_subsample``.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    try:
        return text if text in ("auto", "exact") else number(float, 0, 0.5, open_low=True)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not auto, exact, or a number above 0 and at most 0.5"
        ) from None


@dataclass(frozen=True)
class SubsampleOptions(Options):
    """What a method takes that picks greedily, one example after another.

    Attributes:
        selection_subsample: ``"exact"``: every pick is the best of all; a number epsilon: of a random subset;
            ``"auto"``: exact for up to ``GREEDY_LIMIT`` gains, else ``GREEDY_EPSILON``.
    """

    selection_subsample: str | float = option(
        "auto",
        "what a greedy pick is chosen from: all (exact), or random subsets, larger for a smaller EPSILON in "
        f"(0, 0.5]; auto: {GREEDY_EPSILON} where examples times picks, summed over the groups, exceed "
        f"{GREEDY_LIMIT:,}, else exact",
        subsample,
        metavar="auto|exact|EPSILON",
    )

    def epsilon(self, groups: Sequence[CandidateGroup]) -> float | None:
        """Epsilon of a choice in these groups; None where it is exact."""
        if self.selection_subsample == "auto":
            return GREEDY_EPSILON if greedy_gains(groups) > GREEDY_LIMIT else None
        return None if self.selection_subsample == "exact" else self.selection_subsample


@dataclass(frozen=True)
class GreedyOptions(SubsampleOptions, MemoryOptions):
    """What a method takes that picks greedily and compares all pairs."""


def greedy_gains(groups: Sequence[CandidateGroup]) -> int:
    """How many gains the plain greedy evaluates: n for each of k picks, summed over the groups."""
    return sum(len(group.positions) * group.budget for group in groups)


class Draws:
    """The random candidates of each pick of the stochastic greedy (Mirzasoleiman et al. 2015, "Lazier than lazy").

    Each pick is the best of ``(n / k) ln(1 / epsilon)`` unused examples drawn at random, so that k picks evaluate
    ``n ln(1 / epsilon)`` gains in place of ``n k``. For monotone submodular functions the value is at least
    ``1 - 1/e - epsilon`` of the best in expectation (theorem 1), where the exact greedy has ``1 - 1/e``.

    Args:
        count: n.
        budget: k.
        epsilon: In (0, 1).
        generator: Draws them.
    """

    def __init__(self, count: int, budget: int, epsilon: float, generator: np.random.Generator) -> None:
        self.size = math.ceil(count / max(budget, 1) * math.log(1.0 / epsilon))
        self._unused, self._place, self._left = np.arange(count), np.arange(count), count
        self._generator = generator

    def draw(self) -> np.ndarray:
        """Unused positions, ascending; all of them where there are no more than a subset."""
        if self._left <= self.size:
            return np.sort(self._unused[: self._left])
        chosen = self._generator.choice(self._left, self.size, replace=False, shuffle=False)
        return np.sort(self._unused[chosen])

    def take(self, position: int) -> None:
        """Use a position."""
        self._left -= 1
        place, last = self._place[position], self._unused[self._left]
        self._unused[place], self._place[last] = last, place


def random_parts(
    groups: Sequence[CandidateGroup], epsilon: float, generator: np.random.Generator
) -> list[CandidateGroup]:
    """Split each group into random parts of about ``2 ln(1 / epsilon) / epsilon^2`` examples, with their shares.

    For objectives that are sums over the examples, of which a random part's estimates the mean to epsilon (GreeDi;
    Mirzasoleiman et al., JMLR 2016, on decomposable functions; here every part picks its share, and that is the
    answer). The cost grows with n, where the greedy's grows with n^2 or n^3 at a fixed share.

    Args:
        groups: The groups.
        epsilon: In (0, 1).
        generator: Draws the parts.
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
    """What a method takes whose score looks at windows of epochs.

    Attributes:
        score_window: Epochs of a window.
    """

    score_window: int = option(10, "dual, tdds: epochs of a window", number(int, 2))


@dataclass(frozen=True)
class Method:
    """A way to choose examples.

    Attributes:
        name: The value of ``--coreset_func``.
        select: The choice; None for a method that chooses again in each epoch of training.
        needs: What it must be given.
        paper: Who proposed it.
        equation: What the code implements, in a line.
        cost: Its cost for n candidates of a group, k picks, C classes, embeddings of size d, after its needs.
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
        """Whether it chooses again in each epoch of training."""
        return self.select is None

    @property
    def option_names(self) -> tuple[str, ...]:
        """The names of its options."""
        return tuple(field.name for field in fields(self.options))


def class_budgets(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """``ceil(fraction * n_c)`` of each class, free of rounding noise; 0 for empty classes.

    Args:
        sizes: ``(C,)``.
        fraction: Share to keep, in (0, 1].
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
    """The groups that a selection is made in.

    Args:
        labels: int64 ``(n,)`` of the candidates.
        num_classes: C.
        fraction: Share to keep, in (0, 1].
        shots: Examples per class, in place of a fraction.
        shots_up_to: The same, but all of a smaller class are kept.
        per_class: A group per class that has candidates; else one group of all.
        class_names: Names of the classes, for messages.

    Returns:
        Groups in the order of the labels.

    Raises:
        ArgumentError: The fraction or the shots do not fit the candidates.
    """
    labels = np.asarray(labels)
    sizes = np.bincount(labels, minlength=num_classes)
    if shots is not None or shots_up_to is not None:
        _check_shots(shots, shots_up_to, sizes, per_class, class_names)
        budgets = np.minimum(sizes, shots_up_to if shots is None else shots)
    elif fraction is None or not 0.0 < fraction <= 1.0:
        raise ArgumentError("fraction", f"{fraction}: must be above 0 and at most 1")
    elif not per_class:
        budget = rounded_share(len(labels), fraction)
        if not budget:
            raise ArgumentError(
                "fraction",
                f"{fraction:g}: keeps none of {len(labels)} examples; give a larger one",
            )
        return [CandidateGroup(np.arange(len(labels)), budget)]
    else:
        budgets = class_budgets(sizes, fraction)
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.cumsum(sizes)[:-1])
    return [CandidateGroup(members[c], int(budgets[c]), c) for c in range(num_classes) if sizes[c]]


def _check_shots(
    shots: int | None, shots_up_to: int | None, sizes: np.ndarray, per_class: bool, class_names: Sequence[str]
) -> None:
    name, count = ("shots_up_to", shots_up_to) if shots is None else ("shots", shots)
    if count < 1:
        raise ArgumentError(name, f"{count}: must be at least 1")
    if not per_class:
        raise ArgumentError(name, ": counts examples per class; leave per_class on")
    present = np.flatnonzero(sizes)
    smallest = present[sizes[present].argmin()]
    if shots is not None and shots > sizes[smallest]:
        which = f"{class_names[smallest]!r}" if len(class_names) else smallest
        raise ArgumentError(
            "shots",
            f"{shots}: class {which} has only {sizes[smallest]} examples; give at most that many, or "
            f"shots_up_to={shots}, which keeps all of a smaller class",
        )
