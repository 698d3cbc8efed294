#!/usr/bin/env python3
r"""Plot the velocity of neural tangent kernels against the scores of their examples: one line per epoch.

Reads the velocities that compute_ntk.py wrote under --ntk_folder. Lines are means over seeds; bands show one standard
deviation in each direction. Writes {plots_folder}/ntk/{dataset}/velocity_{run}_{metrics} as PNG and PDF, and prints
Spearman's correlation between velocity and rank.

  python plot_ntk.py --dataset=digits --model=lenet --metrics samis_loss
  python plot_ntk.py --dataset=cifar10 --model=resnet8 --metrics samis_loss forg --log
"""

from argparse import Namespace

import numpy as np

from src.artifacts.io import save_figure
from src.artifacts.paths import Folders, ntk_run, ntk_run_folder, velocity_figure_stem
from src.cli import SEED, SUBSET_FLAGS, Parser, build, number, run_script
from src.curvature.config import TrainedRunConfig
from src.curvature.results import Velocities, read_velocities
from src.datasets import DataConfig, dataset_name
from src.errors import ArgumentError, FileError
from src.metrics import SCORES
from src.metrics.compare import spearman
from src.metrics.registry import score_entry, score_name
from src.models import ModelConfig


def parse() -> Namespace:
    """Parse and check the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data", skip=SUBSET_FLAGS)
    parser.add(ModelConfig, "model", only=("model",), defaults={"model": "resnet18"})
    parser.add(TrainedRunConfig, "model")
    group = parser.add_argument_group("figure")
    add = group.add_argument
    add(
        "--metrics",
        nargs="+",
        type=score_name,
        default=["mem"],
        metavar="MODE",
        help=f"scores that order the examples, one panel each: {', '.join(SCORES)}, or registered ones",
    )
    add("--epochs", type=number(int, 1), nargs="+", help="epochs to plot (default: all found)")
    add("--seeds", type=SEED, nargs="+", help="seeds to average (default: all found)")
    add("--log", action="store_true", help="use a logarithmic velocity axis")
    parser.add(Folders, "folders", only=("datasets_folder", "ntk_folder", "plots_folder"))
    return parser.parse_args()


def main() -> None:
    """Parse, read, plot, print."""
    args = parse()
    build(DataConfig, args)  # checks the data flags
    name = dataset_name(args.dataset)
    for metric in args.metrics:
        if metric not in SCORES and not any((args.ntk_folder / name).glob(f"*/{metric}")):
            raise ArgumentError(
                "metrics", f"{metric}: neither a built-in score nor in {args.ntk_folder / name}; see --help"
            )
    from src.curvature.plots import velocity_figure

    run = ntk_run(args.model, args.optimizer, schedule(args, name))
    found = {
        metric: read_velocities(ntk_run_folder(args.ntk_folder, name, run, metric), args.epochs, args.seeds)
        for metric in dict.fromkeys(args.metrics)
    }
    for metric, several in found.items():
        report(metric, several)
    panels = [(score_entry(metric).symbol, several) for metric, several in found.items()]
    size = f"{args.model} trained with {args.optimizer.upper()}"
    figure = velocity_figure(panels, f"{name}, {size}", logarithmic=args.log)
    print(*save_figure(figure, velocity_figure_stem(args.plots_folder, name, run, list(found), args.log)), sep="\n")


def schedule(args: Namespace, dataset: str) -> str:
    """The requested schedule, or the only one found."""
    if args.lr_sched is not None:
        return args.lr_sched
    before = ntk_run(args.model, args.optimizer, "")
    found = sorted(folder.name.removeprefix(before) for folder in (args.ntk_folder / dataset).glob(f"{before}*"))
    if not found:
        raise FileError(
            f"{args.ntk_folder / dataset}: has no kernels for {args.model} trained with {args.optimizer}; "
            "compute them with compute_ntk.py"
        )
    if len(found) > 1:
        raise ArgumentError("lr_sched", f": found runs with {len(found)} schedules; choose one of {', '.join(found)}")
    return found[0]


def report(metric: str, several: list[Velocities]) -> None:
    """Print whether the velocity increases with the score."""
    for velocities in several:
        ranks = np.arange(len(velocities.lowers))
        per_seed = [spearman(ranks, values) for values in velocities.values]
        mean = velocities.values.mean(0)
        seeds = f" (single seeds: {min(per_seed):.2f} to {max(per_seed):.2f})" if len(per_seed) > 1 else ""
        print(
            f"{metric}, epoch {velocities.epoch}: Spearman of mean velocity and rank "
            f"{spearman(ranks, mean):.2f}{seeds}, lowest group {mean[0]:.4g}, highest {mean[-1]:.4g}"
        )


if __name__ == "__main__":
    run_script(main)
