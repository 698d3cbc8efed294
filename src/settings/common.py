"""Flag groups that most scripts take."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.artifacts.paths import Folders
from src.cli import restrict
from src.datasets import DATASETS, dataset_names
from src.datasets.registry import check_arguments
from src.devices import PRECISIONS
from src.errors import FlagError
from src.metrics.proxy import ScoreConfig
from src.models import model_names, require_weights
from src.optimizers import OPTIMIZERS, SCHEDULES, rate
from src.settings import values


def add_data_flags(parser: argparse.ArgumentParser, *, subset: bool = True, default: str = "cifar100") -> None:
    """Which data: ``--dataset``, ``--image_size``, ``--channels`` and, where it applies, ``--subset``."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        type=values.dataset,
        default=default,
        metavar="NAME",
        help=f"{', '.join(dataset_names())}, or your own: npz:FILE (arrays x_train, y_train, x_test, y_test), "
        "folder:DIR (train/ and test/ with a folder per class)",
    )
    group.add_argument(
        "--image_size",
        type=values.number(int, 1),
        metavar="PIXELS",
        help="scale own data so that the shorter side has PIXELS, and cut the center square (default: as they are)",
    )
    group.add_argument(
        "--channels",
        type=int,
        choices=(1, 3),
        help="turn own data into gray (1) or color (3) (default: as they are)",
    )
    if subset:
        group.add_argument(
            "--subset",
            metavar="N|FILE",
            help="use only N training examples (the same share of each class) or those whose indices are in "
            "FILE, one per line; indices stay those of the whole data set (default: all)",
        )
    parser.checks.append(_check_data)


def _check_data(args: argparse.Namespace) -> None:
    check_arguments(args.dataset, args.image_size, args.channels)
    if args.dataset in DATASETS and getattr(args, "cutout_holes", 0):
        DATASETS[args.dataset].training_augmentation(False, cutout_holes=args.cutout_holes)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which network: ``--model``, ``--pretrained``."""
    group = add_model_choice(parser)
    group.add_argument(
        "--pretrained",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="start vit from ImageNet weights, as the SAMIS paper does: torchvision's, downloaded, or those of FILE",
    )
    parser.checks.append(lambda args: require_weights(args.model) if args.pretrained else None)


def add_model_choice(parser: argparse.ArgumentParser, default: str = "resnet50") -> Any:
    """``--model`` alone, for scripts that read trained networks."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "--model", choices=model_names(), default=default, metavar="NAME", help=_listing(model_names())
    )
    return group


def _listing(names: Sequence[str]) -> str:
    return "one of " + ", ".join(names)


