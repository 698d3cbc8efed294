"""What can be measured, and how: what flags choose from. Nothing here needs torch."""

from dataclasses import dataclass

import numpy as np

OPERATOR_NAMES = ("hessian", "ggn")
"""The values of ``--operator``."""

NTK_CLASS_NAMES = ("all", "sum_logits", "true_label")
"""The values of ``--ntk_classes``."""

CHECKED = 4
"""Examples on which a sketch is compared with the exact kernel."""

STORAGES = {
    "full": "in the precision of computing",
    "half": "rounded to float16: half the memory",
    "host": "in main memory, where a GPU computes",
    "none": "not at all: no re-orthogonalisation, more products",
}
"""The values of ``--basis``."""

ORDERS = {
    "largest": lambda values: -values,
    "magnitude": lambda values: -np.abs(values),
}
"""How eigenvalues are ranked, by the values of ``--eigen_order``: the first ones have the lowest keys."""


@dataclass(frozen=True)
class SpectrumPlan:
    """What to measure, and how well.

    Attributes:
        top_n: How many eigenvalues.
        order: Which ones, a name of ``ORDERS``.
        tolerance: Relative residual at which an eigenvalue counts as found.
        steps: Lanczos steps of the density.
        max_steps: Steps after which eigenvalues are given as they are.
        probes: Start vectors of the density.
        trace_probes: Most probes of the trace.
        trace_tolerance: Relative standard error at which it takes no more.
        seed: Seed of all random vectors.
        basis: How the Lanczos basis is stored, a name of ``STORAGES``.
    """

    top_n: int = 5
    order: str = "largest"
    tolerance: float = 1e-3
    steps: int = 100
    max_steps: int = 300
    probes: int = 1
    trace_probes: int = 100
    trace_tolerance: float = 0.02
    seed: int = 0
    basis: str = "full"
