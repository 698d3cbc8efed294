"""The Memory-Perturbation Equation (MPE): the sensitivity of a model to each of its training examples.

Nickl, Xu, Tailor, Moellenhoff, and Khan, NeurIPS 2023, arXiv:2310.19273.
"""

from mpe.config import CLASS_COVARIANCES
from src.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    estimates=[
        "Estimates",
        "Sensitivities",
        "estimate",
        "loo_losses",
        "removed_groups",
        "sampled_sensitivities",
        "sensitivities",
        "sensitivity",
    ],
    posterior=["Predictions", "laplace_posterior", "optimizer_posterior", "predict"],
)

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
    "removed_groups",
    "sampled_sensitivities",
    "sensitivities",
    "sensitivity",
]
