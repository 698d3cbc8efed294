"""Which network and which examples the flags of compute_hessian_eigen.py mean."""

import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from src.artifacts import file_digest, standard_experiment
from src.datasets import ImageSet, parse_subset
from src.errors import FileError, FlagError
from src.trained import TrainedNetworks
from src.training import find_checkpoint, only_schedule

DEFAULT_MODEL = "resnet50"
_RUN = r"(?P<model>.+)_over_.+_with_(?P<optimizer>.+)_sched_(?P<lr_sched>.+)"
_NAMES = {
    "train_full.py": re.compile(f"standard_{_RUN}"),
    "train_split.py": re.compile(rf"split_{_RUN}_val_split_(?P<samis_validation_split_index>\d+)"),
}
"""The scripts whose runs' names hold the flags that define them."""
_MAKERS = {
    "_static_coreset_": "runs of this name are made by train_prune.py",
    "pretrain/": "runs of this name are made by train_prune.py and select_coreset.py",
    "mpe/": "runs of this name are made by the scripts in examples/",
}


@dataclass(frozen=True)
class Subject:
    """The network that is measured.

    Attributes:
        path: Its checkpoint.
        experiment: Its run.
        seed: The run's seed.
        which: The folder of the result below the run's: the epoch, or digits of the checkpoint's content.
    """

    path: Path
    experiment: str
    seed: int
    which: str


def find_subject(args: Namespace, networks: TrainedNetworks) -> tuple[Subject, nn.Module, dict[str, Any]]:
    """The network of the flags, and its checkpoint without its weights.

    Raises:
        FlagError: Several schedules fit.
        FileError: There is no such checkpoint (the message has the command that makes it), or it does not fit.
    """
    name = networks.train.entry.name
    if args.checkpoint is not None:
        network, state = networks.load(args.checkpoint, args.model)
        settings = state["settings"]
        words = (settings.get(key, "unknown") for key in ("optimizer", "lr_sched"))
        experiment = standard_experiment(state["model"], name, *words)
        which = f"checkpoint_{file_digest(args.checkpoint)[:8]}"
        return Subject(args.checkpoint, experiment, int(settings.get("seed", 0)), which), network, state
    asked = {"seed": args.seed, "epoch": args.epochs}
    if args.exp is not None:
        path, said = _find_named(args, networks)
        model, experiment = args.model, args.exp
        asked |= said
    else:
        model = args.model or DEFAULT_MODEL
        pattern = standard_experiment(model, name, args.optimizer, "*")
        lr_sched = only_schedule(args.models_folder, pattern, args.seed, args.lr_sched) or "const"
        experiment = standard_experiment(model, name, args.optimizer, lr_sched)
        flags = {"model": model, "optimizer": args.optimizer, "lr_sched": lr_sched}
        path = networks.find(experiment, args.seed, args.epochs, **flags)
        asked |= {"optimizer": args.optimizer, "lr_sched": lr_sched, "validation_split": None}
    network, state = networks.load(path, model, **asked)
    return Subject(path, experiment, args.seed, f"epoch_{args.epochs}"), network, state


def _find_named(args: Namespace, networks: TrainedNetworks) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a run that is called by its name, and what the name says of it.

    Raises:
        FileError: There is none.
    """
    for script, pattern in _NAMES.items():
        if found := pattern.fullmatch(args.exp):
            path = networks.find(args.exp, args.seed, args.epochs, script=script, **found.groupdict())
            split = found.groupdict().get("samis_validation_split_index")
            said = {name: found[name] for name in ("optimizer", "lr_sched")}
            return path, {**said, "validation_split": None if split is None else int(split)}
    path = find_checkpoint(args.models_folder, args.exp, args.seed, args.epochs)
    if path is None:
        makers = (maker for sign, maker in _MAKERS.items() if sign in args.exp)
        raise FileError(
            f"{args.models_folder}: no checkpoint of epoch {args.epochs}, seed {args.seed} for {args.exp}; "
            + next(makers, "look for its name there")
        )
    return path, {}


def chosen_examples(args: Namespace, networks: TrainedNetworks, scores: np.ndarray | None) -> ImageSet:
    """The examples over which the loss is taken.

    Args:
        args: The flags.
        networks: The data.
        scores: By original index, where ``--high_low_spec`` is given.

    Raises:
        FlagError: Nothing is left.
        FileError: An example has no score.
    """
    if args.eigen_split == "test":
        return networks.test
    images = subset_of(args, networks.train)
    if args.high_low_spec is None:
        return images
    own = scores[images.indices.cpu().numpy()]
    missing = int(np.isnan(own).sum())
    if missing:
        raise FileError(
            f"--high_low_spec {args.high_low_spec}: {missing} of the {len(own)} examples have no score; score them, "
            "or leave them out with --subset"
        )
    return images.subset(torch.from_numpy(by_score(own, args.high_low_spec.side, args.high_low_spec.fraction)))


def subset_of(args: Namespace, images: ImageSet) -> ImageSet:
    """The part of the training examples that ``--subset`` says; all of them without it."""
    if args.subset is None:
        return images
    return images.subset(torch.from_numpy(parse_subset(args.subset, images.total, images.labels.cpu().numpy())))


def by_score(scores: np.ndarray, side: str, fraction: float) -> np.ndarray:
    """Positions, ascending, of the lowest or the highest scores; ties are broken by position.

    Args:
        scores: ``(n,)``, without NaN.
        side: ``"low"`` or ``"high"``.
        fraction: Share to take, of n, rounded half up.

    Raises:
        FlagError: That is none.
    """
    count = min(int(np.floor(fraction * len(scores) + 0.5 + 1e-9)), len(scores))
    if not count:
        raise FlagError(f"--high_low_spec: {fraction:g} of {len(scores)} examples is none; give a larger fraction")
    order = np.argsort(scores, kind="stable")
    return np.sort(order[:count] if side == "low" else order[-count:])
