"""How many examples to choose, and among which."""

from collections.abc import Sequence

import numpy as np

from src.coresets.inputs import CandidateGroup
from src.errors import ArgumentError

_ROUNDING = 1e-9  # 0.55 * 6000 is a hair above 3300; the budget is 3300


def class_budgets(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """``ceil(fraction * n_c)`` of each class, free of rounding noise; 0 for empty classes.

    Args:
        sizes: ``(C,)``.
        fraction: Share to keep, in (0, 1].
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    wanted = np.ceil(fraction * sizes - _ROUNDING).astype(np.int64)
    return np.clip(wanted, np.minimum(sizes, 1), sizes)


def total_budget(count: int, fraction: float) -> int:
    """``fraction * n``, rounded half up."""
    return min(int(np.floor(fraction * count + 0.5 + _ROUNDING)), count)


def make_groups(
    labels: np.ndarray,
    num_classes: int,
    *,
    fraction: float | None = None,
    shots: int | None = None,
    shots_up_to: int | None = None,
    per_class: bool = True,
    class_names: Sequence[str] = (),
) -> list[CandidateGroup]:
    """The groups that a selection is made in.

    Args:
        labels: int64 ``(n,)`` of the candidates.
        num_classes: C.
        fraction: Share to keep, in (0, 1].
        shots: Examples per class, in place of a fraction.
        shots_up_to: The same, but all of a smaller class are kept.
        per_class: A group per class that has candidates; else one group of all.
        class_names: Names of the classes, for messages.

    Returns:
        Groups in the order of the labels.

    Raises:
        ArgumentError: The fraction or the shots do not fit the candidates.
    """
    labels = np.asarray(labels)
    sizes = np.bincount(labels, minlength=num_classes)
    if shots is not None or shots_up_to is not None:
        _check_shots(shots, shots_up_to, sizes, per_class, class_names)
        budgets = np.minimum(sizes, shots_up_to if shots is None else shots)
    elif fraction is None or not 0.0 < fraction <= 1.0:
        raise ArgumentError("fraction", f"{fraction}: must be above 0 and at most 1")
    elif not per_class:
        budget = total_budget(len(labels), fraction)
        if not budget:
            raise ArgumentError(
                "fraction",
                f"{fraction:g}: keeps none of {len(labels)} examples; give a larger one",
            )
        return [CandidateGroup(np.arange(len(labels)), budget)]
    else:
        budgets = class_budgets(sizes, fraction)
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.cumsum(sizes)[:-1])
    return [CandidateGroup(members[c], int(budgets[c]), c) for c in range(num_classes) if sizes[c]]


def _check_shots(
    shots: int | None, shots_up_to: int | None, sizes: np.ndarray, per_class: bool, class_names: Sequence[str]
) -> None:
    name, count = ("shots_up_to", shots_up_to) if shots is None else ("shots", shots)
    if count < 1:
        raise ArgumentError(name, f"{count}: must be at least 1")
    if not per_class:
        raise ArgumentError(name, ": counts examples per class; leave per_class on")
    present = np.flatnonzero(sizes)
    smallest = present[sizes[present].argmin()]
    if shots is not None and shots > sizes[smallest]:
        which = f"{class_names[smallest]!r}" if len(class_names) else smallest
        raise ArgumentError(
            "shots",
            f"{shots}: class {which} has only {sizes[smallest]} examples; give at most that many, or "
            f"shots_up_to={shots}, which keeps all of a smaller class",
        )
