#!/usr/bin/env python3
r"""Plot how sensitivities evolve during training, with examples ranked by the last checkpoint (Figs. 3b, 11b, 11c).

Reads {pickles_folder}/{name_exp}_evolving.pkl, written by 4_evolving_sensitivities.py. Writes
{plots_folder}/{name_exp}_evolving as PNG and PDF; with --class_cov, {name_exp}_evolving_{class_cov}.

  python examples/plot_evolving_sensitivities.py --name_exp fmnist_lenet
  python examples/plot_evolving_sensitivities.py --name_exp mnist_mlp --pickles_folder my_pickles
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes the project importable from any folder

from mpe.config import FigureConfig
from src.cli import Parser, run_script

if TYPE_CHECKING:
    from mpe.plots import StoredResult

ORDINALS = ("First", "Second", "Third", "Fourth", "Fifth", "Sixth", "Seventh", "Eighth", "Ninth", "Tenth")


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(FigureConfig, "figure")
    return parser.parse_args()


def main() -> None:
    """Parse, read, plot, print."""
    args = parse()
    from mpe.plots import StoredResult, evolving, save_and_show

    result = StoredResult(args.pickles_folder, args.name_exp, "evolving")
    sensitivities = result.array(result.of("sensitivity", args.class_cov), 2, low=0)  # (K, N)
    figure = evolving(sensitivities, checkpoints(result, len(sensitivities)))
    suffix = f"_{args.class_cov}" if args.class_cov else ""
    save_and_show(figure, args.plots_folder / f"{args.name_exp}_evolving{suffix}", args.show)


def checkpoints(result: StoredResult, count: int) -> list[str]:
    """Names of the checkpoints: the number of steps, or their order if the file does not record the steps."""
    if "steps" in result:
        steps = result.integers("steps", 0)
    elif "iterations_list" in result:
        steps = result.integers("iterations_list", 1) - 1  # files store step + 1, like the paper's code
    else:
        return [ORDINALS[k] if k < len(ORDINALS) else f"{k + 1}." for k in range(count)]
    if len(steps) != count:
        raise result.error(f"has {count} checkpoints, but {len(steps)} steps")
    return [f"Step {step:,}" for step in steps]


if __name__ == "__main__":
    run_script(main)
