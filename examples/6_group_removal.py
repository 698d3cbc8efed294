#!/usr/bin/env python3
r"""Estimate the effect of removing groups of examples on their predictions and compare it with retraining (Figure 6).

A binary problem: the examples of two classes of the data set in --datasets_folder. Draws --n_groups disjoint random
groups. Estimates, with a Laplace posterior, how much the predictions on a group's members would change if the whole
group were removed (Equation 43; both forms and a Newton step). Then retrains the model without each group, many
models in parallel. Writes {pickles_folder}/{name_exp}_group.pkl, as models finish; plot_group_removal.py plots it.
Models of any size can use --var_version ggn here, but it needs memory for N^2 numbers, for N training examples.

  python 6_group_removal.py --name_exp mnist_3_5 --dataset MNIST --classes 3 5 --model small_mlp --lr 1e-3 \
      --lrmin 1e-3 --bs 32 --epochs 500 --delta 5 --group_size 16 --lr_retrain 1e-3 --lrmin_retrain 1e-3 \
      --epochs_retrain 1000
  python 6_group_removal.py --name_exp digits --dataset digits --model small_mlp --epochs 100 --lr 0.01 --lrmin 0 \
      --delta 1 --n_groups 10 --group_size 8 --lr_retrain 0.01 --lrmin_retrain 0 --epochs_retrain 100
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import mpe
from mpe.config import EXPERIMENT_FOLDERS, ONE_PROCESS, SIDE_BY_SIDE, ExperimentConfig, RetrainingConfig
from src.artifacts.paths import Folders
from src.cli import Parser, build, number, print_next, run_script
from src.datasets import DataConfig
from src.devices import ComputeConfig
from src.errors import FlagError
from src.lazy import torch
from src.models import ModelConfig

NOT_OFFERED = ("checkpoint", "class_cov", "laplace_backend", "finite_time", "hess_init", "iblr_backend")
DEFAULTS = {"name_exp": "mnist_3_5", "lr": 1e-3, "lrmin": 1e-3, "bs": 32, "epochs": 500, "delta": 5.0}
RETRAINING = {"lr_retrain": 1e-3, "lrmin_retrain": 1e-3, "epochs_retrain": 1000}
ORDERS = {"retrain_shuffle": ("seeded", "shared")}  # the paper's code, which "replay" repeats, has no such experiment


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data", defaults={"dataset": "mnist"})
    parser.add(ModelConfig, "model", only=("model",), defaults={"model": "small_mlp"})
    parser.add(ExperimentConfig, "experiment", skip=NOT_OFFERED, defaults=DEFAULTS)
    parser.add(RetrainingConfig, "retraining", defaults=RETRAINING, choices=ORDERS)
    add = parser.add_argument_group("removed groups").add_argument
    add(
        "--classes",
        type=number(int, 0),
        nargs=2,
        default=[3, 5],
        metavar=("FIRST", "SECOND"),
        help="the two classes, counted from 0; examples of other classes are not used (default: 3 5)",
    )
    add("--n_groups", type=number(int, 1), default=50, help="number of groups to remove, one at a time")
    add("--group_size", type=number(int, 1), default=16, help="number of examples in a group")
    parser.add(ComputeConfig, "computing", skip=ONE_PROCESS, choices=SIDE_BY_SIDE)
    parser.add(Folders, "folders", only=EXPERIMENT_FOLDERS)
    return parser.parse_args()


def measure_groups(images: torch.Tensor, groups: torch.Tensor) -> Callable:
    """Build the function that measures retrained models. Model 0 is the control; model i + 1 lacks group i.

    Args:
        images: All training images, normalized, on the device.
        groups: Positions ``(G, K)`` of the groups' members, on the images' device.

    Returns:
        A function of an ensemble and the numbers of its members. It returns the logit differences ``outputs``
        ``(m, K)`` of each model on the group that it lacks (NaN for the control), and ``control`` ``(1, G, K)``, the
        control's on all groups, or ``(0, G, K)`` if the control is not a member.
    """

    def difference(logits: torch.Tensor) -> np.ndarray:
        return (logits[..., 1] - logits[..., 0]).detach().double().cpu().numpy()

    def measure(ensemble, members: range) -> dict[str, np.ndarray]:
        own = groups[[max(member - 1, 0) for member in members]]
        outputs, control = difference(ensemble.member_logits(images[own])), np.empty((0, *groups.shape))
        if 0 in members:
            first = members.index(0)
            outputs[first] = np.nan
            control = np.stack([difference(ensemble.logits(images[group])[first]) for group in groups])[None]
        return {"outputs": outputs, "control": control}

    return measure


def content(
    rows: dict[str, np.ndarray], groups: np.ndarray, base: torch.Tensor, estimated: dict[str, torch.Tensor]
) -> dict:
    """The content of the result file, for the models retrained so far.

    Args:
        rows: The measurements of ``measure_groups`` for models 0, 1, ...
        groups: Original indices ``(G, K)`` of the groups' members.
        base: Logit differences ``(G, K)`` of the base model.
        estimated: For each form, estimated changes ``(G, K)`` of the predictions, see ``mpe.removed_groups``.
    """
    outputs = torch.from_numpy(rows["outputs"][1:])
    done = len(outputs)
    changes = {
        "probability_deviations": outputs.sigmoid() - base[:done].sigmoid(),
        "probability_deviations_corrected": outputs.sigmoid() - torch.from_numpy(rows["control"][0, :done]).sigmoid(),
        **{f"estimated_deviations_{form}": change[:done] for form, change in estimated.items()},
    }
    found = {name: change.numpy() for name, change in changes.items()}
    sums = {name.replace("probability", "softmax"): np.abs(change).sum(1) for name, change in found.items()}
    sums = {name.replace("estimated_deviations", "sensitivities"): values for name, values in sums.items()}
    return {**sums, **found, "groups": groups[:done], "base_probabilities": base[:done].sigmoid().numpy()}


def main() -> None:
    """Configure, train, estimate, retrain, save, print."""
    args = parse()
    config = build(ExperimentConfig, args)
    retraining = build(RetrainingConfig, args)
    data, compute, folders = build(DataConfig, args), build(ComputeConfig, args), build(Folders, args)
    from mpe.experiment import Experiment
    from mpe.retraining import check_retraining, retrain_without
    from src.training.ensemble import Ensemble

    experiment = Experiment(config, data, compute, folders, "group", vars(args), classes=args.classes)
    count, wanted = experiment.count, args.n_groups * args.group_size
    if wanted > count or args.group_size == count:
        raise FlagError(
            f"--n_groups {args.n_groups} and --group_size {args.group_size}: groups are disjoint and do not contain "
            f"all examples, but there are {count} training examples of these classes; give fewer or smaller groups"
        )
    check_retraining(experiment, retraining, [count, count - args.group_size])
    experiment.check_variances(dense=False)
    result = experiment.result()

    last = experiment.train_base().history[-1]
    drawn = np.random.RandomState(config.seed).permutation(count)[:wanted]
    groups = torch.from_numpy(drawn.reshape(args.n_groups, args.group_size))
    images = experiment.prepared(experiment.train)
    measure = measure_groups(images, groups.to(images.device))
    base = torch.from_numpy(measure(Ensemble(experiment.model, 1), range(1))["control"][0])
    covariances = experiment.group_covariances(config.delta, groups)
    estimated = mpe.removed_groups(covariances, base, experiment.train.labels.cpu()[groups])
    indices = experiment.train.indices.cpu()[groups].numpy()

    def write(rows: dict[str, np.ndarray]) -> None:
        result.write(
            **content(rows, indices, base, estimated), test_acc=last["test_accuracy"], test_nll=last["test_loss"]
        )

    removed = [np.empty(0, np.int64), *groups.numpy()]
    write(retrain_without(experiment, retraining, images, removed, measure, write))
    train_loss, train_accuracy = last["train_loss"], last["train_accuracy"]
    print(f"{count} training examples: accuracy {100 * train_accuracy:.2f} %, NLL {train_loss:.6f}")
    print(f"test accuracy {100 * last['test_accuracy']:.2f} %, NLL {last['test_loss']:.6f}")
    print(result.path)
    print_next("plot_group_removal.py", ["pickles_folder"], name_exp=config.name_exp)


if __name__ == "__main__":
    run_script(main, flags={"batch_size": "bs"})
