"""Memorization by the subset estimator of Feldman and Zhang 2020 ("What neural networks memorize and why", NeurIPS).

Each member is a model trained on a random subset of the training set. The memorization of example i (their eq. 1) is
the mean of a quantity q_i over the members that were trained on i, minus the mean over those that were not:

    mem_i = mean_{m: i in S_m} q_i(m) - mean_{m: i not in S_m} q_i(m)

with q the correctness of the prediction (``mem``, as published) or the probability of the label (``mem_prob``, which
varies less between members). The last mean for the probability, negated, is the score ``out_prob``. The influence on
a test example (their eq. 2) replaces q_i by the test example's correctness. Both means are over independent models,
so the variance of their difference is estimated without bias by ``s_in^2 / k_in + s_out^2 / k_out``, with unbiased
variances s^2 over k members.

Shapes: m members, n training examples, t test examples, C classes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src import rng
from src.artifacts.io import read_npz, write_npz
from src.artifacts.locks import lock
from src.artifacts.store import check_identity, check_settings_match, checked_array, load_result, parse_settings
from src.cli import SEED, check_options, number, option
from src.datasets.splits import rounded_share
from src.errors import ArgumentError, FileError
from src.metrics.score import Score

_of_members = partial(
    Score, source="members", folder="memorization", cost="200 SGD runs", paper="Feldman and Zhang 2020"
)

MEMBER_SCORES = (
    _of_members("mem", r"$m(x_i)$", "memorization", published_file="{dataset}_infl_matrix.npz"),
    _of_members("mem_prob", r"$m_p(x_i)$", "memorization of the probability"),
    _of_members(
        "out_prob",
        r"$-p_{y}^{\mathrm{out}}(x_i)$",
        "out-of-sample probability, negated",
        cost="5 SGD runs",
        paper="Xu et al. 2025",
        negated=True,
    ),
)

BLOCK = 100  # members per file
UNIT = 2**16  # probabilities are summed as multiples of 1 / UNIT, so that sums do not depend on their order


def parse_members(text: str) -> tuple[int, int]:
    """Parse ``M`` (members 1 to M) or ``FIRST-LAST``.

    Raises:
        argparse.ArgumentTypeError: The text is neither.
    """
    first, dash, last = str(text).partition("-")
    numbers = (first, last) if dash else ("1", first)
    if not all(part.isdigit() for part in numbers) or not 1 <= int(numbers[0]) <= int(numbers[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number such as 200, or a part such as 51-100")
    return int(numbers[0]), int(numbers[1])


_OF_MEMBERS = (lambda args: args.from_splits is None, "with --from_splits")
_TRAINS = (lambda args: args.merge is None, "with --merge, which trains no models")


@dataclass(frozen=True)
class MemorizationConfig:
    """What to estimate memorization from.

    Attributes:
        members: The first and the last member to train. Members are numbered from 1.
        fraction: The share of every class that each member is trained on.
        complementary: Whether members 2k - 1 and 2k are trained on complementary halves, so that every example is in
            exactly one of them. ``fraction`` is then ignored.
        folds: The number of folds of a cross-validation: every ``folds`` consecutive members leave out one fold each.
            ``fraction`` is then ignored. None for random subsets.
        target_se: The median standard error of ``mem`` at which to stop; None to train all members.
        influence: Whether to write the influence of every training example on every test example.
        out_of_sample: Whether to sum the class probabilities over the members that were not trained on the example.
        train_only: Whether to train members and estimate nothing from them.
        merge: Folders of members that were trained elsewhere; None to train members.
        from_splits: Seeds of ``train_split.py`` whose models take the place of members; None to train members.
        ensemble: How members are trained: side by side, one after another, or whichever is expected to be faster.
        ensemble_size: The largest number of members trained side by side.

    Raises:
        ArgumentError: A value is out of range, or the members are not pairs although they should be.
    """

    members: tuple[int, int] = option(
        (1, 200),
        "members to train: a number M for 1 to M, or a part such as 51-100 (default: 200)",
        parse_members,
        metavar="M|FIRST-LAST",
        acts=_OF_MEMBERS,
    )
    fraction: float = option(
        0.7,
        "share of every class that each member is trained on",
        number(float, 0, 1, open_low=True, open_high=True),
        acts=(
            _OF_MEMBERS,
            (lambda args: not args.complementary, "with --complementary, which trains on halves"),
            (lambda args: args.folds is None, "with --folds"),
        ),
    )
    complementary: bool = option(
        False,
        "train members 2k-1 and 2k on complementary halves, so that few members suffice for an estimate of every "
        "example",
        acts=(_OF_MEMBERS, (lambda args: args.folds is None, "with --folds")),
    )
    folds: int | None = option(
        None,
        "cross-validation: member k leaves out fold k of this many stratified folds, and the next members repeat "
        "this with other folds; --members must be a multiple (default: random subsets)",
        number(int, 2),
        metavar="K",
        acts=_OF_MEMBERS,
    )
    target_se: float | None = option(
        None,
        "stop when the median standard error of memorization is at most this (default: train all members)",
        number(float, 0, open_low=True),
        acts=(_OF_MEMBERS, _TRAINS),
    )
    influence: bool = option(
        False,
        "also write the influence of every training example on every test example (float16, 2 bytes per pair)",
        acts=(_OF_MEMBERS, (lambda args: not args.train_only, "with --train_only")),
    )
    out_of_sample: bool = option(
        True,
        "also write each example's mean class probabilities over models that were not trained on it",
        negatable=True,
    )
    train_only: bool = option(
        False, "only train these members, for --merge to join later; estimate nothing", acts=(_OF_MEMBERS, _TRAINS)
    )
    merge: list[Path] | None = option(
        None,
        "train nothing: join the members in these folders (metrics folders of other machines, or their folders of "
        "members) with those in --metrics_folder (default: train)",
        Path,
        nargs="+",
        metavar="DIR",
        acts=_OF_MEMBERS,
    )
    from_splits: list[int] | None = option(
        None,
        "train nothing: use the models that train_split.py trained with these seeds, each of which leaves out one "
        "tenth (default: train)",
        SEED,
        nargs="+",
        metavar="SEED",
    )
    ensemble: str = option(
        "auto",
        "train members side by side as one batch, one after another, or whichever is faster on this machine",
        choices=("auto", "vectorised", "sequential"),
        acts=(_OF_MEMBERS, _TRAINS),
    )
    ensemble_size: int = option(
        50, "largest number of members to train side by side", number(int, 2), acts=(_OF_MEMBERS, _TRAINS)
    )

    def __post_init__(self) -> None:
        check_options(self)
        first, last = self.members
        if self.complementary and self.folds is not None:
            raise ArgumentError("complementary", ": cannot be combined with folds; choose one of them")
        if self.complementary and not (first % 2 and last % 2 == 0):
            raise ArgumentError(
                "members", f"{first}-{last}: complementary members come in pairs; start with an odd number and end "
                "with an even one"
            )  # fmt: skip
        if self.folds is not None and self.from_splits is None and ((first - 1) % self.folds or last % self.folds):
            raise ArgumentError(
                "members", f"{first}-{last}: is not a number of whole rounds of {self.folds} folds; give "
                f"{self.folds}, or a multiple"
            )  # fmt: skip
        if self.from_splits is not None and len(set(self.from_splits)) < len(self.from_splits):
            raise ArgumentError(
                "from_splits", f"{' '.join(map(str, self.from_splits))}: contains a duplicate; list each seed once"
            )

    @property
    def share(self) -> float:
        """The share of every class that each member is trained on."""
        return 0.5 if self.complementary else self.fraction if self.folds is None else 1 - 1 / self.folds

    @property
    def unit(self) -> int | None:
        """The number of consecutive members that depend on each other; see ``Tally``. None if all are independent."""
        return 2 if self.complementary else self.folds


# ------------------------------------------------------------------------------------------------------ estimator


def included_examples(
    labels: np.ndarray,
    fraction: float,
    seed: int,
    member: int,
    complementary: bool = False,
    folds: int | None = None,
) -> np.ndarray:
    """Draw the training examples of a member: a random share of every class, or all but one fold.

    With ``folds``, every class is divided evenly among the folds, and so is the whole training set. Otherwise, all
    members have ``round(fraction n)`` examples (complementary ones the rest in turn), and every example is included
    with the same probability. Where a class's share is not a whole number, it is rounded up or down at random.

    Args:
        labels: ``(n,)``.
        fraction: The share; ignored if complementary.
        seed: The base seed.
        member: The member's number, from 1.
        complementary: Whether members 2k - 1 and 2k share one draw, of which the second is trained on the rest.
        folds: The number of folds. Each round of so many members has its own folds.

    Returns:
        bool ``(n,)``.
    """
    if folds is not None:
        generator = rng.numpy_generator(seed, (member - 1) // folds + 1, "memorization folds")
        order = np.lexsort((generator.random(len(labels)), labels))  # by class, shuffled within each
        fold = np.empty(len(labels), np.int64)
        fold[order] = np.arange(len(labels)) % folds
        return fold != (member - 1) % folds
    number, purpose = ((member + 1) // 2, "halves") if complementary else (member, "subset")
    generator = rng.numpy_generator(seed, number, f"memorization {purpose}")
    total = len(labels)
    size = rounded_share(total, 0.5 if complementary else fraction)
    _, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    edges = np.floor(np.cumsum(counts) * size / total + generator.random())  # systematic rounding of the shares
    edges[-1] = size
    order = np.lexsort((generator.random(total), which))  # by class, shuffled within each
    ranks = np.empty(total, np.int64)
    ranks[order] = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = ranks < np.diff(edges, prepend=0)[which]
    return ~chosen if complementary and member % 2 == 0 else chosen


def member_seed(seed: int, member: int) -> int:
    """The seed of a member's initial weights, example order and augmentation."""
    return rng.derived_seed(seed, member, "memorization member") % 2**32


