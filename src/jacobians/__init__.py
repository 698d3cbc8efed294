"""Per-example gradient and Jacobian contractions; never the Jacobian itself."""

from src.jacobians.engine import SquaredNorms
from src.jacobians.independence import refuse_batch_statistics, refuse_mixing

__all__ = ["SquaredNorms", "refuse_batch_statistics", "refuse_mixing"]
