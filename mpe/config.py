"""What flags and callers choose from, and the settings of the experiments. Nothing here needs torch."""

from dataclasses import dataclass
from pathlib import Path

from src.artifacts.paths import PICKLE_PLOTS, PICKLES
from src.cli import SEED, file_name, number, option
from src.errors import ArgumentError
from src.optimizers import IBLR_BACKENDS

CLASS_COVARIANCES = ("diag", "full", "woodbury")
"""How the classes of an example vary together: see ``mpe.estimates.estimate``."""

STRUCTURES = ("kfac", "diag")
"""Structures of Laplace's posterior."""

SHUFFLE_ORDERS = {"none": "sequential", "once": "fixed", "epoch": "shuffled"}
"""The values of ``base_shuffle``, and the order of ``src.datasets.Batches`` that each means."""

SHUFFLES = ("seeded", "replay", "shared")
"""How retrained models shuffle.

``seeded``: each by a generator of its own, seeded by (seed, what is removed), so that neither the other models nor
the order of their training matter. ``replay``: by the draws that the papers' scripts made, batch for batch.
``shared``: all by one permutation of all examples, in which removed ones count nothing; this lowers the noise between
models and saves time, but the batches are not those of training without the removed examples.
"""

_POSITIVE = number(float, 0, open_low=True)
_COUNT = number(int, 1)
_RATE = number(float, 0)


EXPERIMENT_FOLDERS = ("datasets_folder", "models_folder", "log_folder", "resume_ckpts_folder")
"""The fields of ``src.artifacts.Folders`` that experiments read and write."""

ONE_PROCESS = ("distributed_training", "sync_bn")
"""The fields of ``src.devices.ComputeConfig`` that experiments leave out."""

SIDE_BY_SIDE = {"precision": ("fp32", "tf32", "fp64")}
"""Choices of ``src.devices.ComputeConfig`` where models are trained side by side."""


@dataclass(frozen=True)
class ExperimentConfig:
    """What the five experiments of ``examples/`` have in common, under the names of the paper's flags.

    Attributes:
        model: A name of ``MODELS``.
        optimizer: sgd, adam, adamw or iblr.
    """

    name_exp: str = option("fmnist_lenet", "name of the result files", file_name)
    seed: int = option(1, "seed of initial weights, orders and samples", SEED)
    lr: float = option(1e-2, "initial learning rate", _POSITIVE)
    lrmin: float = option(1e-4, "learning rate that the cosine schedule falls towards", _RATE)
    bs: int = option(256, "batch size of training", _COUNT)
    epochs: int = option(100, "epochs of training", _COUNT)
    delta: float = option(60.0, "L2 parameter, the prior precision", _POSITIVE)
    base_shuffle: str = option(
        "none",
        "order of the training examples: as stored, one permutation for all epochs, or one per epoch",
        choices=tuple(SHUFFLE_ORDERS),
    )
    resume: bool = option(False, "continue from what an interrupted run of these settings left")
    overwrite: bool = option(False, "replace results with different settings")
    bs_jacs: int = option(500, "batch size of the pass over the variances", _COUNT, title="prediction variances")
    class_cov: str = option(
        "diag",
        "covariance between the classes: diag drops it, as the paper's experiments do; full keeps it; woodbury also "
        "corrects for the curvature that goes with an example",
        choices=CLASS_COVARIANCES,
        title="prediction variances",
    )
    memory_mb: float = option(
        128.0, "MiB that the gradients of a part of a batch may take", _POSITIVE, title="prediction variances"
    )
    laplace_backend: str = option(
        "fast",
        "who computes curvature and variances: this project layer by layer, or the package laplace-torch",
        choices=("fast", "laplace-torch"),
        title="Laplace's posterior",
        acts=(lambda args: not getattr(args, "optim_var", False), "with --optim_var: no Laplace posterior is fitted"),
    )
    hess_init: float = option(
        0.1,
        "initial Hessian of iblr",
        _POSITIVE,
        title="iBLR",
        acts=(lambda args: getattr(args, "optimizer", "iblr") == "iblr", "without --optimizer=iblr"),
    )
    iblr_backend: str = option(
        IBLR_BACKENDS[0],
        "who computes its steps: this project, or the package ivon-opt; they agree to rounding, and each continues "
        "the runs of the other",
        choices=IBLR_BACKENDS,
        title="iBLR",
        acts=(lambda args: getattr(args, "optimizer", "iblr") == "iblr", "without --optimizer=iblr"),
    )
    pickles_folder: Path = option(PICKLES, "folder of result files", Path, metavar="DIR", title="folders")
    model: str = "lenet"
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        if self.lrmin > self.lr:
            raise ArgumentError(
                "lrmin", f"{self.lrmin:g}: is above the initial learning rate, lr {self.lr:g}; give at most that"
            )


@dataclass(frozen=True)
class RetrainingConfig:
    """How models are retrained without some of the examples, many of them side by side."""

    lr_retrain: float = option(1e-3, "initial learning rate", _POSITIVE)
    lrmin_retrain: float = option(1e-4, "learning rate that the cosine schedule falls towards", _RATE)
    epochs_retrain: int = option(300, "epochs", _COUNT)
    retrain_shuffle: str = option(
        "seeded",
        "the one permutation that a model is retrained on: seeded by what it leaves out; replay, the draws of the "
        "paper's code; shared, one for all models, which differ in the examples left out alone",
        choices=SHUFFLES,
    )
    ensemble_size: int = option(50, "models that are trained side by side, as memory allows", _COUNT)
    ensemble: str = option(
        "auto",
        "train them as one batch of models, one after the other, or as is faster here",
        choices=("auto", "vectorised", "sequential"),
    )

    def __post_init__(self) -> None:
        if self.lrmin_retrain > self.lr_retrain:
            raise ArgumentError(
                "lrmin_retrain",
                f"{self.lrmin_retrain:g}: is above the initial learning rate, lr_retrain {self.lr_retrain:g}; give "
                "at most that",
            )


@dataclass(frozen=True)
class FigureConfig:
    """Which experiment's results are drawn, and where to."""

    name_exp: str = option("fmnist_lenet", "name of the experiment", file_name, metavar="NAME")
    class_cov: str | None = option(
        None,
        "draw estimates with this covariance between the classes (default: as the experiment was run)",
        choices=CLASS_COVARIANCES,
    )
    pickles_folder: Path = option(PICKLES, "folder of result files", Path, metavar="DIR", title="folders")
    plots_folder: Path = option(PICKLE_PLOTS, "folder of figures", Path, metavar="DIR", title="folders")
    show: bool = option(False, "open a window with the figure, and wait until it closes")
