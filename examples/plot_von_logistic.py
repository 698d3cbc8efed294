#!/usr/bin/env python3
r"""Plot how sensitivities evolve while VON learns a softmax regression (Fig. 11a).

Reads {pickles_folder}/{name_exp}_von.pkl, written by 7_von_logistic.py. Writes {plots_folder}/{name_exp}_von as PNG
and PDF; with --class_cov, {name_exp}_von_{class_cov}. Examples are ranked by the last checkpoint and averaged in
groups of 100.

  python examples/plot_von_logistic.py --name_exp mnist_von
  python examples/plot_von_logistic.py --name_exp mnist_von --pickles_folder my_pickles
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes the project importable from any folder

import numpy as np

from mpe.config import FigureConfig
from src.cli import Parser, run_script


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(FigureConfig, "figure", defaults={"name_exp": "mnist_von"})
    return parser.parse_args()


def main() -> None:
    """Parse, read, plot, print."""
    args = parse()
    from mpe.plots import StoredResult, evolving, save_and_show

    result = StoredResult(args.pickles_folder, args.name_exp, "von")
    sensitivities = result.array(result.of("sensitivity", args.class_cov), 2, low=0)  # (K, N)
    steps = result.integers("steps", 1)
    accuracies = result.array("test_accs", low=0, high=1)
    result.same_length(sensitivity=sensitivities, steps=steps, test_accs=accuracies)
    bins = -(-sensitivities.shape[1] // 100)
    for step, row, accuracy in zip(steps, sensitivities, accuracies, strict=True):
        share = np.sort(row)[-max(1, len(row) // 10) :].sum() / row.sum()
        print(f"update {step}: test accuracy {100 * accuracy:.1f} %, top tenth {100 * share:.0f} % of the sum")
    figure = evolving(sensitivities, [f"Update {step:,}" for step in steps], bins)
    suffix = f"_{args.class_cov}" if args.class_cov else ""
    save_and_show(figure, args.plots_folder / f"{args.name_exp}_von{suffix}", args.show)


if __name__ == "__main__":
    run_script(main)
