"""GLISTER: examples whose gradient steps most reduce the loss on held-out data (Killamsetty et al., AAAI 2021)."""

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

_HELD_OUT = 0.1  # fraction of each class
_TIE = 1e-12  # relative to the largest gain; smaller differences are rounding, and ties go to the lower index
_LONG = 60.0  # seconds per group above which the log suggests how to speed it up
_TIMED = 5  # number of refreshes used to estimate the time


@dataclass(frozen=True)
class GlisterOptions(GreedyOptions):
    """Options of GLISTER.

    Attributes:
        glister_eta: Step size eta of the one-step model.
        glister_refresh: Picks between refreshes of the validation gradient.
    """

    glister_eta: float = option(0.1, "glister: step size", number(float, 0, open_low=True))
    glister_refresh: int = option(1, "glister: picks between refreshes of the validation gradient", number(int, 1))


def glister(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: GlisterOptions) -> Selection:
    """GLISTER on last-layer gradients, group by group (Killamsetty et al. 2021, GreedyDSS, algorithm 2).

    A seeded tenth of each class is held out as V. To first order, training on x lowers the loss on V by ``<g_x, v>``,
    with v the mean gradient of V after the last layer takes a step of ``glister_eta`` along the mean gradient of the
    picks. v is refreshed every ``glister_refresh`` picks (1 is exact). A class is scored on its own held-out
    examples, or on all of V if it has none (a class of one example). If no class has two examples, the candidates
    serve as V. Budgets count the full group: once a group's candidates run out, its held-out examples are picked in
    the same way.

    A refresh costs (n + 2 |V|) C min(d, |V|) multiplications for a group of n and its |V|; a pick, n comparisons.
    Memory: n (C + d) numbers of 8 bytes, plus n |V| if |V| is below d and they fit in ``selection_memory``.

    With subsampling, a pick is the best of s random examples (see :class:`Draws`). It costs (s + 1) C |V| after
    n |V| d once, or (s + 2 |V|) C d if n |V| numbers do not fit in ``selection_memory``. The gains of this
    first-order greedy are not those of a single submodular function, so there is no approximation bound.
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
            parts = (first, min(group.budget, first)), (len(pool) - first, max(group.budget - first, 1))
            draws = [Draws(*part, epsilon, generator) for part in parts]
        chosen = greedy(layer.at(pool), first, layer.at(judges), group.budget, options, draws)
        picks.append(pool[chosen])
    return Selection.of(picks)


def held_out(labels: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """Choose which candidates to hold out, bool ``(n,)``: a tenth of each class, at least 1 if it has 2 or more."""
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
    """Repeatedly pick the largest gain from the pool (ties go to the first).

    Args:
        pool: Members of the group, candidates before held-out examples.
        first: Number of candidates in the pool; held-out examples are picked only after these run out.
        judges: V.
        budget: Number of picks.
        options: Step size, refresh interval and memory.
        draws: Random candidates for each pick, before and after the candidates run out; None for all examples.

    Returns:
        Positions in the pool in selection order, int64 ``(budget,)``.
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
                    "glister: about %.0f minutes for %d picks; raise --glister_refresh (picks between refreshes of "
                    "the validation gradient) to divide this time",
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

    With M the ``(n, |V|)`` matrix of ``1 + <h_x, h_v>``, the logits of V after the step are
    ``z_v - eta / |S| sum_{s in S} M_sv e_s``, and the gains are ``<e_x, sum_v M_xv e_v'> / |V|``. M is stored if |V|
    is below d and M fits in memory; otherwise both use the C x d matrices ``sum_s e_s h_s^T`` and
    ``sum_v e_v' h_v^T``.

    Args:
        pool: The examples to pick from.
        judges: V.
        eta: Step size.
        memory: Memory limit of M in MiB.
        few: Whether each call computes few gains. If so, M is stored whenever it fits, for any |V|.
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
        """Add new picks and recompute v."""
        errors = self.judged(fresh) / len(self.labels)
        if self.kernel is not None:
            self.mean: tuple[torch.Tensor, ...] = (errors,)
        else:
            self.mean = gradient_sum(errors, self.judges)  # v itself

    def gains(self, among: np.ndarray | None = None) -> torch.Tensor:
        """``<g_x, v>`` for the full pool, ``(n,)``, or for the given positions."""
        rows = slice(None) if among is None else torch.from_numpy(among).to(self.labels.device)
        if self.kernel is not None:
            return (self.kernel[rows] @ self.mean[0]).mul_(self.errors[rows]).sum(dim=1)
        return products_with(*self.mean, self.errors[rows], self.embeddings[rows])

    def judged(self, fresh: np.ndarray) -> torch.Tensor:
        """Add new picks and return V's errors after the step along all of them, ``(|V|, C)``."""
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
        Needs(logits=True, embeddings=True),
        paper="Killamsetty et al. 2021 (GLISTER)",
        equation="greedy in <g_x, v>, v the mean gradient of a held-out 10 % after a step eta along the picks "
        "(alg. 2)",
        cost="k/r n C min(d, |V|), r picks between refreshes; subsampled: n |V| d + (n + k) C |V|",
        options=GlisterOptions,
    ),
)
