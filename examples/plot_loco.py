#!/usr/bin/env python3
r"""Plot the estimated loss of each class against the test loss after retraining without it (Figs. 3a, 11d).

Reads {pickles_folder}/{name}_leaveclassout.pkl of each experiment, written by 5_loco.py. Writes
{plots_folder}/{plot_name}_leaveclassout as PNG and PDF; with --class_cov, {plot_name}_leaveclassout_{class_cov}.
Numbers denote classes. The marker size shows the drop in test accuracy if the class is removed.

  python examples/plot_loco.py --names_exp fmnist_mlp fmnist_lenet --plot_name fmnist
  python examples/plot_loco.py --names_exp fmnist_small_mlp --plot_name small --labels "MLP (32, 16)"
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes the project importable from any folder

import numpy as np

from mpe.config import FigureConfig
from src.cli import Parser, file_name, run_script
from src.errors import FlagError

if TYPE_CHECKING:
    from mpe.plots import LeaveClassOut, StoredResult

log = logging.getLogger("plot_loco")


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--names_exp",
        nargs="+",
        type=file_name,
        default=["fmnist_mlp", "fmnist_lenet"],
        metavar="NAME",
        help="names of the experiments (default: fmnist_mlp fmnist_lenet)",
    )
    parser.add_argument("--plot_name", type=file_name, default="fmnist", metavar="NAME", help="name of the figure")
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="TEXT",
        help="legend labels (default: the models if they all differ, otherwise the experiments' names)",
    )
    parser.add(FigureConfig, "figure", skip=("name_exp",))
    args = parser.parse_args()
    if args.labels and len(args.labels) != len(args.names_exp):
        raise FlagError(
            f"--labels: {len(args.labels)} labels for {len(args.names_exp)} experiments; give one per experiment"
        )
    return args


def main() -> None:
    """Parse, read, plot, print."""
    args = parse()
    from mpe.plots import StoredResult, loco, save_and_show

    results = [StoredResult(args.pickles_folder, name, "leaveclassout") for name in args.names_exp]
    labels = args.labels or legend_labels(results)
    figure = loco([read(result, label, args.class_cov) for result, label in zip(results, labels, strict=True)])
    suffix = f"_{args.class_cov}" if args.class_cov else ""
    save_and_show(figure, args.plots_folder / f"{args.plot_name}_leaveclassout{suffix}", args.show)


def legend_labels(results: list[StoredResult]) -> list[str]:
    """The experiments' models if all are stored and differ; otherwise the experiments' names."""
    models = [result.setting("model") for result in results]
    if all(isinstance(model, str) for model in models) and len(set(models)) == len(models):
        return models
    return [result.name for result in results]


def read(result: StoredResult, label: str, class_cov: str | None) -> LeaveClassOut:
    """The classes of an experiment that have results. Others have no examples, or are not retrained yet."""
    from mpe.plots import LeaveClassOut

    estimated = result.array(result.of("est_nll", class_cov), gaps=True)  # (C,), like the next two
    test_nlls = result.array("perturb_nll", gaps=True)
    drops = result.array("org_acc", 0, low=0, high=1) - result.array("perturb_acc", low=0, high=1, gaps=True)
    result.same_length(est_nll=estimated, perturb_nll=test_nlls, perturb_acc=drops)
    known = np.flatnonzero(~np.isnan(estimated + test_nlls + drops))
    if len(known) == 0:
        raise result.error("has no class with complete results yet")
    if len(known) < len(drops):
        log.warning("%s: %d of %d classes have results", result.path, len(known), len(drops))
    return LeaveClassOut(label, known, test_nlls[known], estimated[known], drops[known])


if __name__ == "__main__":
    run_script(main)
