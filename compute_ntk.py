#!/usr/bin/env python3
r"""Neural tangent kernels of groups of examples ordered by a score, and how fast they turn from epoch t to t + 1.

Reads checkpoints of epochs t and t + 1 that train_full.py wrote under --models_folder, and the score's file. Writes
under {ntk_folder}/{dataset}/{model}_with_{optimizer}_sched_{lr_sched}/{metric}/epoch_{e}/seed_{s}/ the kernels
l_index_{rank}/m_{m}/k.pkl (float32 arrays, sample by sample, class by class) and the velocities vs.pkl (rank of the
group's first example -> velocity), each with a json beside it. What is there already is not computed again, so an
interrupted run goes on where it was. plot_ntk.py draws the velocities.

  python compute_ntk.py --dataset=digits --model=lenet --ntk_chosen_metric=samis_loss --m_samples=20 \
      --ntk_velocity_epoch 1 5 --seeds 1
  python compute_ntk.py --dataset=cifar100 --model=resnet18 --ntk_chosen_metric=mem --m_samples=50
"""

from __future__ import annotations

import logging
from argparse import BooleanOptionalAction, Namespace
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from src.cli import Parser, print_next, restrict, run_script
from src.curvature.choices import CHECKED, NTK_CLASS_NAMES
from src.datasets import parse_subset
from src.errors import FlagError
from src.metrics import SCORES, Proxy
from src.metrics.compare import spearman
from src.optimizers import OPTIMIZERS, SCHEDULES
from src.settings import (
    SEED,
    add_compute_flags,
    add_data_flags,
    add_folder_flags,
    add_model_choice,
    add_overwrite_flag,
    add_score_flags,
    number,
    score_folders,
)

if TYPE_CHECKING:
    from src.trained import TrainedNetworks

log = logging.getLogger("compute_ntk")


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    add_data_flags(parser)
    group = add_model_choice(parser, default="resnet18")
    add = group.add_argument
    add("--optimizer", choices=tuple(OPTIMIZERS), default="sgd", help="optimiser of the runs")
    add("--lr_sched", choices=tuple(SCHEDULES), help="schedule in the runs' names (default: the only one there is)")
    add("--seeds", type=SEED, nargs="+", default=[2026, 4113, 5977, 7481, 9833], help="seeds of the runs")
    group = parser.add_argument_group("kernels")
    add = group.add_argument
    add(
        "--ntk_chosen_metric",
        choices=tuple(SCORES),
        default="mem",
        metavar="MODE",
        help=f"the score that orders the examples, of {', '.join(SCORES)}",
    )
    add("--m_samples", type=number(int, 1), default=50, help="examples of a group")
    add(
        "--lower_index",
        type=number(int, 0),
        nargs="+",
        help="ranks of the groups' first examples, from 0, the lowest score (default: the paper's, or 20 groups)",
    )
    add(
        "--ntk_velocity_epoch",
        type=number(int, 1),
        nargs="+",
        help="epochs t; checkpoints of t and t + 1 are read (default: the paper's, or 1 5 10 20)",
    )
    add(
        "--ntk_classes",
        choices=NTK_CLASS_NAMES,
        default="all",
        help="gradients of all logits, or, cheaper, of their sum or of the true label's logit alone",
    )
    add(
        "--projection_dim",
        type=number(int, 1),
        help="estimate kernels from a random sketch of this many numbers per gradient; its error is measured on "
        f"{CHECKED} examples and printed (default: exact)",
    )
    add("--projection_seed", type=SEED, default=0, help="seed of the sketch")
    add("--memory_mb", type=number(float, 0, open_low=True), default=2048.0, help="MiB kept of a group's examples")
    add(
        "--keep_kernels",
        action=BooleanOptionalAction,
        default=True,
        help="store the kernels; otherwise the velocities alone",
    )
    exact = (lambda args: args.projection_dim is not None, "without --projection_dim: kernels are exact")
    restrict(group, {("--projection_seed",): exact})
    add_overwrite_flag(group)
    add_score_flags(parser)
    add_compute_flags(parser, precisions=("fp32", "tf32", "fp64"))
    add_folder_flags(parser, "datasets", "models", "metrics", "ntk")
    parser.accept_paper_flags()
    return parser.parse_args()


def main() -> None:
    """Parse, find the networks, say what it takes, compute, save, print."""
    args = parse()
    from src.curvature.ntk import lower_indices, refuse_groups, velocity_epochs
    from src.curvature.ntk_runs import Kernels
    from src.trained import TrainedNetworks

    networks = TrainedNetworks(args)
    ranked, scores = ranking(args, networks)
    lowers = sorted(set(args.lower_index or lower_indices(networks.train.entry.name, len(ranked), args.m_samples)))
    problem = refuse_groups(lowers, args.m_samples, len(ranked))
    if problem is not None:
        raise FlagError(problem)
    epochs = sorted(set(args.ntk_velocity_epoch or velocity_epochs(networks.train.entry.name)))
    kernels = Kernels(args, networks, ranked, scores, epochs, lowers)
    found: dict[int, list[dict[int, float]]] = {epoch: [] for epoch in epochs}
    with tqdm(total=len(kernels.seeds) * len(epochs) * len(lowers), unit="velocity", disable=None) as bar:
        for seed in kernels.seeds:
            for epoch in epochs:
                found[epoch].append(kernels.velocities(seed, epoch, bar))
    report(found, lowers)
    print(kernels.files.velocities(kernels.seeds[0], epochs[0]).parents[2])
    print_next(
        "plot_ntk.py",
        ("dataset", "image_size", "channels", "datasets_folder", "ntk_folder", "model", "optimizer", "lr_sched"),
        metrics=[args.ntk_chosen_metric],
        epochs=epochs,
        seeds=kernels.seeds,
    )


def ranking(args: Namespace, networks: TrainedNetworks) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the scored examples, from the lowest score to the highest (ties by index), and all scores."""
    train = networks.train
    proxy = Proxy(
        args.ntk_chosen_metric,
        train.entry.name,
        folder=score_folders(args.scores_folder, args.ntk_chosen_metric, args.metrics_folder),
        n=train.total,
        label_hash=networks.labels,
        data_hash=train.digest,
    )
    ranked = proxy.get_sorted_indices()
    if args.subset is not None:
        ranked = ranked[np.isin(ranked, parse_subset(args.subset, train.total, train.labels.cpu().numpy()))]
    return ranked, proxy.scores


def report(found: dict[int, list[dict[int, float]]], lowers: list[int]) -> None:
    """Print the velocities of the first and the last group, and whether they grow with the score."""
    for epoch, per_seed in found.items():
        values = np.array([[velocities[lower] for lower in lowers] for velocities in per_seed])  # (seeds, groups)
        line = f"epoch {epoch}: velocity {values[:, 0].mean():.4g} at rank {lowers[0]}"
        if len(lowers) > 1:
            line += f", {values[:, -1].mean():.4g} at rank {lowers[-1]}"
        if len(lowers) > 2:
            line += f", Spearman of the mean and the rank {spearman(np.arange(len(lowers)), values.mean(0)):.2f}"
        print(f"{line}" + (f" (mean of {len(values)} seeds)" if len(values) > 1 else ""))


if __name__ == "__main__":
    run_script(main)
