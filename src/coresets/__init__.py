"""Choosing training examples: one file per method, listed in ``registry.METHODS``."""

from src.coresets.budgets import make_groups
from src.coresets.material import CandidateGroup, LastLayer, Options, Selection, SelectionInputs
from src.coresets.registry import METHODS, Method, Needs, find_method, method_table

__all__ = [
    "METHODS",
    "CandidateGroup",
    "LastLayer",
    "Method",
    "Needs",
    "Options",
    "Selection",
    "SelectionInputs",
    "find_method",
    "make_groups",
    "method_table",
]
