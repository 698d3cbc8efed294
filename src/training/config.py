"""What determines a training run."""

from dataclasses import asdict, dataclass
from typing import Any

from src.artifacts import without_idle
from src.optimizers import SCHEDULES


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of the loop; data and network come as objects.

    Attributes:
        epochs: Passes over the training examples.
        optimizer: A name of ``OPTIMIZERS``.
        learning_rate: Base rate of the schedule.
        lr_sched: A name of ``SCHEDULES``; the rate changes once per epoch.
        lr_min: Floor of the rate, for the schedules that have one.
        momentum: Momentum of SGD (also SAM's base optimiser).
        weight_decay: Weight decay.
        rho: Radius of SAM's perturbation.
        adaptive: Whether SAM is adaptive.
        delta: Prior precision of iBLR.
        hess_init: Initial Hessian of iBLR.
        seed: Seed of what is random within epochs.
        precision: A name of ``PRECISIONS``.
        nesterov: Whether SGD's momentum is Nesterov's.
    """

    epochs: int
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    lr_sched: str = "const"
    lr_min: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    rho: float = 0.05
    adaptive: bool = False
    delta: float | None = None
    hess_init: float = 0.1
    seed: int = 1
    precision: str = "fp32"
    nesterov: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The settings that act, as plain values; ``nesterov`` only where it is on."""
        settings = without_idle(asdict(self))
        if not self.nesterov:
            del settings["nesterov"]
        return settings

    @property
    def schedule_depends_on_epochs(self) -> bool:
        """Whether another number of epochs would have changed the rates of the epochs already trained."""
        return SCHEDULES[self.lr_sched].depends_on_epochs
