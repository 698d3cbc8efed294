"""Choosing training examples: one file per method, found by name in ``METHODS``."""

import importlib

from src.coresets.budgets import make_groups
from src.coresets.material import Group, LastLayer, Material, Options, Selection
from src.coresets.registry import METHODS, Method, Needs, find_method, method_table

# Importing a file registers its methods; the order is that of lists and tables.
for _file in (
    "random_choice",
    "ranked",
    "craig",
    "glister",
    "gradmatch",
    "graph_cut",
    "infobatch",
    "infobatch_dynamic",
    "ccs",
    "moderate",
    "d2",
    "dual",
    "k_center",
    "herding",
):
    importlib.import_module(f"{__name__}.{_file}")

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
