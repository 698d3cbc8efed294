"""Choosing by rank: stored scores, and the published criteria that keep the highest scores."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from src import rng
from src.cli import option
from src.coresets.inputs import (
    CandidateGroup,
    Method,
    Needs,
    Options,
    Selection,
    SelectionInputs,
    WindowOptions,
    gradient_norms,
)
from src.errors import FileError
from src.lazy import torch
from src.metrics import SCORES

log = logging.getLogger(__name__)

_MANY_TIES = 0.01  # of a selection: where more of it is decided by index alone, a warning is logged


def keep_by_rank(scores: np.ndarray, groups: Sequence[CandidateGroup], *, highest: bool, what: str) -> Selection:
    """Of each group, the examples of the highest or the lowest scores.

    Candidates are ordered by (score, position); the lowest are the head of that order, the highest its tail.

    Args:
        scores: ``(n,)``, without NaN (infinity is a score like any other).
        groups: The groups; together they hold each position at most once.
        highest: Which end to keep.
        what: The score's name, for the notice about ties.
    """
    group_of = np.full(len(scores), len(groups), dtype=np.int16 if len(groups) < 2**15 - 1 else np.int64)
    for number, group in enumerate(groups):
        group_of[group.positions] = number
    order = np.argsort(scores, kind="stable")
    order = order[np.argsort(group_of[order], kind="stable")]  # by group, then score, then position
    picks, start, decided = [], 0, 0
    for group in groups:
        ranked = order[start : start + len(group.positions)]
        start += len(ranked)
        cut = len(ranked) - group.budget if highest else group.budget
        picks.append(ranked[cut:] if highest else ranked[:cut])
        if 0 < cut < len(ranked) and scores[ranked[cut - 1]] == scores[ranked[cut]]:
            decided += int((scores[picks[-1]] == scores[ranked[cut]]).sum())
    chosen = sum(map(len, picks))
    if decided > _MANY_TIES * chosen:
        log.warning(
            "%s: %d of the %d chosen examples share the score at the cut with others left out; their index decided",
            what,
            decided,
            chosen,
        )
    return Selection.of(picks)


def checked_scores(inputs: SelectionInputs, what: str) -> np.ndarray:
    """The inputs' scores.

    Raises:
        FileError: A candidate has no score.
    """
    scores = np.asarray(inputs.scores, dtype=np.float64)
    missing = np.flatnonzero(np.isnan(scores))
    if len(missing):
        raise FileError(
            f"{what}: has no score of {len(missing)} of the {len(scores)} candidates "
            f"(the first is example {inputs.name(missing[0])}); score all of them, or choose them with --subset"
        )
    return scores


@dataclass(frozen=True)
class StoredOptions(Options):
    """Options of the methods that rank by a stored score.

    Attributes:
        coreset_mode: ``"large"`` keeps the highest scores, ``"few_shot"`` the lowest.
    """

    coreset_mode: str = "large"


@dataclass(frozen=True)
class GraNdOptions(Options):
    """Options of GraNd.

    Attributes:
        grand_gradient: The gradient in the ``"last"`` layer, or in all parameters (``"full"``).
    """

    grand_gradient: str = option("last", "grand: gradient of what", choices=("last", "full"))


def stored(mode: str, inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: StoredOptions) -> Selection:
    """A stored score: its highest (``coreset_mode`` large) or lowest (few_shot)."""
    scores = checked_scores(inputs, f"the stored score {mode}")
    return keep_by_rank(scores, groups, highest=options.coreset_mode == "large", what=mode)


def reduced(name: str, inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: Any) -> Selection:
    """A score reduced from the dynamics: its highest."""
    return keep_by_rank(checked_scores(inputs, name), groups, highest=True, what=name)


def forget(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """Forgetting: the most events, and before them what was never learned (Toneva et al. 2019, section 2)."""
    learned = (inputs.dynamics["correct"] == 1).any(axis=0)
    scores = checked_scores(inputs, "forget")
    return keep_by_rank(np.where(learned, scores, np.inf), groups, highest=True, what="forget")


def _mean_over_models(columns: Sequence[torch.Tensor]) -> np.ndarray:
    return torch.stack([column.double().cpu() for column in columns]).mean(dim=0).numpy()


def el2n_selection(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """EL2N: the largest error norms, averaged over independent initializations."""
    scores = _mean_over_models([layer.errors.double().norm(dim=1) for layer in inputs.layers])
    return keep_by_rank(scores, groups, highest=True, what="el2n")


def grand(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: GraNdOptions) -> Selection:
    """GraNd: the largest gradient norms, averaged over independent initializations."""
    if options.grand_gradient == "full":
        columns = [layer.gradient_norms for layer in inputs.layers]
    else:
        columns = [gradient_norms(layer.errors, layer.embeddings) for layer in inputs.layers]
    return keep_by_rank(_mean_over_models(columns), groups, highest=True, what="grand")


def random_choice(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """Of each group ``budget`` positions, drawn uniformly without replacement."""
    generator = rng.numpy_generator(inputs.seed, 0, "coreset")
    return Selection.of([generator.choice(group.positions, group.budget, replace=False) for group in groups])


_STORED = {"samis_loss": "min_sam-sgd-loss", "samis_prob": "min_sam-sgd-prob"}  # as the SAMIS paper's scripts say

METHODS = (
    Method("random", random_choice, Needs(), "baseline", "uniform, without replacement", "n"),
    *(
        Method(
            _STORED.get(score.name, f"min_{score.name}"),
            partial(stored, score.name),
            Needs(stored=score.name),
            paper=score.paper,
            equation="large keeps the highest scores, few_shot the lowest",
            cost="n log n",
            options=StoredOptions,
        )
        for score in SCORES.values()
    ),
    Method(
        "forget",
        forget,
        Needs(reduced="forg", dynamics=("correct",)),
        paper="Toneva et al. 2019",
        equation="most changes from right to wrong between visits (section 2); never learned on top",
        cost="n log n",
    ),
    Method(
        "csl",
        partial(reduced, "csl"),
        Needs(reduced="csl"),
        paper="Ravikumar et al. 2025",
        equation="highest sum over epochs of the loss",
        cost="n log n",
    ),
    Method(
        "aum",
        partial(reduced, "aum"),
        Needs(reduced="aum"),
        paper="Pleiss et al. 2020",
        equation="lowest mean over epochs of z_y - max_{c != y} z_c (eq. 1)",
        cost="n log n",
    ),
    Method(
        "tdds",
        partial(reduced, "tdds"),
        Needs(reduced="tdds"),
        paper="Zhang et al. 2024",
        equation="highest variation of KL(p_t || p_{t-1}) over windows, late windows weighing most",
        cost="n log n",
        options=WindowOptions,
    ),
    Method(
        "el2n",
        el2n_selection,
        Needs(logits=True, ensemble=True),
        paper="Paul et al. 2021",
        equation="highest mean over R models of ||softmax(z) - onehot(y)|| (definition 2.4)",
        cost="n C R",
    ),
    Method(
        "grand",
        grand,
        Needs(embeddings=True, ensemble=True),
        paper="Paul et al. 2021",
        equation="highest mean over R models of ||e|| sqrt(1 + ||h||^2) (definition 2.1; full: of all parameters)",
        cost="n (C + d) R; full: R backward passes",
        options=GraNdOptions,
    ),
)
