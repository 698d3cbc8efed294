"""SAMIS: which training examples does a model memorize?"""

import os
from importlib.util import find_spec


def _forget_missing_backend() -> None:
    """Unset ``MPLBACKEND`` if its package is not installed, because it would make ``import matplotlib`` fail.

    Notebooks set it for their child processes, which may run in an environment without that package. Figures are
    written to files and need no interactive backend.
    """
    backend = os.environ.get("MPLBACKEND", "")
    name = {"inline": "module://matplotlib_inline", "widget": "module://ipympl"}.get(backend, backend)
    if name.startswith("module://") and find_spec(name.removeprefix("module://").split(".")[0]) is None:
        del os.environ["MPLBACKEND"]


_forget_missing_backend()
