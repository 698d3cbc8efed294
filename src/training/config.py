"""Settings of a training run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from src.artifacts.store import acting_settings
from src.cli import SEED, Parser, check_options, number, option
from src.datasets import DATASETS, flips_images
from src.devices import computes_bf16
from src.errors import ArgumentError
from src.models import ModelConfig
from src.optimizers import IBLR_BACKENDS, OPTIMIZERS, SCHEDULES


def _acts(setting: str) -> tuple:
    """Return the ``acts`` rule of a setting that only some optimizers use."""
    names = [name for name, entry in OPTIMIZERS.items() if setting in entry.settings]
    return (lambda args: args.optimizer in names, f"without --optimizer={' or '.join(names)}")


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of the training loop. Data and model are passed separately.

    Attributes:
        seed: Seed of the initial weights and of all randomness within epochs.
        epochs: Passes over the training set.
        optimizer: A key of ``OPTIMIZERS``.
        learning_rate: Base rate of the schedule.
        lr_sched: A key of ``SCHEDULES``.
        lr_min: Minimum rate, for schedules that have one.
        weight_decay: Weight decay.
        rho: Radius of SAM's perturbation.
        adaptive: Whether SAM is adaptive.
        delta: Prior precision of iBLR.
        hess_init: Initial Hessian of iBLR.
        iblr_backend: The implementation of iBLR's steps, one of ``IBLR_BACKENDS``. They agree up to rounding, so
            this setting, like the device, is not part of what determines a result.
        momentum: Momentum of SGD, including SGD as SAM's base optimizer.
        nesterov: Whether SGD uses Nesterov momentum.
        precision: A key of ``PRECISIONS``.

    Raises:
        ArgumentError: A setting is out of range or cannot be combined with another.
    """

    epochs: int = option(160, "passes over the training set", number(int, 1))
    optimizer: str = option("sgd", "optimizer", choices=tuple(OPTIMIZERS))
    learning_rate: float = option(0.4, "base learning rate", number(float, 0, open_low=True))
    lr_sched: str = option(
        "cosine",
        "learning rate schedule for any optimizer, updated once per epoch, onecycle at every step (the SAMIS "
        "experiments use const with adam)",
        choices=tuple(SCHEDULES),
    )
    lr_min: float = option(
        0.0,
        "minimum learning rate (all schedules except const)",
        number(float, 0),
        acts=(lambda args: args.lr_sched != "const", "with --lr_sched=const"),
    )
    momentum: float = 0.9
    nesterov: bool = option(False, "use Nesterov momentum (sgd and sam)", negatable=True, acts=_acts("nesterov"))
    weight_decay: float = option(0.0, "weight decay (not used in the papers)", number(float, 0))
    rho: float = option(
        0.05, "radius of SAM's perturbation (sam only)", number(float, 0, open_low=True), acts=_acts("rho")
    )
    adaptive: bool = option(
        False, "use adaptive, scale-invariant SAM (sam only)", negatable=True, acts=_acts("adaptive")
    )
    delta: float | None = option(
        None,
        "prior precision of iBLR (default: weight_decay x examples, else 1)",
        number(float, 0, open_low=True),
        acts=_acts("delta"),
    )
    hess_init: float = option(
        0.1, "initial Hessian of iBLR", number(float, 0, open_low=True), acts=_acts("hess_init")
    )
    iblr_backend: str = option(
        IBLR_BACKENDS[0],
        "implementation of iBLR: this project's or that of the ivon-opt package; they agree up to rounding, and each "
        "can continue a run of the other",
        choices=IBLR_BACKENDS,
        acts=_acts("iblr_backend"),
    )
    seed: int = option(1, "seed of initial weights, example order and augmentation", SEED)
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_options(self)
        if not 0.0 <= self.momentum < 1.0:
            raise ArgumentError("momentum", f"{self.momentum:g}: must be at least 0 and below 1")
        if self.lr_min > self.learning_rate:
            raise ArgumentError(
                "lr_min", f"{self.lr_min:g}: must be between 0 and the learning rate {self.learning_rate:g}"
            )
        acting = OPTIMIZERS[self.optimizer].settings
        if self.delta is not None and "delta" not in acting:
            raise ArgumentError("delta", f": has no effect on {self.optimizer}; leave it out")
        if self.delta is not None and self.weight_decay > 0.0:
            raise ArgumentError(
                "delta",
                f"{self.delta:g}: cannot be combined with weight decay, which sets the same prior; give only one",
            )
        if self.nesterov and "nesterov" not in acting:
            raise ArgumentError("nesterov", f": has no effect on {self.optimizer}; leave it out")
        if self.nesterov and self.momentum == 0.0:
            raise ArgumentError("nesterov", ": needs a momentum above 0; set momentum, or leave it out")

    def as_dict(self) -> dict[str, Any]:
        """Return the settings that determine the result, as plain values. ``nesterov`` is included only if True."""
        settings = acting_settings(asdict(self))
        del settings["iblr_backend"]
        if not self.nesterov:
            del settings["nesterov"]
        return settings


RECIPES: dict[str, dict[str, Any]] = {
    "fast": {
        "model": "fastnet",
        "epochs": 16,
        "batch_size": 256,
        "learning_rate": 0.4,
        "lr_sched": "onecycle",
        "nesterov": True,
        "weight_decay": 5e-4,
        "data_augmentation": True,
        "alternate_flips": True,
        "precision": lambda: "bf16" if computes_bf16() else "fp32",
    },
}
"""Defaults of a script's flags by recipe; a function is called when the recipe is chosen.

``fast`` is this project's own, for scores of good quality within minutes to hours of one CPU core. It follows Page
2019, "How to train your ResNet", and Jordan 2024 (arXiv:2404.00498). docs/scores.md has its accuracy and cost. The
papers' settings are the defaults without a recipe.
"""


