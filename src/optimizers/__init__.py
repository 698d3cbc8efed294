"""Optimizers (SGD, Adam, AdamW, SAM and iBLR) and learning rate schedules, by name."""

from src.lazy import lazy_names
from src.optimizers.registry import IBLR_BACKENDS, OPTIMIZERS, SCHEDULES, build_optimizer, rate, torch_optimizer

__getattr__ = lazy_names(__name__, iblr=["IBLR", "IvonOpt"], sam=["SAM", "frozen_batchnorm"])

__all__ = [
    "IBLR",
    "IBLR_BACKENDS",
    "OPTIMIZERS",
    "SAM",
    "SCHEDULES",
    "IvonOpt",
    "build_optimizer",
    "frozen_batchnorm",
    "rate",
    "torch_optimizer",
]
