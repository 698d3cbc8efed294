"""The older names of the score files' functions, until all callers use those of the store."""

from src.artifacts.store import check_score_data as refuse_foreign
from src.artifacts.store import check_score_target as refuse_other_scores
from src.artifacts.store import read_memorization, read_scores, write_scores
from src.artifacts.store import read_record as read_sidecar
from src.artifacts.store import record_path as sidecar_path

DERIVED = ("n", "total", "sha256")

__all__ = ["DERIVED", "read_memorization", "read_scores", "read_sidecar", "refuse_foreign", "refuse_other_scores",
           "sidecar_path", "write_scores"]  # fmt: skip
