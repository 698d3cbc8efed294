"""Selection by rank: stored scores, and published criteria that keep the highest scores."""

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
from src.metrics import SCORES, Score

log = logging.getLogger(__name__)

_MANY_TIES = 0.01  # fraction of a selection; log a warning if ties decide more of it


def keep_by_rank(scores: np.ndarray, groups: Sequence[CandidateGroup], *, highest: bool, what: str) -> Selection:
    """Keep the examples with the highest or lowest scores in each group.

    Candidates are ordered by (score, position); the lowest scores are the head of that order, the highest its tail.

    Args:
        scores: ``(n,)``, without NaN (infinite scores are allowed).
        groups: The groups of candidates, which must be disjoint.
        highest: Whether to keep the highest scores.
        what: Name of the score, for the warning about ties.
    """
    picks, decided = [], 0
    for group in groups:
        values = scores[group.positions]
        last = len(values) - group.budget if highest else group.budget - 1
        cutoff = np.partition(values, last)[last]  # the last score that is kept
        inside = values > cutoff if highest else values < cutoff
        tied = np.flatnonzero(values == cutoff)
        room = group.budget - int(np.count_nonzero(inside))
        inside[tied[len(tied) - room :] if highest else tied[:room]] = True
        picks.append(group.positions[inside])
        decided += room if room < len(tied) else 0
    chosen = sum(map(len, picks))
    if decided > _MANY_TIES * chosen:
        log.warning(
            "%s: %d of %d selected examples tie at the cutoff score with excluded examples; ties are broken by index",
            what,
            decided,
            chosen,
        )
    return Selection.of(picks)


def checked_scores(inputs: SelectionInputs, what: str) -> np.ndarray:
    """Return the inputs' scores, float64 ``(n,)``, after checking that none is missing.

    Raises:
        FileError: A candidate has no score.
    """
    scores = np.asarray(inputs.scores, dtype=np.float64)
    missing = np.flatnonzero(np.isnan(scores))
    if len(missing):
        raise FileError(
            f"{what}: no score for {len(missing)} of {len(scores)} candidates "
            f"(the first is example {inputs.name(missing[0])}); score all of them, or restrict them with --subset"
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
        grand_gradient: Gradient in the ``"last"`` layer or in all parameters (``"full"``).
    """

    grand_gradient: str = option(
        "last", "grand: gradient in the last layer or in all parameters (full)", choices=("last", "full")
    )


def stored(mode: str, inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: StoredOptions) -> Selection:
    """Keep the highest (``coreset_mode`` large) or lowest (few_shot) values of a stored score."""
    scores = checked_scores(inputs, f"the stored score {mode}")
    return keep_by_rank(scores, groups, highest=options.coreset_mode == "large", what=mode)


def reduced(name: str, inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: Any) -> Selection:
    """Keep the highest values of a score computed from the training dynamics."""
    return keep_by_rank(checked_scores(inputs, name), groups, highest=True, what=name)


def forget(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """Forgetting: keep never-learned examples, then those with most events (Toneva et al. 2019, section 2)."""
    learned = (inputs.dynamics["correct"] == 1).any(axis=0)
    scores = checked_scores(inputs, "forget")
    return keep_by_rank(np.where(learned, scores, np.inf), groups, highest=True, what="forget")


def _mean_over_models(columns: Sequence[torch.Tensor]) -> np.ndarray:
    return torch.stack([column.double().cpu() for column in columns]).mean(dim=0).numpy()


def el2n_selection(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """EL2N: keep the largest error norms, averaged over independently initialized models."""
    scores = _mean_over_models([layer.errors.double().norm(dim=1) for layer in inputs.layers])
    return keep_by_rank(scores, groups, highest=True, what="el2n")


def grand(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: GraNdOptions) -> Selection:
    """GraNd: keep the largest gradient norms, averaged over independently initialized models."""
    if options.grand_gradient == "full":
        columns = [layer.gradient_norms for layer in inputs.layers]
    else:
        columns = [gradient_norms(layer.errors, layer.embeddings) for layer in inputs.layers]
    return keep_by_rank(_mean_over_models(columns), groups, highest=True, what="grand")


def random_choice(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """Draw ``budget`` positions from each group, uniformly without replacement."""
    generator = rng.numpy_generator(inputs.seed, 0, "coreset")
    return Selection.of([generator.choice(group.positions, group.budget, replace=False) for group in groups])


def stored_method(score: Score) -> Method:
    """The method that ranks by a stored score."""
    return Method(
        _STORED.get(score.name, f"min_{score.name}"),
        partial(stored, score.name),
        Needs(stored=score.name),
        paper=score.paper,
        equation="large: highest scores; few_shot: lowest scores",
        cost="n log n",
        options=StoredOptions,
    )


_STORED = {"samis_loss": "min_sam-sgd-loss", "samis_prob": "min_sam-sgd-prob"}  # names in the SAMIS paper's scripts

METHODS = (
    Method("random", random_choice, Needs(), "baseline", "uniform, without replacement", "n"),
    *(stored_method(score) for score in SCORES.values()),
    Method(
        "forget",
        forget,
        Needs(reduced="forg", dynamics=("correct",)),
        paper="Toneva et al. 2019",
        equation="never learned first, then most changes from correct to wrong between visits (section 2)",
        cost="n log n",
    ),
    Method(
        "csl",
        partial(reduced, "csl"),
        Needs(reduced="csl"),
        paper="Ravikumar et al. 2025",
        equation="highest loss summed over epochs",
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
        equation="highest variation of KL(p_t || p_{t-1}) over windows, with later windows weighted more",
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
        Needs(logits=True, embeddings=True, ensemble=True),
        paper="Paul et al. 2021",
        equation="highest mean over R models of ||e|| sqrt(1 + ||h||^2) (definition 2.1; full: in all parameters)",
        cost="n (C + d) R; full: R backward passes",
        options=GraNdOptions,
    ),
)
