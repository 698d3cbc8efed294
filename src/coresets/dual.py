"""DUAL: difficult and uncertain examples, and easier ones the more is pruned (Cho et al., ICML 2025)."""

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
        dual_beta: Whether to sample by the Beta density; else the highest scores are kept.
        dual_c: How fast the density moves to easy examples as more is pruned.
    """

    dual_beta: bool = option(True, "dual: sample by its Beta density; else keep the highest scores", negatable=True)
    dual_c: float = option(
        4.0,
        "dual: how fast its density moves with pruning",
        number(float, 0, open_low=True),
        acts=(lambda args: args.dual_beta, "with --no-dual_beta"),
    )


def beta_parameters(mu: float, pruned: float, c: float) -> tuple[float, float]:
    """The alpha and beta of the density of mean predictions (Cho et al., section 4.3).

    ``beta = C (1 - mu) (1 - r^c)`` and ``alpha = C - beta`` with C = 15: the mean is mu where nothing is pruned, and
    goes to 1, the easy examples, as r goes to 1.

    Args:
        mu: Mean prediction around which the density starts.
        pruned: r, the share that is not kept, in [0, 1).
        c: How late the density moves, above 0.
    """
    beta = _CONCENTRATION * (1.0 - mu) * (1.0 - pruned**c)
    return _CONCENTRATION - beta, beta


def log_density(predictions: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Log of the Beta(alpha, beta) density without its constant, which no choice depends on; ``(m,)``."""
    p = np.clip(predictions, _EDGE, 1.0 - _EDGE)
    return (alpha - 1.0) * np.log(p) + (beta - 1.0) * np.log1p(-p)


def weighted_choice(
    scores: np.ndarray, log_factors: np.ndarray, budget: int, generator: np.random.Generator
) -> np.ndarray:
    """Positions drawn one by one without replacement, with probability in proportion to ``score * exp(log_factor)``.

    By the largest sums of log weight and Gumbel noise, which are distributed as such draws are, and which neither
    overflow nor underflow. Scores of 0 come last, in random order.

    Args:
        scores: ``(m,)``, at least 0.
        log_factors: ``(m,)``, finite.
        budget: From 1 to m.
        generator: m numbers are drawn of it.
    """
    noise = generator.gumbel(size=len(scores))
    positive = scores > 0
    logs = np.log(scores, out=np.zeros(len(scores)), where=positive)
    keys = np.where(positive, logs + log_factors, 0.0) + noise
    return np.lexsort((-keys, ~positive))[:budget]  # stable: of equal keys the lower position


def dual_selection(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: DualOptions) -> Selection:
    """DUAL pruning (Cho et al., ICML 2025, section 4): difficulty and uncertainty, with Beta sampling.

    From the paper: the score ``S_i`` is the mean over windows of ``(1 - mean p) * std p`` for p the true label's
    probability; an example is drawn without replacement with probability in proportion to ``phi(p_i) S_i``, p_i its
    mean prediction and phi the Beta density of :func:`beta_parameters`. Without ``dual_beta`` the highest scores
    are kept.

    From memory, not certain: the form of alpha and beta, C = 15, that mu is the mean prediction of the
    highest-scoring example, and c of 5.5 for CIFAR-10, 4 for CIFAR-100 and 11 for ImageNet (larger: the turn to easy
    examples comes at larger r). Our reading: mu is taken once over all candidates, the mean over those that share the
    highest score; r is the share pruned in the group; p_i is the mean over all recorded epochs, kept 1e-6 away from 0
    and 1; examples of score 0 are drawn, uniformly, only once all others are.

    Args:
        inputs: ``scores`` ``(n,)``; ``dynamics["probability"]`` ``(epochs, n)`` where ``dual_beta``.
        groups: The groups.
        options: ``dual_beta``, ``dual_c`` (``score_window`` is read where the scores are made).

    Raises:
        FileError: A candidate has no score.
    """
    scores = checked_scores(inputs, "dual")
    if not options.dual_beta:
        return keep_by_rank(scores, groups, highest=True, what="dual")
    predictions = np.nanmean(inputs.dynamics["probability"], axis=0, dtype=np.float64)  # over the epochs that saw it
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
        equation="drawn by (1 - mean p) std p over windows, times a Beta density of mean p that turns to easy "
        "examples",
        cost="n T + n log n for T epochs",
        options=DualOptions,
    ),
)