def add_recipes(parser: Parser) -> None:
    """Add ``--recipe``, which replaces the defaults of a training script's flags."""
    parser.add_recipes(
        RECIPES, "training", "defaults for quick training of good models; flags override it (default: none)"
    )
    parser.checks.append(_check_recipe)


def _check_recipe(args: argparse.Namespace) -> None:
    if args.recipe is not None and args.optimizer not in ("sgd", "sam"):
        raise ArgumentError(
            "recipe", f"{args.recipe}: is for sgd and sam, not {args.optimizer}; leave out one of them"
        )


def parse_save_epochs(text: str) -> str | list[int]:
    """Parse the value of ``--save_epochs``: ``all``, ``last``, or a list of epochs, returned in ascending order.

    Raises:
        argparse.ArgumentTypeError: The text is none of these.
    """
    if text in ("all", "last"):
        return text
    try:
        epochs = sorted({int(part) for part in text.replace(",", " ").split()})
    except ValueError:
        epochs = []
    if not epochs or epochs[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not all, last, or a list of epochs such as 10,11,40")
    return epochs


@dataclass(frozen=True)
class RunConfig:
    """Settings of a training run: the model, the loop, the batches, and the files to keep.

    Attributes:
        model: The model.
        training: The settings of the training loop.
        batch_size: Examples per step, over all processes.
        data_augmentation: Whether to apply the data set's random crops and flips.
        alternate_flips: Whether images are flipped in every other epoch instead of at random.
        cutout_holes: Number of squares that Cutout masks per image.
        cutout_length: Side of a square in pixels.
        resume: Whether to continue from the newest resume state, if there is one.
        overwrite: Whether results with different settings may be replaced.
        save_epochs: ``"all"``, ``"last"``, or the epochs whose checkpoints are kept in addition to best and last.
        measure_proxies: Whether to record per-example dynamics and measure scores at the end.
        input_gradients: Whether the dynamics include the norms of input gradients.

    Raises:
        ArgumentError: A value is out of range, or ``save_epochs`` includes an epoch after the last.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    batch_size: int = option(512, "examples per step, over all processes", number(int, 1), title="training")
    data_augmentation: bool = option(
        False, "apply the data set's random crops and flips", negatable=True, title="training"
    )
    alternate_flips: bool = option(
        False,
        "flip each image in every other epoch, starting at random, instead of at random in every epoch",
        negatable=True,
        title="training",
        acts=(
            lambda args: args.data_augmentation and flips_images(args.dataset),
            "without an augmentation that flips images",
        ),
    )
    cutout_holes: int = option(
        0,
        "Cutout: number of squares to mask per image",
        number(int, 0),
        title="training",
        acts=(
            lambda args: not args.cutout_holes or args.dataset not in DATASETS or DATASETS[args.dataset].cutout,
            f"except on {', '.join(name for name, entry in DATASETS.items() if entry.cutout)} and your own data",
        ),
    )
    cutout_length: int = option(
        16,
        "Cutout: side of each square in pixels",
        number(int, 1),
        title="training",
        acts=(lambda args: args.cutout_holes > 0, "without --cutout_holes"),
    )
    resume: bool = option(False, "continue from the newest resume state, if there is one")
    overwrite: bool = option(False, "replace results with different settings")
    save_epochs: str | list[int] = option(
        "all",
        "epochs whose checkpoints to keep, such as 10,11,40; best and last are always kept",
        parse_save_epochs,
        metavar="all|last|LIST",
    )
    measure_proxies: bool = option(
        False, "record per-example dynamics; at the end, measure forgetting, epochs to learn and flatness"
    )
    input_gradients: bool = option(
        False,
        "with --measure_proxies, also record the norms of input gradients, for the score csg (slows down training, "
        "most with models whose first layer takes much of the time, such as lenet)",
        acts=(lambda args: args.measure_proxies, "without --measure_proxies"),
    )

    def __post_init__(self) -> None:
        check_options(self)
        epochs = self.training.epochs
        if isinstance(self.save_epochs, list) and self.save_epochs[-1] > epochs:
            raise ArgumentError(
                "save_epochs",
                f"{self.save_epochs[-1]}: the run ends after epoch {epochs}; give epochs from 1 to {epochs}",
            )

    def as_dict(self, data: Mapping[str, Any], *, sync_bn: bool = False) -> dict[str, Any]:
        """Return the settings of loop, data, model and batches that determine the result, as plain values.

        The order matches earlier versions, so the same training run writes the same bytes.

        Args:
            data: The settings that identify the data.
            sync_bn: Whether BatchNorm computes its statistics over the batches of all processes.
        """
        return {
            **self.training.as_dict(),
            **data,
            **self.model.as_dict(),
            "batch_size": self.batch_size,
            "data_augmentation": self.data_augmentation,
            **({"alternate_flips": True} if self.alternate_flips else {}),
            "cutout_holes": self.cutout_holes,
            "cutout_length": self.cutout_length if self.cutout_holes else None,
            "sync_bn": sync_bn,
            "measure_proxies": self.measure_proxies,
            **({"input_gradients": True} if self.input_gradients else {}),
        }
