"""Optimizers and learning-rate schedules: SGD, Adam, AdamW, SAM and iBLR, by name."""

from src.lazy import lazy_names
from src.optimizers.registry import OPTIMIZERS, SCHEDULES, build_optimizer, rate

__getattr__ = lazy_names(__name__, iblr=["IBLR"], sam=["SAM", "frozen_batchnorm"])

__all__ = [
    "IBLR",
    "OPTIMIZERS",
    "SAM",
    "SCHEDULES",
    "build_optimizer",
    "frozen_batchnorm",
    "rate",
]
