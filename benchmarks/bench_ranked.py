"""Choosing by rank within classes, against one stable sort of the scores.

    python -m benchmarks.bench_ranked [--quick]

50,000 scores in 100 classes, 30 % of each. The target says: at most three times the sort. The choice is compared
with a sort of each class on the way.
"""

import numpy as np

from benchmarks.common import Row, in_turn, run
from src.coresets.budgets import make_groups
from src.coresets.material import CandidateGroup, Selection
from src.coresets.ranked import keep_by_rank

TARGET = 1 / 3


def class_by_class(scores: np.ndarray, groups: list[CandidateGroup]) -> np.ndarray:
    """The same choice, ascending."""
    kept = [g.positions[np.argsort(scores[g.positions], kind="stable")[-g.budget :]] for g in groups]
    return np.sort(np.concatenate(kept))


def measure(quick: bool = False) -> list[Row]:
    """Time a sort and a choice.

    Raises:
        RuntimeError: The choice is wrong.
    """
    count, classes, repeats = (500, 10, 1) if quick else (50_000, 100, 20)
    generator = np.random.default_rng(0)
    scores = generator.standard_normal(count)
    groups = make_groups(generator.integers(classes, size=count), classes, fraction=0.3)
    found: dict[str, Selection] = {}
    ways = (
        lambda: np.argsort(scores, kind="stable"),
        lambda: found.update(ours=keep_by_rank(scores, groups, highest=True, what="scores")),
    )
    plain, ours = in_turn(ways, repeats)
    if not np.array_equal(found["ours"].indices, class_by_class(scores, groups)):
        raise RuntimeError("choosing by rank: the choice is wrong")
    return [Row(f"choice by rank, {count} in {classes} classes / one sort", 1e3 * plain, 1e3 * ours, "ms", TARGET)]


def main() -> None:
    run(measure, __doc__)


if __name__ == "__main__":
    main()
