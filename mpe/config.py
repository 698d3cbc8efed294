"""Choices for flags and callers, and the settings of the experiments. This module does not import torch."""

from dataclasses import dataclass
from pathlib import Path

from src.artifacts.paths import PICKLE_PLOTS, PICKLES
from src.cli import SEED, file_name, number, option
from src.errors import ArgumentError
from src.optimizers import IBLR_BACKENDS

CLASS_COVARIANCES = ("diag", "full", "woodbury")
"""Treatments of the covariance between the classes of an example; see ``mpe.estimates.estimate``."""

STRUCTURES = ("kfac", "diag", "ggn")
"""Structures of the Laplace posterior; ``ggn`` is the exact matrix, for small models."""

SHUFFLE_ORDERS = {"none": "sequential", "once": "fixed", "epoch": "shuffled"}
"""The values of ``base_shuffle``, and the corresponding order of ``src.datasets.Batches``."""

SHUFFLES = ("seeded", "replay", "shared")
"""How the training data of retrained models is shuffled.

``seeded``: each model has its own generator, seeded by (seed, removed examples), so its batches do not depend on the
other models or the order of training. ``replay``: the same random draws as in the papers' scripts, batch for batch.
``shared``: all models use one permutation of all examples, in which removed examples have weight 0. This reduces the
noise between models and saves time, but the batches differ from those of training without the removed examples.
"""

TRAINS_BASE = (lambda args: getattr(args, "checkpoint", None) is None, "with --checkpoint, which is not trained")
"""When a setting of the base training has an effect."""

_FITS_LAPLACE = (
    lambda args: not getattr(args, "optim_var", False),
    "with --optim_var, which does not fit a Laplace posterior",
)
_POSITIVE = number(float, 0, open_low=True)
_COUNT = number(int, 1)
_RATE = number(float, 0)


EXPERIMENT_FOLDERS = ("datasets_folder", "models_folder", "log_folder", "resume_ckpts_folder")
"""The fields of ``src.artifacts.paths.Folders`` that experiments read and write."""

ONE_PROCESS = ("distributed_training", "sync_bn")
"""The fields of ``src.devices.ComputeConfig`` that experiments do not offer."""

SIDE_BY_SIDE = {"precision": ("fp32", "tf32", "fp64")}
"""Choices of ``src.devices.ComputeConfig`` for training several models in parallel."""


@dataclass(frozen=True)
class ExperimentConfig:
    """The settings shared by the experiments in ``examples/``, named like the paper's flags.

    Attributes:
        model: The name of a model; see ``src.models.model_name``.
        optimizer: sgd, adam, adamw, or iblr.
    """

    name_exp: str = option("fmnist_lenet", "name of the result files", file_name)
    seed: int = option(1, "seed for the initial weights, data order, and samples", SEED)
    lr: float = option(1e-2, "initial learning rate", _POSITIVE, acts=TRAINS_BASE)
    lrmin: float = option(1e-4, "final learning rate of the cosine schedule", _RATE, acts=TRAINS_BASE)
    bs: int = option(256, "training batch size", _COUNT)
    epochs: int = option(100, "number of training epochs", _COUNT, acts=TRAINS_BASE)
    delta: float = option(60.0, "L2 parameter (prior precision)", _POSITIVE)
    base_shuffle: str = option(
        "none",
        "shuffling of the training examples: none, once for all epochs, or every epoch",
        choices=tuple(SHUFFLE_ORDERS),
        acts=TRAINS_BASE,
    )
    checkpoint: Path | None = option(
        None,
        "do not train, but use the weights in FILE: a checkpoint, or any state dict of the model (default: train)",
        Path,
        metavar="FILE",
    )
    resume: bool = option(False, "continue an interrupted run with the same settings")
    overwrite: bool = option(False, "replace results made with different settings")
    bs_jacs: int = option(500, "batch size for computing variances", _COUNT, title="prediction variances")
    class_cov: str = option(
        "diag",
        "covariance between classes: diag ignores it, as in the paper's experiments; full includes it; woodbury also "
        "corrects for the curvature removed with an example",
        choices=CLASS_COVARIANCES,
        title="prediction variances",
    )
    memory_mb: float = option(
        128.0, "memory limit for per-example gradients, in MiB", _POSITIVE, title="prediction variances"
    )
    var_version: str = option(
        STRUCTURES[0],
        "structure of the Laplace posterior: kfac, diag, or ggn, the exact GGN of a model of up to 10,000 parameters",
        choices=STRUCTURES,
        title="Laplace posterior",
        acts=_FITS_LAPLACE,
    )
    laplace_backend: str = option(
        "fast",
        "implementation of curvature and variances: this project's layer-by-layer code, or the laplace-torch package",
        choices=("fast", "laplace-torch"),
        title="Laplace posterior",
        acts=_FITS_LAPLACE,
    )
    finite_time: bool = option(
        False,
        "account for the number of epochs: scale the variance along each direction by how far SGD gets along it; the "
        "paper assumes convergence",
        title="Laplace posterior",
        acts=_FITS_LAPLACE,
    )
    hess_init: float = option(
        0.1,
        "initial Hessian estimate of iblr",
        _POSITIVE,
        title="iBLR",
        acts=(lambda args: getattr(args, "optimizer", "iblr") == "iblr", "without --optimizer=iblr"),
    )
    iblr_backend: str = option(
        IBLR_BACKENDS[0],
        "implementation of iblr: this project's, or the ivon-opt package; they agree up to rounding, and each can "
        "resume runs of the other",
        choices=IBLR_BACKENDS,
        title="iBLR",
        acts=(lambda args: getattr(args, "optimizer", "iblr") == "iblr", "without --optimizer=iblr"),
    )
    pickles_folder: Path = option(PICKLES, "folder for result files", Path, metavar="DIR", title="folders")
    model: str = "lenet"
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        if self.finite_time and self.laplace_backend != "fast":
            raise ArgumentError("finite_time", ": needs --laplace_backend=fast")
        if self.finite_time and self.optimizer != "sgd":
            raise ArgumentError("finite_time", ": needs --optimizer=sgd")
        if self.lrmin > self.lr:
            raise ArgumentError(
                "lrmin",
                f"{self.lrmin:g}: is above the initial learning rate, --lr {self.lr:g}; give at most that value",
            )


