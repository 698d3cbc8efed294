"""Coreset selection. Each method is one ``Method`` entry next to its code; ``registry.METHODS`` collects them."""

from src.coresets.inputs import CandidateGroup, LastLayer, Method, Needs, Selection, SelectionInputs, make_groups
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
