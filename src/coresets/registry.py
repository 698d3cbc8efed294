"""The selection methods by name: what every module of this package lists in its ``METHODS``.

A method is one module: its code, a dataclass of its options, and its entry. Importing them imports no torch.
"""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from src.coresets.inputs import Method
from src.errors import ArgumentError

# the modules of this package that are no method
_SHARED = {"budgets", "config", "grid", "inputs", "plots", "pretraining", "registry", "runner"}

REFERENCE = "random"  # what the others are compared with; at fraction 1 it is training on everything


def _collect() -> dict[str, Method]:
    """All methods: those that rank first, the others by name."""
    names = {module.name for module in iter_modules([str(Path(__file__).parent)])} - _SHARED
    ordered = sorted(names, key=lambda name: (name != "ranked", name))
    modules = [import_module(f"src.coresets.{name}") for name in ordered]
    return {method.name: method for module in modules for method in module.METHODS}


METHODS = _collect()


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        ArgumentError: There is none.
    """
    if name not in METHODS:
        raise ArgumentError("method", f"{name}: unknown; choose from {', '.join(METHODS)}")
    return METHODS[name]
