"""DUAL: difficult and uncertain examples, shifting to easier ones as more is pruned (Cho et al., ICML 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from src import rng
from src.cli import number, option
from src.coresets.inputs import CandidateGroup, Method, Needs, Selection, SelectionInputs, WindowOptions
from src.coresets.ranked import checked_scores, keep_by_rank

_CONCENTRATION = 15.0  # C = alpha + beta
_EDGE = 1e-6  # the density has poles at 0 and 1


@dataclass(frozen=True)
class DualOptions(WindowOptions):
    """Options of DUAL.

    Attributes:
        dual_beta: Whether to sample with the Beta density; otherwise the highest scores are kept.
        dual_c: Exponent that sets how fast the density moves to easy examples as more is pruned.
    """

    dual_beta: bool = option(
        True, "dual: sample with the Beta density; otherwise keep the highest scores", negatable=True
    )
    dual_c: float = option(
        4.0,
        "dual: exponent that sets how fast the Beta density moves to easy examples with pruning",
        number(float, 0, open_low=True),
        acts=(lambda args: args.dual_beta, "with --no-dual_beta"),
    )


def beta_parameters(mu: float, pruned: float, c: float) -> tuple[float, float]:
    """The alpha and beta of the density of mean predictions (Cho et al., section 4.3).

    ``beta = C (1 - mu) (1 - r^c)`` and ``alpha = C - beta`` with C = 15. The density's mean is mu if nothing is
    pruned and approaches 1, the easy examples, as r approaches 1.

    Args:
        mu: Mean of the density if nothing is pruned.
        pruned: r, the fraction that is not kept, in [0, 1).
        c: Exponent above 0; with a larger c, the density shifts to easy examples at higher r.
    """
    beta = _CONCENTRATION * (1.0 - mu) * (1.0 - pruned**c)
    return _CONCENTRATION - beta, beta


def log_density(predictions: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Log of the Beta(alpha, beta) density ``(m,)``, without its constant, which does not affect the selection."""
    p = np.clip(predictions, _EDGE, 1.0 - _EDGE)
    return (alpha - 1.0) * np.log(p) + (beta - 1.0) * np.log1p(-p)


def weighted_choice(
    scores: np.ndarray, log_factors: np.ndarray, budget: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw positions one by one without replacement, with probability proportional to ``score * exp(log_factor)``.

    Takes the largest sums of log weight and Gumbel noise (the Gumbel top-k trick). They follow the same distribution
    as sequential draws and neither overflow nor underflow. Scores of 0 come last, in random order.

    Args:
        scores: ``(m,)``, at least 0.
        log_factors: ``(m,)``, finite.
        budget: From 1 to m.
        generator: Source of the m Gumbel samples.
    """
    noise = generator.gumbel(size=len(scores))
    positive = scores > 0
    logs = np.log(scores, out=np.zeros(len(scores)), where=positive)
    keys = np.where(positive, logs + log_factors, 0.0) + noise
    return np.lexsort((-keys, ~positive))[:budget]  # stable: ties go to the lower position


def dual_selection(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: DualOptions) -> Selection:
    """DUAL pruning (Cho et al., ICML 2025, section 4): difficulty and uncertainty, with Beta sampling.

    From the paper: the score ``S_i`` is the mean over windows of ``(1 - mean p) * std p``, with p the probability of
    the true label. Examples are drawn without replacement with probability proportional to ``phi(p_i) S_i``, with p_i
    the example's mean prediction and phi the Beta density of :func:`beta_parameters`. Without ``dual_beta``, the
    highest scores are kept.

    From memory, not certain: the form of alpha and beta; C = 15; that mu is the mean prediction of the
    highest-scoring example; and c = 5.5 for CIFAR-10, 4 for CIFAR-100 and 11 for ImageNet (a larger c moves to easy
    examples at a larger r). Our interpretation: mu is computed once over all candidates, as the mean over those tied
    for the highest score; r is the group's pruning rate; p_i is the mean over all recorded epochs, clipped to stay
    1e-6 away from 0 and 1; examples with score 0 are drawn, uniformly, only after all others.

    Args:
        inputs: ``scores`` ``(n,)``; with ``dual_beta`` also ``dynamics["probability"]`` ``(epochs, n)``.
        groups: The groups of candidates.
        options: ``dual_beta``, ``dual_c`` (``score_window`` is used where the scores are computed).

    Raises:
        FileError: A candidate has no score.
    """
    scores = checked_scores(inputs, "dual")
    if not options.dual_beta:
        return keep_by_rank(scores, groups, highest=True, what="dual")
    predictions = np.nanmean(inputs.dynamics["probability"], axis=0, dtype=np.float64)  # over epochs that visited it
    mu = float(predictions[scores == scores.max()].mean())
    generator = rng.numpy_generator(inputs.seed, 0, "dual")
    picks = []
    for group in groups:
        members = group.positions
        density = beta_parameters(mu, 1 - group.budget / len(members), options.dual_c)
        factors = log_density(predictions[members], *density)
        picks.append(members[weighted_choice(scores[members], factors, group.budget, generator)])
    return Selection.of(picks)


METHODS = (
    Method(
        "dual",
        dual_selection,
        Needs(reduced="dual", dynamics=("probability",)),
        paper="Cho et al. 2025",
        equation="sample by (1 - mean p) std p over windows, times a Beta density of mean p that moves to easy "
        "examples",
        cost="n T + n log n for T epochs",
        options=DualOptions,
    ),
)
