"""CCS: select examples of every difficulty except the hardest (Zheng et al., ICLR 2023)."""

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

_ROUNDING = 1e-9  # 0.3 * 10 is slightly below 3 in floating point; cut off three examples

# fraction pruned -> fraction of hardest examples cut off
CUTOFFS = ((0.3, 0.0), (0.5, 0.0), (0.7, 0.1), (0.8, 0.1), (0.9, 0.3))


@dataclass(frozen=True)
class CCSOptions(Options):
    """Options of CCS.

    Attributes:
        ccs_cutoff: Fraction of hardest examples to drop, in [0, 1); None for the paper's, by pruning rate.
        ccs_bins: Number of strata.
    """

    ccs_cutoff: float | None = option(
        None,
        "ccs: fraction of hardest examples to drop (default: the paper's value for the pruning rate)",
        number(float, 0, 1, open_high=True),
    )
    ccs_bins: int = option(50, "ccs: number of strata", number(int, 1))


def finite_scores(inputs: SelectionInputs, what: str) -> np.ndarray:
    """Return the inputs' scores, float64 ``(n,)``, after checking that all are finite.

    Raises:
        FileError: A candidate has no score or an infinite score.
    """
    scores = checked_scores(inputs, what)
    infinite = np.flatnonzero(np.isinf(scores))
    if len(infinite):
        raise FileError(
            f"{what}: {len(infinite)} of {len(scores)} scores are infinite (the first is for example "
            f"{inputs.name(infinite[0])}); lower the pre-training learning rate to keep the logits finite"
        )
    return scores


def published_cutoff(pruned: float) -> float:
    """The fraction of hardest examples to cut off: linear between the published rates, constant beyond them.

    ``CUTOFFS`` is the row for CIFAR-10 and AUM in the paper's appendix, where the values come from a grid search. It
    is recalled from memory; the interpolation is ours. For CIFAR-100 the paper cuts more: 10, 20, 20, 40 and 50 % at
    the same pruning rates (also from memory).

    Args:
        pruned: Fraction of the examples that is not kept, in [0, 1).
    """
    shares, cutoffs = zip(*CUTOFFS, strict=True)
    return float(np.interp(pruned, shares, cutoffs))


def strata(scores: np.ndarray, bins: int) -> np.ndarray:
    """Assign each score to one of ``bins`` strata of equal width between the lowest and highest score.

    The highest score belongs to the last stratum. If all scores are equal, all belong to the first.

    Returns:
        Stratum indices, int64 ``(m,)``.
    """
    low, width = scores.min(), np.ptp(scores)
    if width == 0:
        return np.zeros(len(scores), dtype=np.int64)
    return np.minimum((scores - low) / width * bins, bins - 1).astype(np.int64)


def stratum_budgets(sizes: np.ndarray, budget: int) -> np.ndarray:
    """Split the budget evenly over the strata (algorithm 1); what small strata cannot supply goes to the others.

    The smallest stratum comes first (the easiest, if sizes are equal) and supplies ``min(size, floor(remaining
    budget / remaining strata))``. The last stratum can therefore always supply the rest, and the budget is met.

    Args:
        sizes: ``(b,)``, each at least 1.
        budget: At most the sum of the sizes.

    Returns:
        Number to take from each stratum, int64 ``(b,)``.
    """
    takes = np.zeros(len(sizes), dtype=np.int64)
    for done, stratum in enumerate(np.argsort(sizes, kind="stable")):
        takes[stratum] = min(sizes[stratum], budget // (len(sizes) - done))
        budget -= takes[stratum]
    return takes


def _choose(
    positions: np.ndarray, scores: np.ndarray, budget: int, bins: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw ``budget`` of the positions, stratified by score."""
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

    From the paper: the fraction beta of hardest examples (lowest AUM) is cut off. The range of the remaining scores
    is split into strata of equal width. Each stratum supplies an equal part of the budget, drawn uniformly, smallest
    stratum first; the others make up for what a small stratum lacks. The published form uses a single group.

    Our interpretation: with one group per class, each class has its own cut, strata and budget. Empty strata are
    skipped (in the paper they come first and supply nothing, which is equivalent). Ties at the cut keep the lower
    index. If beta leaves fewer examples than the budget, fewer are cut off to meet it. If ``ccs_cutoff`` is None,
    beta is :func:`published_cutoff` at the group's pruning rate.

    Args:
        inputs: ``scores`` ``(n,)``, the negated AUM: HIGH is hard.
        groups: The groups of candidates.
        options: Cutoff and number of strata.

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
            "ccs: the cutoff leaves fewer examples than the budget in %d of %d groups; cutting off fewer there",
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
        equation="drop the beta n hardest, then draw equally from AUM strata of equal width (algorithm 1)",
        cost="n log n",
        options=CCSOptions,
    ),
)
