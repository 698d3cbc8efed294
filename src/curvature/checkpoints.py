"""The trained model whose loss is measured, and the examples over which that loss is taken."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from src.artifacts.io import file_digest
from src.artifacts.paths import standard_experiment
from src.context import RunContext
from src.curvature.config import CheckpointConfig, TrainedRunConfig
from src.datasets import ImageSet
from src.errors import ArgumentError, FileError
from src.training import find_checkpoint, only_schedule

DEFAULT_MODEL = "resnet50"
_RUN = r"(?P<model>.+)_over_.+_with_(?P<optimizer>.+)_sched_(?P<lr_sched>.+)"
_NAMES = {
    "train_full.py": re.compile(f"standard_{_RUN}"),
    "train_split.py": re.compile(rf"split_{_RUN}_val_split_(?P<samis_validation_split_index>\d+)"),
}
"""The scripts whose runs' names contain the flags that define them."""
_MAKERS = {
    "_static_coreset_": "runs of this name are made by train_prune.py",
    "pretrain/": "runs of this name are made by train_prune.py and select_coreset.py",
    "mpe/": "runs of this name are made by the scripts in examples/",
}


@dataclass(frozen=True)
class TrainedModel:
    """The model that is measured.

    Attributes:
        path: Its checkpoint.
        experiment: Its run.
        seed: The run's seed.
        which: The folder of the result below the run's: the epoch, or digits of the checkpoint's digest.
        digest: The checkpoint's digest.
        model: The model, in eval mode.
        state: The checkpoint without its weights.
    """

    path: Path
    experiment: str
    seed: int
    which: str
    digest: str
    model: nn.Module
    state: dict[str, Any]

    @property
    def has_batchnorm(self) -> bool:
        """Whether the model has BatchNorm, which is part of the papers' file names."""
        return any(isinstance(module, _BatchNorm) for module in self.model.modules())


def find_full_run(
    config: TrainedRunConfig, model: str, models_folder: Path, dataset: str, seed: int
) -> tuple[str, dict[str, str]]:
    """The name of a run of train_full.py, and the flags that define it.

    Raises:
        ArgumentError: Several schedules fit.
    """
    pattern = standard_experiment(model, dataset, config.optimizer, "*")
    lr_sched = only_schedule(models_folder, pattern, seed, config.lr_sched) or "const"
    flags = {"model": model, "optimizer": config.optimizer, "lr_sched": lr_sched}
    return standard_experiment(model, dataset, config.optimizer, lr_sched), flags


def find_model(config: CheckpointConfig, models_folder: Path, context: RunContext) -> TrainedModel:
    """Find and load the model that is asked for.

    Args:
        config: Which one.
        models_folder: The folder of checkpoints.
        context: Where the model is loaded: device, precision and data.

    Raises:
        ArgumentError: Several schedules fit.
        FileError: There is no such checkpoint (the message has the command that makes it), or it does not fit.
    """
    if config.checkpoint is not None:
        model, state = context.load_model(config.checkpoint, model=config.model)
        settings = state["settings"]
        names = (settings.get(key, "unknown") for key in ("optimizer", "lr_sched"))
        experiment = standard_experiment(state["model"], context.entry.name, *names)
        digest = file_digest(config.checkpoint)
        which, seed = f"checkpoint_{digest[:8]}", int(settings.get("seed", 0))
        return TrainedModel(config.checkpoint, experiment, seed, which, digest, model, state)
    expected: dict[str, Any] = {"seed": config.seed, "epoch": config.epochs}
    if config.exp is not None:
        name, experiment = config.model, config.exp
        path, said = _find_named(config, models_folder, context)
        expected |= said
    else:
        name = config.model or DEFAULT_MODEL
        experiment, flags = find_full_run(config, name, models_folder, context.entry.name, config.seed)
        found = context.find_checkpoints(models_folder, experiment, config.seed, [config.epochs], **flags)
        path = found[config.epochs]
        expected |= {**flags, "validation_split": None}
    model, state = context.load_model(path, **{**expected, "model": name})
    which = f"epoch_{config.epochs}"
    return TrainedModel(path, experiment, config.seed, which, file_digest(path), model, state)


def _find_named(config: CheckpointConfig, models_folder: Path, context: RunContext) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a run that is given by its name, and the settings that follow from the name."""
    for script, pattern in _NAMES.items():
        if match := pattern.fullmatch(config.exp):
            flags = match.groupdict()
            found = context.find_checkpoints(models_folder, config.exp, config.seed, [config.epochs], script, **flags)
            path = found[config.epochs]
            split = flags.get("samis_validation_split_index")
            said = {name: flags[name] for name in ("optimizer", "lr_sched")}
            return path, {**said, "validation_split": None if split is None else int(split)}
    path = find_checkpoint(models_folder, config.exp, config.seed, config.epochs)
    if path is None:
        makers = (maker for sign, maker in _MAKERS.items() if sign in config.exp)
        raise FileError(
            f"{models_folder}: no checkpoint of epoch {config.epochs}, seed {config.seed} for {config.exp}; "
            + next(makers, "look for its name there")
        )
    return path, {}


def select_by_score(images: ImageSet, scores: np.ndarray, side: str, fraction: float) -> ImageSet:
    """The examples with the lowest or the highest scores; ties are broken by position.

    Args:
        images: n examples.
        scores: By original index.
        side: ``"low"`` or ``"high"``.
        fraction: Share of n to take, rounded half up.

    Raises:
        ArgumentError: That is none.
        FileError: An example has no score.
    """
    own = scores[images.indices.cpu().numpy()]
    if missing := int(np.isnan(own).sum()):
        raise FileError(
            f"--high_low_spec: {missing} of the {len(own)} examples have no score; score them, or leave them out "
            "with --subset"
        )
    return images.subset(torch.from_numpy(positions_by_score(own, side, fraction)))


def positions_by_score(scores: np.ndarray, side: str, fraction: float) -> np.ndarray:
    """Positions, ascending, of the lowest or the highest of scores ``(n,)``; see :func:`select_by_score`."""
    count = min(int(np.floor(fraction * len(scores) + 0.5 + 1e-9)), len(scores))
    if not count:
        raise ArgumentError(
            "high_low_spec", f": {fraction:g} of {len(scores)} examples is none; give a larger fraction"
        )
    order = np.argsort(scores, kind="stable")
    return np.sort(order[:count] if side == "low" else order[-count:])
