"""Lazy imports, so that ``--help`` and flag errors do not import torch."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any


def lazy_names(package: str, **modules: Sequence[str]) -> Callable[[str], Any]:
    """Return a package's ``__getattr__`` (PEP 562) that imports a submodule when one of its names is first used.

    Args:
        package: The package's ``__name__``.
        modules: For each submodule, the names that the package exports from it.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get


def later(module: str, name: str, *first: Any) -> Callable[..., Any]:
    """Return a function that imports its module on the first call. ``first`` are bound as its first arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), name)(*first, *args, **kwargs)

    return call


class _Module:
    """Module proxy that imports the module when one of its attributes is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(import_module(self._name), attribute)
        if not attribute.startswith("__"):
            setattr(self, attribute, value)
        return value


if TYPE_CHECKING:
    import scipy
    import torch
else:
    scipy, torch = _Module("scipy"), _Module("torch")
