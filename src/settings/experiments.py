"""Flags of the sensitivity experiments in ``examples/``: names and defaults of the paper's scripts."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpe.config import CLASS_COVARIANCES, ORDERS, SHUFFLES
from src.artifacts import PICKLE_PLOTS, PICKLES
from src.errors import FlagError
from src.settings import values
from src.settings.common import (
    add_compute_flags,
    add_data_flags,
    add_folder_flags,
    add_model_choice,
    add_overwrite_flag,
)
from src.settings.values import file_name

_POSITIVE = values.number(float, 0, open_low=True)
_COUNT = values.number(int, 1)
_RATE = values.number(float, 0)


def add_experiment_flags(
    parser: argparse.ArgumentParser, defaults: Mapping[str, Any], *, optimizers: tuple[str, ...] = ()
) -> None:
    """What all five experiments take.

    Args:
        parser: The script's parser.
        defaults: name_exp, dataset, model, lr, lrmin, bs, epochs, bs_jacs, and delta where there is one prior.
        optimizers: The choices of ``--optimizer``, the first being the default; none where it is fixed.
    """
    add_data_flags(parser, default=defaults["dataset"])
    add_model_choice(parser, default=defaults["model"])
    group = parser.add_argument_group("experiment")
    add = group.add_argument
    add("--name_exp", type=values.file_name, default=defaults["name_exp"], help="name of the result files")
    add("--seed", type=values.SEED, default=1, help="seed of initial weights, orders and samples")
    if optimizers:
        add("--optimizer", choices=optimizers, default=optimizers[0], help="optimiser")
    add("--lr", type=_POSITIVE, default=defaults["lr"], help="learning rate at the start")
    add("--lrmin", type=_RATE, default=defaults["lrmin"], help="learning rate that the cosine schedule falls towards")
    add("--bs", type=_COUNT, default=defaults["bs"], help="batch size of training")
    add("--epochs", type=_COUNT, default=defaults["epochs"], help="epochs of training")
    if "delta" in defaults:
        add("--delta", type=_POSITIVE, default=float(defaults["delta"]), help="L2 parameter, the prior precision")
    add(
        "--base_shuffle",
        choices=tuple(ORDERS),
        default="none",
        help="order of the training examples: as they stand, one permutation for all epochs, or one per epoch",
    )
    add("--resume", action="store_true", help="go on from what an interrupted run of these settings left")
    add_overwrite_flag(group)
    variances = parser.add_argument_group("prediction variances")
    variances.add_argument(
        "--bs_jacs", type=_COUNT, default=defaults["bs_jacs"], help="batch size of the pass over the variances"
    )
    variances.add_argument(
        "--class_cov",
        choices=CLASS_COVARIANCES,
        default="diag",
        help="covariance between the classes: diag drops it, as the paper's experiments do; full keeps it; woodbury "
        "also corrects for the curvature that goes with an example",
    )
    variances.add_argument(
        "--memory_mb", type=_POSITIVE, default=128.0, help="MiB that the gradients of a part of a batch may take"
    )
    add_compute_flags(parser, training=True, distributed=False)
    add_folder_flags(parser, "datasets", "models", "log", "resume_ckpts")
    add_pickles_flag(parser)
    parser.checks.append(_check_experiment)


def _check_experiment(args: argparse.Namespace) -> None:
    for floor, top in (("lrmin", "lr"), ("lrmin_retrain", "lr_retrain")):
        low, high = getattr(args, floor, 0.0), getattr(args, top, 0.0)
        if low > high:
            raise FlagError(f"--{floor} {low:g}: is above --{top} {high:g}; give at most that")
    if args.precision == "bf16" and hasattr(args, "ensemble"):
        raise FlagError(
            "--precision bf16: is not supported where models are trained side by side; give fp32, tf32 or fp64"
        )


def add_pickles_flag(parser: argparse.ArgumentParser, *, plots: bool = False) -> None:
    """``--pickles_folder`` and, for the scripts that draw, ``--plots_folder``."""
    group = parser.add_argument_group("results")
    group.add_argument("--pickles_folder", type=Path, default=PICKLES, metavar="DIR", help="folder of result files")
    if plots:
        group.add_argument("--plots_folder", type=Path, default=PICKLE_PLOTS, metavar="DIR", help="folder of figures")


def add_laplace_flags(parser: argparse.ArgumentParser) -> None:
    """``--laplace_backend``, for the experiments that use Laplace's posterior."""
    parser.add_argument_group("Laplace's posterior").add_argument(
        "--laplace_backend",
        choices=("fast", "laplace-torch"),
        default="fast",
        help="who computes curvature and variances: this project layer by layer, or the package laplace-torch",
    )


def add_retraining_flags(parser: argparse.ArgumentParser, lr: float, lrmin: float, epochs: int) -> None:
    """How networks are retrained without some of the examples."""
    group = parser.add_argument_group("retraining")
    add = group.add_argument
    add("--lr_retrain", type=_POSITIVE, default=lr, help="learning rate at the start")
    add("--lrmin_retrain", type=_RATE, default=lrmin, help="learning rate that the schedule falls towards")
    add("--epochs_retrain", type=_COUNT, default=epochs, help="epochs")
    add(
        "--retrain_shuffle",
        choices=SHUFFLES,
        default="seeded",
        help="the one permutation that a network is retrained on: seeded by what it leaves out; replay, the draws of "
        "the paper's code; shared, one for all networks, which differ in the examples left out alone",
    )
    add_ensemble_flags(group)


def add_ensemble_flags(group: Any) -> None:
    """How many networks train side by side, and how."""
    group.add_argument(
        "--ensemble_size", type=_COUNT, default=50, help="networks that are trained side by side, as memory allows"
    )
    group.add_argument(
        "--ensemble",
        choices=("auto", "vectorised", "sequential"),
        default="auto",
        help="train them as one batch of networks, one after the other, or as is faster here",
    )


def add_experiment_flag(parser: argparse.ArgumentParser, default: str) -> None:
    """``--name_exp``: whose results are drawn."""
    parser.add_argument("--name_exp", type=file_name, default=default, metavar="NAME", help="name of the experiment")


def add_class_cov_flag(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """``--class_cov``: which of the stored estimates are drawn, one or ``several``."""
    parser.add_argument(
        "--class_cov",
        choices=CLASS_COVARIANCES,
        nargs="+" if several else None,
        help="draw estimates with this covariance between the classes (default: as the experiment was run)",
    )


def add_figure_flags(parser: argparse.ArgumentParser) -> None:
    """``--pickles_folder``, ``--plots_folder`` and ``--show``."""
    add_pickles_flag(parser, plots=True)
    parser.add_argument("--show", action="store_true", help="open a window with the figure, and wait until it closes")
