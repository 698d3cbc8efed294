"""Choosing by rank: stored scores, and the published criteria that keep the highest scores."""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from src import rng
from src.coresets.last_layer import gradient_norms
from src.coresets.material import CandidateGroup, Options, Selection, SelectionInputs
from src.errors import FileError

log = logging.getLogger(__name__)

_MANY_TIES = 0.01  # of a selection: where more of it is decided by index alone, a notice says so


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
            decided += _tied_picks(scores[picks[-1]], scores[ranked[cut]])
    chosen = sum(map(len, picks))
    if decided > _MANY_TIES * chosen:
        log.warning(
            "%s: %d of the %d chosen examples share the score at the cut with others left out; their index decided",
            what,
            decided,
            chosen,
        )
    return Selection.of(picks)


def _tied_picks(scores: np.ndarray, value: float) -> int:
    return int((scores == value).sum())


def checked_scores(material: SelectionInputs, what: str) -> np.ndarray:
    """The material's scores.

    Raises:
        FileError: A candidate has no score.
    """
    scores = np.asarray(material.scores, dtype=np.float64)
    missing = np.flatnonzero(np.isnan(scores))
    if len(missing):
        raise FileError(
            f"{what}: has no score of {len(missing)} of the {len(scores)} candidates "
            f"(the first is example {material.name(missing[0])}); score all of them, or choose them with --subset"
        )
    return scores


def stored(mode: str, material: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """A stored score: its highest (``coreset_mode`` large) or lowest (few_shot)."""
    scores = checked_scores(material, f"the stored score {mode}")
    return keep_by_rank(scores, groups, highest=options.coreset_mode == "large", what=mode)


def reduced(name: str, material: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """A score reduced from the dynamics: its highest."""
    return keep_by_rank(checked_scores(material, name), groups, highest=True, what=name)


def _mean_over_networks(columns: Sequence[torch.Tensor]) -> np.ndarray:
    return torch.stack([column.double().cpu() for column in columns]).mean(dim=0).numpy()


def el2n(material: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """EL2N: the largest error norms, averaged over independent initialisations."""
    scores = _mean_over_networks([network.errors.double().norm(dim=1) for network in material.networks])
    return keep_by_rank(scores, groups, highest=True, what="el2n")


def grand(material: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """GraNd: the largest gradient norms, averaged over independent initialisations."""
    if options.grand_gradient == "full":
        columns = [network.gradient_norms for network in material.networks]
    else:
        columns = [gradient_norms(network.errors, network.embeddings) for network in material.networks]
    return keep_by_rank(_mean_over_networks(columns), groups, highest=True, what="grand")


def uniform_choice(
    material: SelectionInputs, groups: Sequence[CandidateGroup], purpose: str = "coreset"
) -> list[np.ndarray]:
    """``budget`` positions of each group, drawn uniformly without replacement."""
    generator = rng.numpy_generator(material.seed, 0, purpose)
    return [generator.choice(group.positions, group.budget, replace=False) for group in groups]


def random_choice(material: SelectionInputs, groups: Sequence[CandidateGroup], options: Options) -> Selection:
    """A uniform choice."""
    return Selection.of(uniform_choice(material, groups))
