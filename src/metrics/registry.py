"""Registry of all scores by name, in the order in which flags, figures, and tables list them.

Besides the built-in ``SCORES``, there are scores of other projects, which register_score.py stores in a metrics
folder under a new name. Such a name is known where a search folder has a file for it; see :func:`get_score`.
"""

import argparse
import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from src.artifacts import paths
from src.errors import ArgumentError
from src.metrics import dynamics, memorization, samis
from src.metrics.score import Score

SENSITIVITY = Score(
    "mpe",
    r"$\mathrm{MPE}(x_i)$",
    "memory-perturbation sensitivity",
    source="mpe",
    folder="mpe",
    cost="SGD run + 2 passes per class",
    paper="Nickl et al. 2023",
)

LABEL_ERROR = Score(
    "label_error",
    r"$\mathrm{LE}(x_i)$",
    "log odds of a wrong label",
    source="audit",
    folder="label_errors",
    cost="5 SGD runs",
    paper="ours",
)

SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        *memorization.MEMBER_SCORES,
        *dynamics.COUNTS,
        *dynamics.END_SCORES,
        *samis.PAIR_SCORES,
        *dynamics.REDUCTIONS,
        dynamics.LATE_RANK,
        SENSITIVITY,
        LABEL_ERROR,
    )
}


SearchFolders = str | Path | Iterable[str | Path] | None

_REGISTERED = "registered"  # the subfolder of a metrics folder that has a folder for each registered score


def search_folders(folder: SearchFolders = None) -> list[Path]:
    """The metrics folders to search, in order. By default ``metrics/``, then the packaged scores."""
    given = [] if folder is None else [folder] if isinstance(folder, str | Path) else folder
    return [Path(place) for place in given] or [paths.ROOT / "metrics", paths.PACKAGED_SCORES]


def score_entry(name: str) -> Score:
    """The entry of a built-in score or, for any other name, of a registered score. Does not look for files.

    Raises:
        ArgumentError: The name is not built-in, and not made of letters, digits, and ``_``.
    """
    if name in SCORES:
        return SCORES[name]
    if not re.fullmatch(r"\w+", name, re.ASCII):
        raise _unknown(name, SCORES)
    folder = f"{_REGISTERED}/{name}"
    return Score(name, name, name, source=_REGISTERED, folder=folder, cost="", paper="another project")


def score_name(text: str) -> str:
    """Argparse type for the name of a built-in or registered score. Scripts call :func:`get_score` after parsing.

    Raises:
        argparse.ArgumentTypeError: No score can have this name.
    """
    try:
        return score_entry(text).name
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(error.text.strip()) from error


def registered_scores(folder: SearchFolders = None) -> list[str]:
    """The names of the scores registered in the search folders, in alphabetical order."""
    files = (path for place in search_folders(folder) for path in (place / _REGISTERED).glob("*/*.pkl"))
    return sorted({path.parent.name for path in files} - SCORES.keys())


def get_score(name: str, folder: SearchFolders = None) -> Score:
    """Look up a built-in score, or a score that is registered in the search folders for some data set.

    Args:
        name: The score's name.
        folder: A metrics folder, or several; see :func:`search_folders`.

    Raises:
        ArgumentError: The score does not exist.
    """
    score = score_entry(name)
    if name not in SCORES and name not in (there := registered_scores(folder)):
        raise _unknown(name, [*SCORES, *there])
    return score


def _unknown(name: str, known: Iterable[str]) -> ArgumentError:
    close = difflib.get_close_matches(name, known := list(known), 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return ArgumentError(
        "mode",
        f"{name!r}: unknown score; {hint}choose from {', '.join(known)}, or add your own with register_score.py "
        "under a name of letters, digits, and _",
    )


def scores_from(*sources: str) -> tuple[str, ...]:
    """The names of the scores whose ``source`` is one of ``sources``, in registry order."""
    return tuple(score.name for score in SCORES.values() if score.source in sources)
