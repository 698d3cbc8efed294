"""Choosing training examples: one file per method, listed in ``registry.METHODS``."""

from src.coresets.budgets import make_groups
from src.coresets.inputs import CandidateGroup, LastLayer, Method, Needs, Selection, SelectionInputs
from src.coresets.registry import METHODS, find_method, method_table

__all__ = [
    "METHODS",
    "CandidateGroup",
    "LastLayer",
    "Method",
    "Needs",
    "Selection",
    "SelectionInputs",
    "find_method",
    "make_groups",
    "method_table",
]
