"""Training networks: one loop for every script, evaluation, per-example dynamics, checkpoints, resume."""

from src.lazy import lazy_names
from src.training.config import RunConfig, TrainingConfig

__getattr__ = lazy_names(
    __name__,
    checkpoints=[
        "data_facts",
        "find_checkpoint",
        "find_schedules",
        "free_epochs",
        "image_facts",
        "load_model",
        "missing_epochs",
        "model_description",
        "only_schedule",
        "training_command",
        "training_facts",
    ],
    distributed=["ProcessGroup"],
    dynamics=["DYNAMICS_FILE", "Dynamics", "read_dynamics"],
    evaluation=["evaluate", "logits_of", "predictions"],
    loop=["Trainer"],
    plan=["EpochPlan"],
    run=["RunFiles", "run_training", "summary"],
)

__all__ = [
    "DYNAMICS_FILE",
    "Dynamics",
    "EpochPlan",
    "ProcessGroup",
    "RunConfig",
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
