"""Scores, selection and loss geometry for your own models, DataLoaders and training loops: docs/library.md.

Another project imports everything from here, under these names.
"""

from src.library.batches import Indexed
from src.library.measures import (
    SamisScores,
    Selection,
    Sensitivities,
    Spectrum,
    hessian_spectrum,
    ntk,
    samis_scores,
    select,
    sensitivities,
    velocity,
)
from src.library.recorder import DynamicsRecorder
from src.optimizers import SAM, frozen_batchnorm

__all__ = [
    "SAM",
    "DynamicsRecorder",
    "Indexed",
    "SamisScores",
    "Selection",
    "Sensitivities",
    "Spectrum",
    "frozen_batchnorm",
    "hessian_spectrum",
    "ntk",
    "samis_scores",
    "select",
    "sensitivities",
    "velocity",
]
