"""SAMIS: which training examples does a network memorise?"""

import os
from importlib.util import find_spec


def _forget_missing_backend() -> None:
    """Figures are drawn into files, without a back end, so that a missing one must not stop the import of matplotlib.

    A notebook hands its own to the processes that it starts, where its package may not be installed.
    """
    backend = os.environ.get("MPLBACKEND", "")
    name = {"inline": "module://matplotlib_inline", "widget": "module://ipympl"}.get(backend, backend)
    if name.startswith("module://") and find_spec(name.removeprefix("module://").split(".")[0]) is None:
        del os.environ["MPLBACKEND"]


_forget_missing_backend()
