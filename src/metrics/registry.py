"""Registry of all scores by name, in the order in which flags, figures, and tables list them."""

from src.errors import ArgumentError
from src.metrics import dynamics, flatness, samis
from src.metrics.score import Score

MEMORIZATION = Score(
    "mem",
    r"$m(x_i)$",
    "memorization",
    source="download",
    folder="memorization",
    cost="thousands of runs",
    paper="Feldman and Zhang 2020",
    file="{dataset}_infl_matrix.npz",
)

SENSITIVITY = Score(
    "mpe",
    r"$\mathrm{MPE}(x_i)$",
    "memory-perturbation sensitivity",
    source="mpe",
    folder="mpe",
    cost="SGD run + 2 passes",
    paper="Nickl et al. 2023",
)

SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        MEMORIZATION,
        *dynamics.COUNTS,
        *flatness.END_SCORES,
        *samis.PAIR_SCORES,
        *dynamics.REDUCTIONS,
        SENSITIVITY,
    )
}


def get_score(name: str) -> Score:
    """Look up a score by name.

    Raises:
        ArgumentError: The score does not exist.
    """
    if name not in SCORES:
        raise ArgumentError("mode", f"{name!r}: unknown score; choose from {', '.join(SCORES)}")
    return SCORES[name]


def scores_from(*sources: str) -> tuple[str, ...]:
    """The names of the scores whose ``source`` is one of ``sources``, in registry order."""
    return tuple(score.name for score in SCORES.values() if score.source in sources)
