"""Training: one loop for all scripts, evaluation, per-example dynamics, checkpoints and resuming."""

from src.lazy import lazy_names
from src.training.config import RunConfig, TrainingConfig, add_recipes

_LAZY = {
    "distributed": ("ProcessGroup",),
    "dynamics": ("DYNAMICS_FILE", "Dynamics", "read_dynamics"),
    "loop": ("EpochPlan", "Trainer", "evaluate", "logits_of"),
    "run": (
        "RunFiles",
        "data_facts",
        "find_checkpoint",
        "find_schedules",
        "free_epochs",
        "image_facts",
        "load_model",
        "model_description",
        "run_training",
        "summary",
        "training_command",
        "training_facts",
    ),
}
__getattr__ = lazy_names(__name__, **_LAZY)
__all__ = ["RunConfig", "TrainingConfig", "add_recipes", *(name for names in _LAZY.values() for name in names)]
