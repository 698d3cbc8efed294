"""Training networks: one loop for every script, evaluation, per-example dynamics, checkpoints, resume."""

from src.training.checkpoints import (
    data_facts,
    find_checkpoint,
    find_schedules,
    free_epochs,
    image_facts,
    load_model,
    missing_epochs,
    model_description,
    only_schedule,
    training_command,
    training_facts,
)
from src.training.config import TrainingConfig
from src.training.distributed import ProcessGroup
from src.training.dynamics import DYNAMICS_FILE, Dynamics, read_dynamics
from src.training.evaluation import evaluate, logits_of, predictions
from src.training.loop import Trainer
from src.training.plan import EpochPlan
from src.training.run import RunFiles, run_training, summary

__all__ = [
    "DYNAMICS_FILE",
    "Dynamics",
    "EpochPlan",
    "ProcessGroup",
    "RunFiles",
    "Trainer",
    "TrainingConfig",
    "data_facts",
    "evaluate",
    "find_checkpoint",
    "find_schedules",
    "free_epochs",
    "image_facts",
    "load_model",
    "logits_of",
    "missing_epochs",
    "model_description",
    "only_schedule",
    "predictions",
    "read_dynamics",
    "run_training",
    "summary",
    "training_command",
    "training_facts",
]
