"""Contractions of per-example gradients and Jacobians, without forming the Jacobian."""

from src.jacobians.capture import refuse_batch_statistics, refuse_mixing
from src.jacobians.dense import DensePosterior, DenseVariances, check_dense, exact_ggn, output_variances
from src.jacobians.engine import SquaredNorms, check_per_example
from src.jacobians.ggn import ggn_diagonal, kronecker_factors
from src.jacobians.gram import gram_matrix, sketch_jacobian
from src.jacobians.layer_rules import register_layer_rule, rule_from_gradients
from src.jacobians.posterior import Curvature, Posterior, Rotated
from src.jacobians.products import gradient_covariances
from src.jacobians.variances import OutputVariances

__all__ = [
    "Curvature",
    "DensePosterior",
    "DenseVariances",
    "OutputVariances",
    "Posterior",
    "Rotated",
    "SquaredNorms",
    "check_dense",
    "check_per_example",
    "exact_ggn",
    "ggn_diagonal",
    "gradient_covariances",
    "gram_matrix",
    "kronecker_factors",
    "output_variances",
    "refuse_batch_statistics",
    "refuse_mixing",
    "register_layer_rule",
    "rule_from_gradients",
    "sketch_jacobian",
]
