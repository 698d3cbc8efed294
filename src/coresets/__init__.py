"""Choosing training examples: one file per method, found by name in ``METHODS``."""

from src.coresets import random_choice, ranked  # noqa: F401  (importing a file registers its methods)
from src.coresets.budgets import make_groups
from src.coresets.material import Group, LastLayer, Material, Options, Selection
from src.coresets.registry import METHODS, Method, Needs, find_method

__all__ = [
    "METHODS",
    "Group",
    "LastLayer",
    "Material",
    "Method",
    "Needs",
    "Options",
    "Selection",
    "find_method",
    "make_groups",
]
