"""Many networks for one experiment: retrained without some examples, or trained with different L2 parameters."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from mpe.choices import ORDERS
from mpe.experiment import Experiment
from mpe.orders import replay_generator
from mpe.retraining import Measure, MeasureEach, RetrainSettings, retrain
from src.errors import FlagError
from src.models import MODELS
from src.models.modes import trains_on_one
from src.training.ensemble import vectorised_is_faster, why_not_vectorised

Rows = dict[str, np.ndarray]


def check_retraining(experiment: Experiment) -> None:
    """Refuse flags of retraining that cannot be followed, before anything is trained.

    Raises:
        FlagError: Nothing would be left to retrain on, or the network cannot be
            vectorised and is to be.
    """
    args = experiment.args
    if len(experiment.labels.unique()) < 2:
        raise FlagError(
            f"--subset {args.subset}: its {experiment.count} training examples are of one class; give some of two "
            "classes or more"
        )
    vectorised(experiment)


def check_last_batches(experiment: Experiment, counts: Sequence[int]) -> None:
    """Refuse a batch size that leaves BatchNorm a last batch of one example, which it cannot normalise.

    Args:
        experiment: The experiment.
        counts: Of how many examples networks will be trained.

    Raises:
        FlagError: It does.
    """
    size, shape = experiment.args.bs, experiment.train.image_shape
    single = [count for count in counts if min(count, count % size or size) == 1]
    if single and not trains_on_one(experiment.model, shape):
        raise FlagError(
            f"--bs {size}: {single[0]} examples leave a last batch of one, which this network's BatchNorm cannot "
            "normalise; give another size"
        )


def vectorised(experiment: Experiment) -> bool:
    """Whether networks are trained as one batch of networks.

    Raises:
        FlagError: The network cannot be, and is to be.
    """
    args, reason = experiment.args, why_not_vectorised(experiment.model)
    if args.ensemble == "vectorised" and reason:
        raise FlagError(f"--ensemble vectorised: {reason} in --model {args.model}; give auto or sequential")
    if args.ensemble == "auto":
        return vectorised_is_faster(experiment.model, experiment.device, args.bs)
    return args.ensemble == "vectorised"


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
    key = experiment.shared_settings()  # with the base weights, all that determines the rows
    more = {"measure": measure, "replay": replay, "extra_draws": extra_draws}
    return _run(experiment, images, removed, settings, key, write, **more)


def train_with_deltas(
    experiment: Experiment,
    images: Tensor,
    deltas: Sequence[float],
    optimizer: str,
    measure: MeasureEach,
    write: Callable[[Rows], None],
) -> Rows:
    """Train one network for each L2 parameter from the same initial weights on the same batches, resumably.

    Args:
        experiment: The experiment, its network as it was built.
        images: All training images, normalised.
        deltas: The L2 parameters.
        optimizer: sgd, adam or adamw.
        measure: See ``measure_each`` of ``mpe.retraining.retrain``: curvature and variances of a network take long.
        write: Called with what was measured so far, after each network.
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
    return _run(experiment, images, nothing, settings, experiment.settings(), write, measure_each=measure, **more)


def _run(
    experiment: Experiment,
    images: Tensor,
    removed: Sequence[np.ndarray],
    settings: RetrainSettings,
    key: Mapping[str, Any],
    write: Callable[[Rows], None],
    **more: Any,
) -> Rows:
    args, at_once = experiment.args, vectorised(experiment)
    return retrain(
        experiment.model,
        images,
        experiment.labels,
        removed,
        settings,
        chunk=args.ensemble_size if at_once else 1,  # one after another: each is written when it is done
        folder=experiment.files.resume / "retraining",
        key=key,
        resume=args.resume,
        overwrite=args.overwrite,
        vectorised=at_once,
        after_chunk=lambda rows, done: write(rows),
        **more,
    )
