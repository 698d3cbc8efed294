"""GLISTER: the examples whose gradient steps most lower the loss on held-out data (Killamsetty et al., AAAI 2021)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from src import rng
from src.cli import number, option
from src.coresets.gradmatch import first_largest
from src.coresets.inputs import (
    CandidateGroup,
    Draws,
    GreedyOptions,
    LastLayer,
    Method,
    Needs,
    Selection,
    SelectionInputs,
    errors_of,
    gradient_sum,
    products_with,
)
from src.datasets.splits import rounded_share
from src.lazy import torch

log = logging.getLogger(__name__)

_HELD_OUT = 0.1  # of each class
_TIE = 1e-12  # of the largest gain: differences below are rounding, and the index decides
_LONG = 60.0  # seconds of a group above which the log advises how to shorten it
_TIMED = 5  # refreshes that the estimate is made from


@dataclass(frozen=True)
class GlisterOptions(GreedyOptions):
    """Options of GLISTER.

    Attributes:
        glister_eta: Step of the one-step model.
        glister_refresh: Picks between two refreshes of the validation gradient.
    """

    glister_eta: float = option(0.1, "glister: its step", number(float, 0, open_low=True))
    glister_refresh: int = option(
        1, "glister: picks between two refreshes of the validation gradient", number(int, 1)
    )


def glister(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: GlisterOptions) -> Selection:
    """GLISTER on last-layer gradients, group by group (Killamsetty et al. 2021, GreedyDSS, algorithm 2).

    A seeded tenth of each class is held out as V. To first order, training on x lowers the loss on V by ``<g_x, v>``,
    v the mean gradient of V where the last layer has taken a step of ``glister_eta`` along the mean gradient of the
    picks; v is brought up to date every ``glister_refresh`` picks (1 is exact). A class is judged by its own held-out
    examples, or by all of V where it has none (a single example); where no class has two, the candidates serve as V.
    Budgets count the full group: once its candidates are used up, its held-out examples follow in the same way.

    A refresh costs (n + 2 |V|) C min(d, |V|) multiplications for a group of n and its |V|, a pick n comparisons.
    Memory: n (C + d) numbers of 8 bytes, and n |V| where |V| is below d and those fit in ``selection_memory``.

    Subsampled, a pick is the best of s random examples (see :class:`Draws`) and costs (s + 1) C |V| after n |V| d for
    all, or, where n |V| numbers do not fit in ``selection_memory``, (s + 2 |V|) C d. The gains of this first-order
    greedy are not those of one submodular function, so there is no bound.
    """
    epsilon, generator = options.epsilon(groups), rng.numpy_generator(inputs.seed, 0, "glister candidates")
    layer, labels = inputs.layers[0], np.asarray(inputs.labels)
    held = held_out(labels, inputs.num_classes, inputs.seed)
    picks = []
    for group in groups:
        inside = held[group.positions]
        pool = np.concatenate([group.positions[~inside], group.positions[inside]])
        judges = np.flatnonzero(held if group.label is None else held & (labels == group.label))
        if not len(judges):
            judges = np.flatnonzero(held) if held.any() else np.arange(len(labels))
        first, draws = int((~inside).sum()), None
        if epsilon is not None:
            draws = [
                Draws(count, min(group.budget, count), epsilon, generator) for count in (first, len(pool) - first)
            ]
        chosen = greedy(layer.at(pool), first, layer.at(judges), group.budget, options, draws)
        picks.append(pool[chosen])
    return Selection.of(picks)


def held_out(labels: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """Which candidates are held out, bool ``(n,)``: a tenth of each class, at least 1 where it has 2 or more."""
    generator = rng.numpy_generator(seed, 0, "glister hold-out")
    held = np.zeros(len(labels), dtype=bool)
    for label in range(num_classes):
        members = np.flatnonzero(labels == label)
        if len(members) > 1:
            held[generator.choice(members, max(rounded_share(len(members), _HELD_OUT), 1), replace=False)] = True
    return held


def greedy(
    pool: LastLayer,
    first: int,
    judges: LastLayer,
    budget: int,
    options: GlisterOptions,
    draws: Sequence[Draws] | None = None,
) -> np.ndarray:
    """Pick from the pool the largest gain again and again (of equals the first).

    Args:
        pool: Members of the group, candidates before held-out examples.
        first: How many of them are candidates; the others are picked only when these are used up.
        judges: V.
        budget: How many to pick.
        options: Step, refresh and memory.
        draws: The random candidates of each pick, before and after the candidates are used up; None for all.

    Returns:
        Positions in the pool in the order of the picks, int64 ``(budget,)``.
    """
    validation = Validation(pool, judges, options.glister_eta, options.selection_memory, few=draws is not None)
    picks = np.empty(budget, dtype=np.int64)
    started = time.perf_counter()
    for count in range(budget):
        if count % options.glister_refresh == 0:
            fresh = picks[max(count - options.glister_refresh, 0) : count]
            validation.refresh(fresh)
            if draws is None:
                gains = validation.gains()
                slack = _TIE * float(gains.abs().max())
                gains[picks[:count]] = -math.inf
        if count == _TIMED * options.glister_refresh:
            seconds = (time.perf_counter() - started) * budget / count
            if seconds > _LONG:
                log.info(
                    "glister: about %.0f minutes for %d picks; a larger --glister_refresh (picks between two updates "
                    "of the validation gradient) divides that",
                    seconds / 60,
                    budget,
                )
        start, stop = (0, first) if count < first else (first, len(pool.labels))
        if draws is None:
            pick = start + first_largest(gains[start:stop], slack)
            gains[pick] = -math.inf
        else:
            drawn = draws[int(start > 0)].draw()
            gains = validation.gains(start + drawn)
            position = drawn[first_largest(gains, _TIE * float(gains.abs().max()))]
            draws[int(start > 0)].take(position)
            pick = start + position
        picks[count] = pick
    return picks


class Validation:
    """The mean gradient v of V after a step along the picks, and the gains of a pool's examples.

    With M the matrix of ``1 + <h_x, h_v>``, ``(n, |V|)``, the logits of V after the step are
    ``z_v - eta / |S| sum_{s in S} M_sv e_s`` and the gains ``<e_x, sum_v M_xv e_v'> / |V|``. M is kept where |V| is
    below d and it fits; else both go through the C x d matrices ``sum_s e_s h_s^T`` and ``sum_v e_v' h_v^T``.

    Args:
        pool: What is picked from.
        judges: V.
        eta: The step.
        memory: MiB that M may take.
        few: Whether gains are asked of few at a time: then M is kept where it fits, whatever |V| is.
    """

    def __init__(self, pool: LastLayer, judges: LastLayer, eta: float, memory: int = 2048, few: bool = False) -> None:
        self.eta, self.count = eta, 0
        self.errors, self.embeddings = pool.errors.double(), pool.embeddings.double()
        self.logits, self.labels = judges.logits.double(), judges.labels
        self.judges = judges.embeddings.double()
        self.effect = torch.zeros_like(self.logits)  # sum_{s in S} M_sv e_s, (|V|, C)
        sizes = len(self.errors), len(self.labels)
        small = (few or sizes[1] < self.embeddings.shape[1]) and 8 * sizes[0] * sizes[1] <= memory * 2**20
        self.kernel = (self.embeddings @ self.judges.T).add_(1.0) if small else None

    def refresh(self, fresh: np.ndarray) -> None:
        """Count some more picks in."""
        errors = self.judged(fresh) / len(self.labels)
        if self.kernel is not None:
            self.mean = (errors,)
        else:
            self.mean = gradient_sum(errors, self.judges)  # v itself

    def gains(self, among: np.ndarray | None = None) -> torch.Tensor:
        """``<g_x, v>`` of the full pool, ``(n,)``, or of some positions."""
        rows = slice(None) if among is None else torch.from_numpy(among).to(self.labels.device)
        if self.kernel is not None:
            return (self.kernel[rows] @ self.mean[0]).mul_(self.errors[rows]).sum(dim=1)
        return products_with(*self.mean, self.errors[rows], self.embeddings[rows])

    def judged(self, fresh: np.ndarray) -> torch.Tensor:
        """Count some more picks in, and return V's errors after the step along all of them, ``(|V|, C)``."""
        if len(fresh):
            chosen = torch.from_numpy(fresh).to(self.labels.device)
            errors = self.errors[chosen]
            if self.kernel is not None:
                self.effect.addmm_(self.kernel[chosen].T, errors)
            else:
                bias, weight = gradient_sum(errors, self.embeddings[chosen])
                self.effect.addmm_(self.judges, weight.T).add_(bias)
            self.count += len(fresh)
        return errors_of(self.logits - self.eta / max(self.count, 1) * self.effect, self.labels)


METHODS = (
    Method(
        "glister",
        glister,
        Needs(embeddings=True),
        paper="Killamsetty et al. 2021 (GLISTER)",
        equation="greedy in <g_x, v>, v the mean gradient of 10 % held out, after a step eta along the picks "
        "(alg. 2)",
        cost="k/r n C min(d, |V|), r picks between two refreshes; subsampled: n |V| d + (n + k) C |V|",
        options=GlisterOptions,
    ),
)
