"""Uniform choice, the baseline of all baselines."""

from collections.abc import Sequence

import numpy as np

from src import draws
from src.coresets.material import Group, Material, Options, Selection


def uniform_choice(material: Material, groups: Sequence[Group], purpose: str = "coreset") -> list[np.ndarray]:
    """``budget`` positions of each group, drawn uniformly without replacement."""
    generator = draws.numpy_generator(material.seed, 0, purpose)
    return [generator.choice(group.positions, group.budget, replace=False) for group in groups]


def random_choice(material: Material, groups: Sequence[Group], options: Options) -> Selection:
    """A uniform choice."""
    return Selection.of(uniform_choice(material, groups))
