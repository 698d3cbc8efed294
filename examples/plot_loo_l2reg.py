#!/usr/bin/env python3
r"""Plot the leave-one-out estimate and the test loss against the L2 parameter (Fig. 4; with the test error, Fig. 7).

Reads {pickles_folder}/{name_exp}_cv.pkl, written by 2_loo_l2reg.py. Writes {plots_folder}/{name_exp}_cv as PNG and
PDF; with --test_error, {name_exp}_cv_error. Prints the parameter at the minimum of each curve.

  python examples/plot_loo_l2reg.py --name_exp mnist_mlp
  python examples/plot_loo_l2reg.py --name_exp mnist_mlp --window 3 --test_error
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes the project importable from any folder

import numpy as np

from mpe.config import FigureConfig
from src.cli import Parser, number, run_script
from src.errors import FlagError


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add_argument("--window", type=number(int, 1), default=4, help="window of the moving average, in deltas")
    parser.add_argument("--test_error", action="store_true", help="also plot the test error, on a second axis")
    parser.add(FigureConfig, "figure", defaults={"name_exp": "mnist_mlp"})
    return parser.parse_args()


def main() -> None:
    """Parse, read, plot, print."""
    args = parse()
    from mpe.plots import StoredResult, loo_l2reg, moving_average, save_and_show

    result = StoredResult(args.pickles_folder, args.name_exp, "cv")
    columns = {  # each (n,)
        "deltas": result.array("deltas"),
        "estimated_nll": result.array(result.of("estimated_nll", args.class_cov)),
        "test_nlls": result.array("test_nlls"),
    }
    if args.test_error:
        columns["test_accs"] = result.array("test_accs", low=0, high=1)
    if (columns["deltas"] <= 0).any():
        raise result.error("deltas are not all positive")
    result.same_length(**columns)
    order = np.argsort(columns["deltas"], kind="stable")
    deltas, estimated, test_nlls, *accuracies = (values[order] for values in columns.values())
    if len(deltas) < args.window:
        raise FlagError(
            f"--window {args.window}: {result.path} has only {len(deltas)} deltas; give at most {len(deltas)}"
        )

    figure = loo_l2reg(deltas, estimated, test_nlls, args.window, 1 - accuracies[0] if accuracies else None)
    suffix = (f"_{args.class_cov}" if args.class_cov else "") + "_error" * args.test_error
    for name, values in (("the leave-one-out estimate", estimated), ("the test loss", test_nlls)):
        smooth = moving_average(values, args.window)
        chosen = deltas[args.window - 1 + smooth.argmin()]
        print(f"minimum of {name}: {smooth.min():.4f} at delta {chosen:.4g}")
    save_and_show(figure, args.plots_folder / f"{args.name_exp}_cv{suffix}", args.show)


if __name__ == "__main__":
    run_script(main)
