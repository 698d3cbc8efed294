"""Per-example scores: making, averaging, comparing and reading them."""

from src.metrics.modes import MODES, ScoreMode, modes_from, score_mode
from src.metrics.proxy import Memorization, Proxy, find_scores

__all__ = ["MODES", "Memorization", "Proxy", "ScoreMode", "find_scores", "modes_from", "score_mode"]
