"""CCS: a choice that covers all difficulties but the hardest (Zheng et al., ICLR 2023)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from src import rng
from src.cli import number, option
from src.coresets.inputs import CandidateGroup, Method, Needs, Options, Selection, SelectionInputs
from src.coresets.ranked import checked_scores
from src.errors import FileError

log = logging.getLogger(__name__)

_ROUNDING = 1e-9  # 0.3 * 10 is a hair below 3; three examples are cut off

# share pruned -> share of hardest examples cut off
CUTOFFS = ((0.3, 0.0), (0.5, 0.0), (0.7, 0.1), (0.8, 0.1), (0.9, 0.3))


@dataclass(frozen=True)
class CCSOptions(Options):
    """Options of CCS.

    Attributes:
        ccs_cutoff: Share of hardest examples to leave out, in [0, 1); None for the paper's, by pruning rate.
        ccs_bins: Strata.
    """

    ccs_cutoff: float | None = option(
        None,
        "ccs: share of hardest examples to leave out (default: the paper's, by fraction)",
        number(float, 0, 1, open_high=True),
    )
    ccs_bins: int = option(50, "ccs: strata", number(int, 1))


def finite_scores(inputs: SelectionInputs, what: str) -> np.ndarray:
    """The inputs' scores, float64 ``(n,)``.

    Raises:
        FileError: A candidate has no score, or an infinite one.
    """
    scores = checked_scores(inputs, what)
    infinite = np.flatnonzero(np.isinf(scores))
    if len(infinite):
        raise FileError(
            f"{what}: {len(infinite)} of the {len(scores)} scores are infinite (the first is of example "
            f"{inputs.name(infinite[0])}); pre-train with a smaller rate, so that the logits stay finite"
        )
    return scores


def published_cutoff(pruned: float) -> float:
    """The share of hardest examples to cut off, linear between the published rates, constant beyond them.

    ``CUTOFFS`` is the row for CIFAR-10 and AUM of the paper's appendix (the rates were found there by grid search),
    recalled from memory; the interpolation is ours. For CIFAR-100 the paper cuts more: 10, 20, 20, 40 and 50 % at
    the same shares pruned (from memory too).

    Args:
        pruned: Share of the examples that is not kept, in [0, 1).
    """
    shares, cutoffs = zip(*CUTOFFS, strict=True)
    return float(np.interp(pruned, shares, cutoffs))


def strata(scores: np.ndarray, bins: int) -> np.ndarray:
    """The stratum of each score, int64 ``(m,)``, of ``bins`` of equal width between the lowest and the highest score.

    The highest score belongs to the last stratum; equal scores all to the first.
    """
    low, width = scores.min(), np.ptp(scores)
    if width == 0:
        return np.zeros(len(scores), dtype=np.int64)
    return np.minimum((scores - low) / width * bins, bins - 1).astype(np.int64)


def stratum_budgets(sizes: np.ndarray, budget: int) -> np.ndarray:
    """How many to take of each stratum (algorithm 1): shares are equal, and what small strata lack goes to others.

    The smallest stratum comes first (of equals the easiest) and gives ``min(size, floor(rest / strata left))``.
    So the last one can always give the rest, and the budget is met.

    Args:
        sizes: ``(b,)``, each at least 1.
        budget: At most the sum of the sizes.
    """
    takes = np.zeros(len(sizes), dtype=np.int64)
    for done, stratum in enumerate(np.argsort(sizes, kind="stable")):
        takes[stratum] = min(sizes[stratum], budget // (len(sizes) - done))
        budget -= takes[stratum]
    return takes


def _choose(
    positions: np.ndarray, scores: np.ndarray, budget: int, bins: int, generator: np.random.Generator
) -> np.ndarray:
    """``budget`` of the positions, stratified by score."""
    stratum = strata(scores, bins)
    order = np.argsort(stratum, kind="stable")
    sizes = np.bincount(stratum)
    sizes = sizes[sizes > 0]
    members = np.split(positions[order], np.cumsum(sizes)[:-1])
    takes = stratum_budgets(sizes, budget)
    drawn = [generator.choice(part, take, replace=False) for part, take in zip(members, takes, strict=True)]
    return np.concatenate(drawn)


def ccs(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: CCSOptions) -> Selection:
    """Coverage-centric coreset selection (Zheng et al., ICLR 2023, algorithm 1), with AUM as difficulty.

    From the paper: the share beta of hardest examples (those of the lowest AUM) is cut off; the range of the scores
    that remain is split into strata of equal width; strata give equal shares of the budget, drawn uniformly, the
    smallest first, and what it lacks is shared by the rest. One group of all is the published form.

    Our reading: with a group per class, each class has its own cut, strata and budget. Empty strata take no part
    (in the paper they come first and give nothing, which is the same). Of equal scores at the cut the lower index
    stays. Where beta leaves fewer than the budget, only what is not needed is cut off. Without ``ccs_cutoff``, beta
    is :func:`published_cutoff` of the share pruned in the group.

    Args:
        inputs: ``scores`` ``(n,)``, the negated AUM: HIGH is hard.
        groups: The groups.
        options: Cutoff and strata.

    Raises:
        FileError: A candidate has no finite score.
    """
    scores = finite_scores(inputs, "ccs")
    generator = rng.numpy_generator(inputs.seed, 0, "ccs")
    picks, capped = [], 0
    for group in groups:
        size = len(group.positions)
        share = published_cutoff(1 - group.budget / size) if options.ccs_cutoff is None else options.ccs_cutoff
        cut = int(share * size + _ROUNDING)
        capped += cut > size - group.budget
        order = np.argsort(scores[group.positions], kind="stable")
        kept = np.sort(group.positions[order[: max(size - cut, group.budget)]])
        picks.append(_choose(kept, scores[kept], group.budget, options.ccs_bins, generator))
    if capped:
        log.info(
            "ccs: the cutoff leaves fewer examples than the budget in %d of %d groups; fewer are cut off there",
            capped,
            len(groups),
        )
    return Selection.of(picks)


METHODS = (
    Method(
        "ccs",
        ccs,
        Needs(reduced="aum"),
        paper="Zheng et al. 2023",
        equation="hardest beta n left out, then equal random shares of strata of equal width in AUM (algorithm 1)",
        cost="n log n",
        options=CCSOptions,
    ),
)
