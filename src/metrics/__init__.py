"""Per-example scores: computing, averaging, comparing, and reading them."""

from src.metrics.proxy import Memorization, Proxy, find_score_file
from src.metrics.registry import SCORES, get_score, scores_from
from src.metrics.score import Score

__all__ = ["SCORES", "Memorization", "Proxy", "Score", "find_score_file", "get_score", "scores_from"]
