"""Choosing training examples: one file per method, listed in ``registry.METHODS``."""

from src.coresets.budgets import make_groups
from src.coresets.material import Group, LastLayer, Material, Options, Selection
from src.coresets.registry import METHODS, Method, Needs, find_method, method_table

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
    "method_table",
]
