#!/usr/bin/env python3
r"""Compute neural tangent kernels of groups of examples ordered by a score, and how fast they change per epoch.

Reads the checkpoints of epochs t and t + 1 that train_full.py wrote under --models_folder, and the score's file.
Writes to {ntk_folder}/{dataset}/{model}_with_{optimizer}_sched_{lr_sched}/{metric}/epoch_{e}/seed_{s}/ the kernels
l_index_{rank}/m_{m}/k.pkl (float32 arrays, example by example, class by class) and the velocities vs.pkl (rank of the
group's first example -> velocity), each with a json record. Stored results are reused; to continue an interrupted
run, repeat the command. plot_ntk.py plots the velocities.
With --checkpoint A B, measures two files instead, checkpoints or state dicts from elsewhere, and writes to
{ntk_folder}/{dataset}/{model}_checkpoints/{metric}/checkpoints_{8 digits of the sha256 of A}_{of B}/file_{1,2}/.

  python compute_ntk.py --dataset=digits --model=lenet --ntk_chosen_metric=samis_loss --m_samples=20 \
      --ntk_velocity_epoch 1 5 --seeds 1
  python compute_ntk.py --dataset=cifar100 --model=resnet18 --ntk_chosen_metric=mem --m_samples=50
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from src.artifacts.paths import Folders
from src.cli import FULL_DATA_FLAGS, Parser, build, print_next, restrict, run_script
from src.curvature.config import FLOAT_PRECISIONS, NOT_FILE, NtkConfig
from src.datasets import DataConfig
from src.devices import TRAINING_ONLY, ComputeConfig
from src.metrics import Proxy, get_score
from src.metrics.compare import spearman
from src.metrics.proxy import ScoreConfig, score_folders
from src.models import ModelConfig

if TYPE_CHECKING:
    from src.context import RunContext


def parse() -> Namespace:
    """Parse and check the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data")
    parser.add(ModelConfig, "model", only=("model",), defaults={"model": "resnet18"})
    of_runs = ("optimizer", "lr_sched", "seeds", "checkpoint")
    parser.add(NtkConfig, "model", only=of_runs)
    parser.add(NtkConfig, "kernels", skip=of_runs)
    parser.add(ScoreConfig, "scores")
    parser.add(ComputeConfig, "computing", skip=TRAINING_ONLY, choices={"precision": FLOAT_PRECISIONS})
    parser.add(Folders, "folders", only=("datasets_folder", "models_folder", "metrics_folder", "ntk_folder"))
    parser.accept_paper_flags()
    restrict(parser, {("--optimizer", "--lr_sched"): NOT_FILE})
    return parser.parse_args()


def main() -> None:
    """Parse, find the models, log the expected cost, compute, save, print."""
    args = parse()
    config, folders = build(NtkConfig, args), build(Folders, args)
    data, compute = build(DataConfig, args), build(ComputeConfig, args)
    get_score(config.ntk_chosen_metric, folders_to_search(args))
    from src.context import RunContext
    from src.curvature.ntk import KernelVelocities

    context = RunContext(data, compute, folders.datasets_folder)
    ranked, scores = ranking(args, context)
    run = KernelVelocities(config, context, folders.models_folder, folders.ntk_folder, ranked, scores)
    found = run.compute()
    if config.checkpoint is not None:
        for lower, value in zip(run.lowers, found[0][0], strict=True):
            print(f"rank {lower}: velocity {value:.4g}")
        print(run.folder(0, 0).parent)
        return
    report(found, run.lowers)
    print(run.folder(run.seeds[0], run.epochs[0]).parents[1])
    print_next(
        "plot_ntk.py",
        [*FULL_DATA_FLAGS, "ntk_folder", "model", "optimizer", "lr_sched"],
        metrics=[config.ntk_chosen_metric],
        epochs=run.epochs,
        seeds=run.seeds,
    )


def ranking(args: Namespace, context: RunContext) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the scored examples from lowest to highest score (ties by index), and all scores."""
    train = context.full_train
    proxy = Proxy(
        args.ntk_chosen_metric,
        context.entry.name,
        folder=folders_to_search(args),
        n=train.total,
        label_hash=context.label_hash,
        data_hash=train.digest,
    )
    ranked = proxy.get_sorted_indices()
    return ranked[np.isin(ranked, context.train.indices.cpu().numpy())], proxy.scores


def folders_to_search(args: Namespace) -> list[Path] | None:
    """The folders to search for the score's file; None for the default folders."""
    return score_folders(args.scores_folder, args.ntk_chosen_metric, args.metrics_folder)


def report(found: dict[int, np.ndarray], lowers: list[int]) -> None:
    """Print the velocities of the first and last group, and whether velocity increases with the score."""
    for epoch, values in found.items():  # (seeds, groups)
        line = f"epoch {epoch}: velocity {values[:, 0].mean():.4g} at rank {lowers[0]}"
        if len(lowers) > 1:
            line += f", {values[:, -1].mean():.4g} at rank {lowers[-1]}"
        if len(lowers) > 2:
            line += f", Spearman of mean velocity and rank {spearman(np.arange(len(lowers)), values.mean(0)):.2f}"
        print(f"{line}" + (f" (mean over {len(values)} seeds)" if len(values) > 1 else ""))


if __name__ == "__main__":
    run_script(main, {"mode": "ntk_chosen_metric"})
