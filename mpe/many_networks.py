"""Many networks for one experiment: retrained without some examples, or trained with different L2 parameters."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from mpe.experiment import ORDERS, Experiment
from mpe.orders import replay_generator
from mpe.retraining import Measure, RetrainSettings, retrain
from src.errors import FlagError
from src.models import MODELS
from src.training.ensemble import why_not_vectorised

Rows = dict[str, np.ndarray]


def check_retraining(experiment: Experiment) -> None:
    """Refuse flags of retraining that cannot be followed, before anything is trained.

    Raises:
        FlagError: The floor of the rate lies above it, nothing would be left to retrain on, or the network cannot be
            vectorised and is to be.
    """
    args = experiment.args
    if len(experiment.labels.unique()) < 2:
        raise FlagError(
            f"--subset {args.subset}: its {experiment.count} training examples are of one class; give some of two "
            "classes or more"
        )
    if args.lrmin_retrain > args.lr_retrain:
        raise FlagError(
            f"--lrmin_retrain {args.lrmin_retrain:g}: lies above --lr_retrain {args.lr_retrain:g}; give at most that"
        )
    vectorised(experiment)


def vectorised(experiment: Experiment) -> bool | None:
    """Whether networks are trained as one batch of networks; None for as is faster.

    Raises:
        FlagError: The network cannot be, and is to be.
    """
    args, reason = experiment.args, why_not_vectorised(experiment.model)
    if args.ensemble == "vectorised" and reason:
        raise FlagError(f"--ensemble vectorised: {reason} in --model {args.model}; give auto or sequential")
    return {"auto": None, "vectorised": True, "sequential": False}[args.ensemble]


def retrain_without(
    experiment: Experiment,
    images: Tensor,
    removed: Sequence[np.ndarray],
    measure: Measure,
    write: Callable[[Rows], None],
    *,
    extra_draws: int = 0,
) -> Rows:
    """Retrain from ``experiment.model`` without some of the examples, many times, resumably.

    Args:
        experiment: The experiment, its network trained.
        images: All training images, normalised.
        removed: Positions that each network goes without.
        measure: See ``mpe.retraining.retrain``.
        write: Called with what was measured so far, after each chunk of networks.
        extra_draws: Numbers that the paper's script draws between two retrainings, for ``replay``.
    """
    args, entry = experiment.args, experiment.entry
    settings = RetrainSettings(
        epochs=args.epochs_retrain,
        batch_size=args.bs,
        learning_rate=args.lr_retrain,
        lr_min=args.lrmin_retrain,
        delta=args.delta,
        shuffle=args.retrain_shuffle,
        seed=args.seed,
    )
    replay = None
    if args.retrain_shuffle == "replay":
        build = partial(MODELS[args.model].build, entry.num_classes, entry.channels, entry.image_size)
        replay = replay_generator(build, seed=args.seed)
    return _run(experiment, images, removed, settings, measure, write, replay=replay, extra_draws=extra_draws)


def train_with_deltas(
    experiment: Experiment,
    images: Tensor,
    deltas: Sequence[float],
    optimizer: str,
    measure: Measure,
    write: Callable[[Rows], None],
) -> Rows:
    """Train one network for each L2 parameter from the same initial weights on the same batches, resumably.

    Args:
        experiment: The experiment, its network as it was built.
        images: All training images, normalised.
        deltas: The L2 parameters.
        optimizer: sgd, adam or adamw.
        measure: See ``mpe.retraining.retrain``.
        write: Called with what was measured so far, after each chunk of networks.
    """
    args = experiment.args
    settings = RetrainSettings(
        epochs=args.epochs,
        batch_size=args.bs,
        learning_rate=args.lr,
        lr_min=args.lrmin,
        delta=0.0,  # each has its own
        seed=args.seed,
        optimizer=optimizer,
    )
    nothing = [np.empty(0, np.int64)] * len(deltas)
    batches = experiment.batches(experiment.train, experiment.count, ORDERS[args.base_shuffle])
    more = {"deltas": list(deltas), "permutation": batches.visited, "rate_flag": "--lr"}
    return _run(experiment, images, nothing, settings, measure, write, **more)


def _run(
    experiment: Experiment,
    images: Tensor,
    removed: Sequence[np.ndarray],
    settings: RetrainSettings,
    measure: Measure,
    write: Callable[[Rows], None],
    **more: Any,
) -> Rows:
    args = experiment.args
    return retrain(
        experiment.model,
        images,
        experiment.labels,
        removed,
        settings,
        measure=measure,
        chunk=args.ensemble_size,
        folder=experiment.files.resume / "retraining",
        key=experiment.settings(),
        resume=args.resume,
        overwrite=args.overwrite,
        vectorised=vectorised(experiment),
        after_chunk=lambda rows, done: write(rows),
        **more,
    )