class Estimate(NamedTuple):
    """The difference of two means for each example, NaN where it cannot be computed.

    Attributes:
        value: Mean over members trained on the example minus mean over the others, float64 ``(n,)``.
        error: Its standard error ``(n,)``.
        inside: Mean over the members trained on the example ``(n,)``.
        outside: Mean over the others ``(n,)``.
    """

    value: np.ndarray
    error: np.ndarray
    inside: np.ndarray
    outside: np.ndarray

    @property
    def median_error(self) -> float | None:
        """The median standard error over the examples that have one; None if none has."""
        known = self.error[~np.isnan(self.error)]
        return float(np.median(known)) if len(known) else None


class Tally:
    """Running sums over members of one quantity, from which memorization is estimated.

    Args:
        total: n, the number of examples.
        unit: None if members are independent. Otherwise, every ``unit`` consecutive members form a unit in which each
            example is both included and left out (2 for complementary halves, 10 for ten splits, K for K folds). The
            members of a unit are dependent, so the standard error is that of the mean over units.

    Attributes:
        counts: Number of members without and with each example, int64 ``(2, n)``.
    """

    def __init__(self, total: int, unit: int | None = None) -> None:
        self._unit, self._units, self._members = unit, 0, 0
        self.counts = np.zeros((2, total), np.int64)
        self._sums, self._squares = np.zeros((2, total)), np.zeros((2, total))
        self._difference, self._difference_squares = np.zeros(total), np.zeros(total)
        self._before = self.counts.copy(), self._sums.copy()  # at the start of the current unit

    def add(self, included: np.ndarray, values: np.ndarray) -> None:
        """Add members in ascending order. A unit may be added in parts.

        Args:
            included: Which examples each member was trained on, bool ``(m, n)``.
            values: The quantity, ``(m, n)``.
        """
        for mask, numbers in zip(included, values, strict=True):
            value = numbers.astype(np.float64)
            for group, inside in enumerate((~mask, mask)):
                chosen = np.where(inside, value, 0.0)
                self.counts[group] += inside
                self._sums[group] += chosen
                self._squares[group] += chosen**2
            self._members += 1
            if self._unit is not None and self._members % self._unit == 0:
                with np.errstate(invalid="ignore"):  # a unit without the example, or with it in all members
                    means = (self._sums - self._before[1]) / (self.counts - self._before[0])
                self._difference += means[1] - means[0]
                self._difference_squares += (means[1] - means[0]) ** 2
                self._units += 1
                self._before = self.counts.copy(), self._sums.copy()

    def estimate(self) -> Estimate:
        """Estimate memorization and its standard error."""
        outside, inside = _divide(self._sums, self.counts)
        if self._unit is None:
            spread = np.maximum(self._squares - _divide(self._sums**2, self.counts), 0.0)
            variances = _divide(_divide(spread, self.counts - 1), self.counts)
            variance = variances[0] + variances[1]
        else:
            units = np.full(self._difference.shape, self._units)
            spread = np.maximum(self._difference_squares - _divide(self._difference**2, units), 0.0)
            variance = _divide(_divide(spread, units - 1), units)
        return Estimate(inside - outside, np.sqrt(variance), inside, outside)

    def typical_error(self) -> float:
        """The median standard error of a quantity in {0, 1}, for stopping.

        Each mean p of k members counts as (k p + 1) / (k + 2): a few members that agree would otherwise have an error
        of zero.
        """
        shares = (self._sums + 1) / (self.counts + 2)
        return float(np.median(np.sqrt(_divide(shares * (1 - shares), self.counts).sum(axis=0))))