@dataclass(frozen=True)
class RetrainingConfig:
    """How models are retrained without some of the examples, many of them in parallel."""

    lr_retrain: float = option(1e-3, "initial learning rate", _POSITIVE)
    lrmin_retrain: float = option(1e-4, "final learning rate of the cosine schedule", _RATE)
    epochs_retrain: int = option(300, "number of epochs", _COUNT)
    retrain_from: str = option(
        "base",
        "weights at the start of retraining: those of the base model, or the initial ones for --seed, to retrain "
        "from scratch",
        choices=("base", "initial"),
    )
    retrain_shuffle: str = option(
        "seeded",
        "data order for retraining: seeded, one permutation per model, seeded by the removed examples; replay, the "
        "random draws of the paper's code; shared, one permutation for all models",
        choices=SHUFFLES,
    )
    ensemble_size: int = option(50, "maximum number of models to train in parallel, if memory allows", _COUNT)
    ensemble: str = option(
        "auto",
        "train the models as one batch, one after another, or whichever is faster on this machine",
        choices=("auto", "vectorised", "sequential"),
    )

    def __post_init__(self) -> None:
        if self.lrmin_retrain > self.lr_retrain:
            raise ArgumentError(
                "lrmin_retrain",
                f"{self.lrmin_retrain:g}: is above the initial learning rate, --lr_retrain {self.lr_retrain:g}; give "
                "at most that value",
            )


@dataclass(frozen=True)
class VonConfig:
    """How variational online Newton learns a Gaussian posterior; see ``mpe.von.Von``."""

    updates: int = option(125, "number of updates", _COUNT)
    lr: float = option(5e-3, "initial learning rate of the mean", _POSITIVE)
    lrmin: float = option(1e-3, "final learning rate of the mean, approached linearly", _RATE)
    lr_precision: float = option(1e-5, "learning rate of the precision", number(float, 0, 1, open_low=True))
    samples: int = option(3, "number of samples of the weights per update", _COUNT)
    hess_init: float = option(
        0.1, "initial Hessian estimate h0: the precision starts at N h0 + delta, like that of iblr", _POSITIVE
    )


@dataclass(frozen=True)
class FigureConfig:
    """Which experiment's results to plot, and where to write the figures."""

    name_exp: str = option("fmnist_lenet", "name of the experiment", file_name, metavar="NAME")
    class_cov: str | None = option(
        None,
        "plot estimates with this covariance between classes (default: the setting of the experiment)",
        choices=CLASS_COVARIANCES,
    )
    pickles_folder: Path = option(PICKLES, "folder with the result files", Path, metavar="DIR", title="folders")
    plots_folder: Path = option(PICKLE_PLOTS, "folder for figures", Path, metavar="DIR", title="folders")
    show: bool = option(False, "show the figure in a window and wait until it is closed")
