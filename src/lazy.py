"""Imports that wait until they are needed, so that ``--help`` and the answer to a bad flag need no torch."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any


def lazy_names(package: str, **modules: Sequence[str]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` (PEP 562), which imports a submodule when one of its names is first used.

    Args:
        package: The package's ``__name__``.
        modules: For each submodule, the names that the package takes from it.
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
    """A function of a module that is imported at the first call; ``first`` are its first arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), name)(*first, *args, **kwargs)

    return call


class _Module:
    """A stand-in for a module, which imports it when one of its attributes is first used."""

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
