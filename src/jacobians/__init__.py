"""Per-example gradient and Jacobian contractions; never the Jacobian itself."""

from src.jacobians.engine import SquaredNorms
from src.jacobians.independence import refuse_batch_statistics, refuse_mixing
from src.jacobians.modes import evaluating

__all__ = ["SquaredNorms", "evaluating", "refuse_batch_statistics", "refuse_mixing"]
