"""The selection methods by name: a registry of every ``METHODS`` tuple in this package.

Each method lives in one module: its code, a dataclass of its options, and its entry. Importing it does not import
torch.
"""

import re
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from src.coresets import ranked
from src.coresets.inputs import Method
from src.errors import ArgumentError
from src.metrics.registry import score_entry

# modules of this package that are not methods
_SHARED = {"config", "grid", "inputs", "plots", "pretraining", "registry", "runner"}

REFERENCE = "random"  # the baseline for comparisons; at fraction 1 it trains on the full training set


def _collect() -> dict[str, Method]:
    """Collect all methods: first those that rank examples by score, then the others by name."""
    names = {module.name for module in iter_modules([str(Path(__file__).parent)])} - _SHARED
    others = [import_module(f"src.coresets.{name}") for name in sorted(names - {"ranked"})]
    methods = [*ranked.METHODS, *sorted((m for other in others for m in other.METHODS), key=lambda m: m.name)]
    return {method.name: method for method in methods}


METHODS = _collect()


def find_method(name: str) -> Method:
    """Return the method with this name. For a registered score NAME, ``min_NAME`` ranks by it.

    Raises:
        ArgumentError: No such method exists.
    """
    if name in METHODS:
        return METHODS[name]
    if re.fullmatch(r"min_\w+", name, re.ASCII):
        return ranked.stored_method(score_entry(name.removeprefix("min_")))
    raise ArgumentError("method", f"{name}: unknown; choose from {', '.join(METHODS)}")


def method_table() -> str:
    """Format the registry as a Markdown table; methods that differ only in their stored score share a row."""
    rows = ["| `--coreset_func` | paper | what it keeps | needs | cost | options |", "|---|---|---|---|---|---|"]
    stored = [method for method in METHODS.values() if method.needs.stored]
    for entry in METHODS.values():
        names, needs, paper = f"`{entry.name}`", str(entry.needs), entry.paper
        if entry in stored[1:]:
            continue
        if entry in stored:
            names = ", ".join(f"`{method.name}`" for method in stored)
            needs, paper = "a stored score", "SAMIS and the paper of each score"
        options = ", ".join(f"`--{name}`" for name in entry.option_names)
        cells = (names, paper, entry.equation, needs, entry.cost, options)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)
