"""Optimisers and learning-rate schedules: SGD, Adam, AdamW, SAM and iBLR, by name."""

from src.optimizers.batchnorm import frozen_batchnorm
from src.optimizers.iblr import IBLR
from src.optimizers.registry import OPTIMIZERS, OptimizerEntry, build_optimizer, optimizer_names
from src.optimizers.sam import SAM
from src.optimizers.schedules import SCHEDULES, Schedule, rate, schedule_names

__all__ = [
    "IBLR",
    "OPTIMIZERS",
    "SAM",
    "SCHEDULES",
    "OptimizerEntry",
    "Schedule",
    "build_optimizer",
    "frozen_batchnorm",
    "optimizer_names",
    "rate",
    "schedule_names",
]