def add_folder_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Folders by their short names, for example ``"datasets", "models"``."""
    parser.add(Folders, "folders", only=[f"{name}_folder" for name in names])


def splits_folder(args: argparse.Namespace) -> Path:
    """Where the validation splits are (``add_folder_flags(..., "datasets", "splits")``)."""
    return args.splits_folder or args.datasets_folder / "splits"


def add_compute_flags(
    parser: argparse.ArgumentParser,
    *,
    training: bool = False,
    distributed: bool = True,
    precisions: Sequence[str] = tuple(PRECISIONS),
) -> None:
    """Where and how to compute: ``--device``, ``--precision``, ``--deterministic`` and, to train, ``--compile``.

    Args:
        parser: The script's parser.
        training: Whether the script trains.
        distributed: Whether several processes may share its batches.
        precisions: The choices of ``--precision``.
    """
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--device", type=values.device, help="cpu, cuda, or the index of a GPU (default: the first GPU, else the CPU)"
    )
    notes = "; ".join(f"{name}: {PRECISIONS[name].note}" for name in precisions)
    group.add_argument("--precision", choices=tuple(precisions), default="fp32", help=notes)
    group.add_argument("--deterministic", action="store_true", help="only deterministic algorithms (slower on GPUs)")
    if training:
        group.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    if training and not distributed:
        parser.set_defaults(distributed_training=False, sync_bn=False)
    elif training:
        group.add_argument(
            "--distributed_training",
            action="store_true",
            help="share each batch among the processes of torchrun",
        )
        group.add_argument(
            "--sync_bn", action="store_true", help="BatchNorm statistics over the batches of all processes"
        )
        restrict(group, {("--sync_bn",): (lambda args: args.distributed_training, "without --distributed_training")})


def add_training_flags(parser: argparse.ArgumentParser, *, epochs: bool = True, seed: bool = True) -> None:
    """How to train: length, batches, optimiser, schedule, augmentation.

    Args:
        parser: The script's parser.
        epochs: Whether ``--epochs`` is the length; else the script has a flag of its own for it.
        seed: Whether ``--seed`` is the seed; else the script takes several.
    """
    group = parser.add_argument_group("training")
    add = group.add_argument
    if seed:
        add_seed_flag(group)
    if epochs:
        add("--epochs", type=values.number(int, 1), default=160, help="passes over the training part")
    add("--batch_size", type=values.number(int, 1), default=512, help="examples per step, over all processes")
    add("--optimizer", choices=tuple(OPTIMIZERS), default="sgd", help="optimiser")
    add("--learning_rate", type=values.number(float, 0, open_low=True), default=0.4, help="base learning rate")
    add(
        "--lr_sched",
        choices=tuple(SCHEDULES),
        default="cosine",
        help="schedule of the rate, stepped per epoch, for every optimizer (the SAMIS experiments keep the rate of "
        "adam constant: const)",
    )
    add(
        "--lr_min",
        type=values.number(float, 0),
        default=0.0,
        help="floor that the rate falls towards (every schedule but const)",
    )
    add("--weight_decay", type=values.number(float, 0), default=0.0, help="weight decay (the papers use none)")
    add(
        "--rho",
        type=values.number(float, 0, open_low=True),
        default=0.05,
        help="radius of SAM's perturbation (sam only)",
    )
    add(
        "--adaptive",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="adaptive SAM, scale-invariant (sam only)",
    )
    add(
        "--delta",
        type=values.number(float, 0, open_low=True),
        help="prior precision of iBLR (default: weight_decay x examples, else 1)",
    )
    add("--hess_init", type=values.number(float, 0, open_low=True), default=0.1, help="initial Hessian of iBLR")
    restrict(
        group,
        {
            ("--lr_min",): (lambda args: args.lr_sched != "const", "with --lr_sched=const"),
            ("--rho", "--adaptive", "--no-adaptive"): (
                lambda args: args.optimizer == "sam",
                "without --optimizer=sam",
            ),
            ("--delta", "--hess_init"): (lambda args: args.optimizer == "iblr", "without --optimizer=iblr"),
        },
    )
    add_augmentation_flags(group)
    parser.checks.append(lambda args: rate(args.lr_sched, 1, 1, args.learning_rate, args.lr_min))


def add_seed_flag(group: Any) -> None:
    """``--seed``."""
    group.add_argument("--seed", type=values.SEED, default=1, help="seed of initial weights, order and augmentation")


def add_augmentation_flags(group: Any) -> None:
    """What training images undergo."""
    add = group.add_argument
    add(
        "--data_augmentation",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="the data set's random crops and flips",
    )
    add("--cutout_holes", type=values.number(int, 0), default=0, help="Cutout: squares blanked per image")
    add("--cutout_length", type=values.number(int, 1), default=16, help="Cutout: side of a square in pixels")
    restrict(group, {("--cutout_length",): (lambda args: args.cutout_holes > 0, "without --cutout_holes")})


def add_run_flags(parser: argparse.ArgumentParser, *, resume: bool = True) -> None:
    """What a training run keeps and measures, and how it goes on (``resume``: whether a flag says so)."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    if resume:
        add("--resume", action="store_true", help="continue from the newest resume state, if there is one")
    add_overwrite_flag(group)
    add(
        "--save_epochs",
        type=values.save_epochs,
        default="all",
        metavar="all|last|LIST",
        help="epochs whose checkpoints are kept, such as 10,11,40; best and last are always kept",
    )
    add(
        "--measure_proxies",
        action="store_true",
        help="record per-example dynamics, and measure forgetting, epochs to learn and flatness at the end",
    )
    parser.checks.append(_check_save_epochs)


def _check_save_epochs(args: argparse.Namespace) -> None:
    chosen, epochs = args.save_epochs, getattr(args, "epochs", None) or args.coreset_epochs
    if isinstance(chosen, list) and chosen[-1] > epochs:
        raise FlagError(
            f"--save_epochs {chosen[-1]}: the run ends after epoch {epochs}; give epochs from 1 to {epochs}"
        )


def add_overwrite_flag(group: Any) -> None:
    """``--overwrite``."""
    group.add_argument("--overwrite", action="store_true", help="replace results of other settings")


def add_score_flags(parser: argparse.ArgumentParser) -> None:
    """``--scores_folder``, repeatable."""
    parser.add(ScoreConfig, "scores")
