"""Choosing by rank: stored scores, and the published criteria that keep the highest scores."""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from src.coresets.last_layer import gradient_norms
from src.coresets.material import Group, Material, Options, Selection
from src.coresets.registry import Method, Needs, method, register
from src.errors import FileError

log = logging.getLogger(__name__)

_MANY_TIES = 0.01  # of a selection: where more of it is decided by index alone, a notice says so

# stored score -> the value of --coreset_func; those of the SAMIS paper's README first
STORED = {
    "mem": "min_mem",
    "forg": "min_forg",
    "etl": "min_etl",
    "eps": "min_eps",
    "flat": "min_flat",
    "samis_loss": "min_sam-sgd-loss",
    "samis_prob": "min_sam-sgd-prob",
    **{name: f"min_{name}" for name in ("mean_loss", "csl", "aum", "dual", "dyn_unc", "el2n", "tdds", "mpe")},
}


def keep_by_rank(scores: np.ndarray, groups: Sequence[Group], *, highest: bool, what: str) -> Selection:
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


def checked_scores(material: Material, what: str) -> np.ndarray:
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


def _stored(mode: str) -> Method:
    def select(material: Material, groups: Sequence[Group], options: Options) -> Selection:
        scores = checked_scores(material, f"the stored score {mode}")
        return keep_by_rank(scores, groups, highest=options.coreset_mode == "large", what=mode)

    return Method(
        STORED[mode],
        select,
        Needs(stored=mode),
        "Agiollo et al. 2024" if mode != "mem" else "Feldman and Zhang 2020",
        "large keeps the highest scores, few_shot the lowest",
        "n log n",
        ("coreset_mode",),
    )


for _mode in STORED:
    register(_stored(_mode))


def _reduced(name: str, score: str, paper: str, equation: str, options: tuple[str, ...] = ()) -> Method:
    def select(material: Material, groups: Sequence[Group], options: Options) -> Selection:
        return keep_by_rank(checked_scores(material, name), groups, highest=True, what=name)

    return Method(name, select, Needs(reduced=score), paper, equation, "n log n", options)


for _method in (
    _reduced(
        "forget",
        "forgetting",
        "Toneva et al. 2019",
        "most changes from right to wrong between visits (section 2); never learned on top",
    ),
    _reduced("csl", "csl", "Ravikumar et al. 2025", "highest sum over epochs of the loss"),
    _reduced("aum", "aum", "Pleiss et al. 2020", "lowest mean over epochs of z_y - max_{c != y} z_c (eq. 1)"),
    _reduced(
        "tdds",
        "tdds",
        "Zhang et al. 2024",
        "highest variation of KL(p_t || p_{t-1}) over windows, late windows weighing most",
        ("score_window",),
    ),
):
    register(_method)


def _mean_over_networks(columns: Sequence[torch.Tensor]) -> np.ndarray:
    return torch.stack([column.double().cpu() for column in columns]).mean(dim=0).numpy()


@method(
    "el2n",
    needs=Needs(logits=True, ensemble=True),
    paper="Paul et al. 2021",
    equation="highest mean over R networks of ||softmax(z) - onehot(y)|| (definition 2.4)",
    cost="n C R",
)
def el2n(material: Material, groups: Sequence[Group], options: Options) -> Selection:
    """EL2N: the largest error norms, averaged over independent initialisations."""
    scores = _mean_over_networks([network.errors.double().norm(dim=1) for network in material.networks])
    return keep_by_rank(scores, groups, highest=True, what="el2n")


@method(
    "grand",
    needs=Needs(embeddings=True, ensemble=True),
    paper="Paul et al. 2021",
    equation="highest mean over R networks of ||e|| sqrt(1 + ||h||^2) (definition 2.1; full: of all parameters)",
    cost="n (C + d) R; full: R backward passes",
    options=("grand_gradient",),
)
def grand(material: Material, groups: Sequence[Group], options: Options) -> Selection:
    """GraNd: the largest gradient norms, averaged over independent initialisations."""
    if options.grand_gradient == "full":
        columns = [network.gradient_norms for network in material.networks]
    else:
        columns = [gradient_norms(network.errors, network.embeddings) for network in material.networks]
    return keep_by_rank(_mean_over_networks(columns), groups, highest=True, what="grand")