def _divide(numerator: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Divide by counts; NaN where a count is not positive."""
    return np.divide(numerator, count, out=np.full(numerator.shape, np.nan), where=count > 0)


def largest_error(members: int, fraction: float) -> float:
    """The expected standard error of ``mem`` if half of all members are correct, the largest one possible."""
    inside, outside = fraction * members, (1 - fraction) * members
    return math.sqrt(0.25 / max(inside, 1) + 0.25 / max(outside, 1))


def members_needed(total: int, fraction: float) -> int:
    """The number of members with which every example is in and out of some training set, with 95 % probability.

    Args:
        total: n, the number of examples.
        fraction: The share of examples that each member is trained on.
    """
    members = 2
    while total * (fraction**members + (1 - fraction) ** members) > 0.05:
        members += 1
    return members


# ------------------------------------------------------------------------------------------------ members on disk


@dataclass(frozen=True)
class Members:
    """What some members predict.

    Attributes:
        numbers: The members' numbers, int64 ``(m,)``, ascending.
        included: Which examples each was trained on, bool ``(m, n)``.
        correct: Whether each predicts the label of each training example, bool ``(m, n)``.
        probability: The predicted probability of the label, float16 ``(m, n)``.
        test_correct: Correctness on the test set, bool ``(m, t)``.
        test_margin: ``log p - log(1 - p)`` of the label's probability p on the test set, float16 ``(m, t)``.
        left_out: Sum of the class probabilities over the members that were not trained on the example, in units of
            2^-16, uint32 ``(n, C)``; None if not recorded.
    """

    numbers: np.ndarray
    included: np.ndarray
    correct: np.ndarray
    probability: np.ndarray
    test_correct: np.ndarray
    test_margin: np.ndarray
    left_out: np.ndarray | None = None

    def __add__(self, other: Members) -> Members:
        """Join two disjoint sets of members, in ascending order."""
        order = np.argsort(np.concatenate([self.numbers, other.numbers]))
        rows = (np.concatenate([getattr(self, name), getattr(other, name)])[order] for name in _ROWS)
        both = self.left_out is not None and other.left_out is not None
        return Members(*rows, self.left_out + other.left_out if both else None)

    def upto(self, last: int) -> Members:
        """The members up to a number. Their ``left_out`` is None if any member is dropped."""
        keep = self.numbers <= last
        return self if keep.all() else Members(*(getattr(self, name)[keep] for name in _ROWS))


_BITS = ("included", "correct", "test_correct")
_ROWS = ("numbers", "included", "correct", "probability", "test_correct", "test_margin")


def write_members(path: Path, members: Members, settings: Mapping[str, Any]) -> None:
    """Write members to one file."""
    arrays = {name: getattr(members, name) for name in _ROWS}
    arrays |= {name: np.packbits(arrays[name], axis=1) for name in _BITS}
    if members.left_out is not None:
        arrays["left_out"] = members.left_out
    sizes = [members.included.shape[1], members.test_correct.shape[1]]
    write_npz(path, **arrays, sizes=np.array(sizes), settings=json.dumps(settings, sort_keys=True))


def read_members(path: Path) -> tuple[Members, dict[str, Any]]:
    """Read a file of members.

    Returns:
        The members, and the settings that they were trained with.

    Raises:
        FileError: The file is missing or damaged, or was renamed.
    """
    content = read_npz(path)
    array = partial(checked_array, path, content, remedy="delete it, and train these members again")
    numbers = array("numbers", kinds="i")
    sizes = array("sizes", kinds="i", length=2)
    rows = {}
    for name in _ROWS[1:]:
        size = int(sizes[int(name.startswith("test_"))])
        width = -(-size // 8) if name in _BITS else size
        rows[name] = array(name, 2, length=len(numbers))
        if rows[name].shape[1] != width:
            raise FileError(f"{path}: array {name!r} has {rows[name].shape[1]} columns, expected {width}; delete it")
        if name in _BITS:
            rows[name] = np.unpackbits(rows[name], axis=1, count=size).astype(bool)
    left_out = array("left_out", 2, length=int(sizes[0])) if "left_out" in content else None
    members = Members(numbers, **rows, left_out=left_out)
    check_identity(path, {"file": f"members_{int(numbers[0] - 1) // BLOCK * BLOCK + 1}"}, file=path.stem)
    return members, parse_settings(path, content.get("settings"))


@dataclass(frozen=True)
class MemberFiles:
    """A folder of members, with one file for every hundred: ``members_1.npz``, ``members_101.npz``, ...

    Attributes:
        folder: The folder.
        settings: The settings that all members share.
        overwrite: Whether to replace members with different settings.
    """

    folder: Path
    settings: Mapping[str, Any]
    overwrite: bool = False

    def path(self, member: int) -> Path:
        """The file of a member."""
        return self.folder / f"members_{(member - 1) // BLOCK * BLOCK + 1}.npz"

    def read(self, member: int) -> Members | None:
        """Read the file of a member; None if there is none yet, or it may be replaced.

        Raises:
            FileError: It is damaged or has different settings.
        """
        return load_result(self.path(member), self.settings, read_members, overwrite=self.overwrite)

    def write(self, members: Members) -> None:
        """Write the members of one file."""
        write_members(self.path(int(members.numbers[0])), members, self.settings)

    def missing(self, last: int) -> np.ndarray:
        """The members from 1 to ``last`` that are not in this folder, int64, ascending."""
        blocks = [self.read(first) for first in range(1, last + 1, BLOCK)]
        found = [block.numbers for block in blocks if block is not None]
        return np.setdiff1d(np.arange(1, last + 1), np.concatenate(found) if found else [])

    def blocks(self, last: int) -> Iterator[Members]:
        """Read members 1 to ``last``, which exist, one file after another."""
        for first in range(1, last + 1, BLOCK):
            yield self.read(first).upto(last)

    def merge(self, source: Path) -> int:
        """Add the members of another folder.

        Args:
            source: The folder.

        Returns:
            The number of members added; 0 if this folder already has them all.

        Raises:
            FileError: The folder has no members, or they have different settings or differ from this folder's.
        """
        files = sorted(source.glob("members_*.npz"))
        if not files:
            raise FileError(f"{source}: has no members; give a folder that compute_memorization.py wrote")
        added = 0
        for path in files:
            new, settings = read_members(path)
            remedy = "merge only members trained with the same settings, and give these settings"
            check_settings_match(path, settings, self.settings, remedy=remedy)
            first = int(new.numbers[0])
            with lock(self.path(first).with_suffix(".lock"), "training these members"):
                old = self.read(first)
                twice = np.empty(0, np.int64) if old is None else np.intersect1d(old.numbers, new.numbers)
                if len(twice):
                    same = all(
                        np.array_equal(getattr(old, name)[np.isin(old.numbers, twice)],
                                       getattr(new, name)[np.isin(new.numbers, twice)])
                        for name in _ROWS
                    )  # fmt: skip
                    if not same or len(twice) < len(new.numbers):
                        raise FileError(
                            f"{path}: member {spans(twice)} is also in {self.path(first)}; merge parts without "
                            "common members"
                        )
                    continue
                self.write(new if old is None else old + new)
                added += len(new.numbers)
        return added


def spans(numbers: np.ndarray) -> str:
    """Format ascending numbers as spans: ``1-3, 7``."""
    groups = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else f"{group[0]}" for group in groups)


# ---------------------------------------------------------------------------------------------------- estimates


@dataclass(frozen=True)
class Results:
    """Estimates from members, or from the models of all ten splits.

    Attributes:
        correct: The estimate from correctness, for ``mem``.
        probability: The estimate from the probability of the label, for ``mem_prob``.
        counts: Number of members without and with each example, int64 ``(2, n)``.
        left_out: Each example's mean class probabilities over the members without it, float16 ``(n, C)``, NaN where
            there is none; None if not recorded.
        cost: The cost of all members, in epoch-equivalents; None if it is not recorded.
        settings: The settings that determine a member.
        sources: The number of members, or the seeds.
    """

    correct: Estimate
    probability: Estimate
    counts: np.ndarray
    left_out: np.ndarray | None
    cost: float | None
    settings: dict[str, Any]
    sources: dict[str, Any]

    @classmethod
    def of(cls, parts: Iterable[Members], total: int, unit: int | None, **facts: Any) -> Results:
        """Estimate from members, given in ascending order.

        Args:
            parts: The members.
            total: n.
            unit: See ``Tally``.
            facts: The other attributes.
        """
        correct, probability = Tally(total, unit), Tally(total, unit)
        sums: np.ndarray | None = np.zeros((), np.int64)
        for part in parts:
            correct.add(part.included, part.correct)
            probability.add(part.included, part.probability)
            sums = None if sums is None or part.left_out is None else sums + part.left_out
        left_out = None
        if sums is not None:
            with np.errstate(invalid="ignore"):  # examples that no member leaves out
                left_out = (sums / (UNIT * correct.counts[0][:, None])).astype(np.float16)
        return cls(correct.estimate(), probability.estimate(), correct.counts, left_out, **facts)
