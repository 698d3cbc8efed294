"""Learning-rate schedules as pure functions of the epoch.

A schedule is the share of the learning rate that an epoch uses; `rate` turns it into a rate. Nothing is stepped, so
there is no state to save, and every optimizer is scheduled alike.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

Share = Callable[[int, int], float]


@dataclass(frozen=True)
class Schedule:
    """A named schedule.

    Attributes:
        name: The value of ``--lr_sched``.
        share: Takes an epoch (from 1) and the number of epochs; returns the share of the learning rate.
        depends_on_epochs: Whether another number of epochs changes the rates of the epochs already run, so that a
            run cannot be made longer.
    """

    name: str
    share: Share
    depends_on_epochs: bool


SCHEDULES: dict[str, Schedule] = {}


def rate(name: str, epoch: int, epochs: int, lr: float, floor: float = 0.0) -> float:
    """The learning rate of one epoch.

    The schedule runs between ``floor`` and ``lr``: ``floor + (lr - floor) * share(epoch, epochs)``. With ``cosine``
    this is the annealing of the MPE experiments, whose last epoch is one step above the floor.

    Args:
        name: A name from `SCHEDULES`.
        epoch: The epoch, from 1 to ``epochs``.
        epochs: The number of epochs of the run.
        lr: The base learning rate.
        floor: The rate that the schedule falls towards.

    Returns:
        The rate to use throughout the epoch.

    Raises:
        ValueError: The epoch lies outside the run.
    """
    if not 1 <= epoch <= epochs:
        raise ValueError(f"epoch {epoch} is not one of the run's epochs 1 to {epochs}")
    return floor + (lr - floor) * SCHEDULES[name].share(epoch, epochs)


def _schedule(name: str, *, depends_on_epochs: bool) -> Callable[[Share], Share]:
    def register(share: Share) -> Share:
        SCHEDULES[name] = Schedule(name, share, depends_on_epochs)
        return share

    return register


def _warmup_epochs(epochs: int) -> int:
    return math.ceil(epochs / 40)


def _half_cosine(position: float) -> float:
    """Falls from 1 at position 0 to 0 at position 1."""
    return (1.0 + math.cos(math.pi * position)) / 2.0


@_schedule("const", depends_on_epochs=False)
def _const(epoch: int, epochs: int) -> float:
    return 1.0


@_schedule("step", depends_on_epochs=True)
def _step(epoch: int, epochs: int) -> float:
    """A tenth after each third of the run."""
    return 0.1 ** ((epoch - 1) // math.ceil(epochs / 3))


@_schedule("exp", depends_on_epochs=False)
def _exp(epoch: int, epochs: int) -> float:
    return 0.98 ** (epoch - 1)


@_schedule("cosine", depends_on_epochs=True)
def _cosine(epoch: int, epochs: int) -> float:
    return _half_cosine((epoch - 1) / epochs)


@_schedule("warmup_step", depends_on_epochs=True)
def _warmup_step(epoch: int, epochs: int) -> float:
    """Linear warm-up, then `_step` counted from the end of the warm-up, its length still from the whole run."""
    warmup = _warmup_epochs(epochs)
    return epoch / warmup if epoch <= warmup else _step(epoch - warmup, epochs)


@_schedule("warmup_exp", depends_on_epochs=True)
def _warmup_exp(epoch: int, epochs: int) -> float:
    warmup = _warmup_epochs(epochs)
    return epoch / warmup if epoch <= warmup else _exp(epoch - warmup, epochs)


@_schedule("warmup_cosine", depends_on_epochs=True)
def _warmup_cosine(epoch: int, epochs: int) -> float:
    """Five cycles; each rises linearly from 1/100 to a peak, halved from cycle to cycle, and falls by a cosine."""
    length = math.ceil(epochs / 5)
    warmup = math.ceil(length / 10)
    cycle, position = divmod(epoch - 1, length)
    lowest, peak = 0.01, 0.5**cycle
    if position < warmup:
        return lowest + (peak - lowest) * position / warmup
    return lowest + (peak - lowest) * _half_cosine((position - warmup) / (length - warmup))


@_schedule("custom", depends_on_epochs=True)
def _custom(epoch: int, epochs: int) -> float:
    """Feldman and Zhang's triangle (arXiv:2008.03703): up over the first 15 %, from 0, then down to nearly 0."""
    up = 15 * epochs // 100
    done = epoch - 1
    return done / up if done < up else 1.0 - (done - up) / (epochs - up)
