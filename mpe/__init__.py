"""The Memory-Perturbation Equation: how sensitive a model is to each of its training examples.

Nickl, Xu, Tailor, Moellenhoff and Khan, NeurIPS 2023, arXiv:2310.19273.
"""

import src  # noqa: F401  torchvision's import is prepared there, which laplace-torch needs
from mpe.estimates import CLASS_COVARIANCES, Estimates, estimate, loo_losses, sensitivity
from mpe.posteriors import laplace_posterior, optimizer_posterior
from mpe.predictions import Predictions, predict
from mpe.sensitivities import Sensitivities, sensitivities

__all__ = [
    "CLASS_COVARIANCES",
    "Estimates",
    "Predictions",
    "Sensitivities",
    "estimate",
    "laplace_posterior",
    "loo_losses",
    "optimizer_posterior",
    "predict",
    "sensitivities",
    "sensitivity",
]
