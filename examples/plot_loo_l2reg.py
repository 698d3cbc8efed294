#!/usr/bin/env python3
r"""Draw the leave-one-out estimate and the test loss against the L2 parameter (Fig. 4; with the test error, Fig. 7).

Reads {pickles_folder}/{name_exp}_cv.pkl, which 2_loo_l2reg.py writes. Writes, as PNG and PDF,
{plots_folder}/{name_exp}_cv, with --test_error {name_exp}_cv_error. Prints the parameters that the curves choose.

  python examples/plot_loo_l2reg.py --name_exp mnist_mlp
  python examples/plot_loo_l2reg.py --name_exp mnist_mlp --window 3 --test_error
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, from any current folder

import numpy as np

from mpe.config import FigureConfig
from src.artifacts.io import save_figure
from src.cli import Parser, number, run_script
from src.errors import FlagError


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    parser.add_argument("--window", type=number(int, 1), default=4, help="deltas in each mean of the moving average")
    parser.add_argument("--test_error", action="store_true", help="draw the test error too, on an axis of its own")
    parser.add(FigureConfig, "figure", defaults={"name_exp": "mnist_mlp"})
    return parser.parse_args()


def main() -> None:
    """Parse, read, draw, print."""
    args = parse()
    from mpe.plots import StoredResult, loo_l2reg, moving_average, show

    result = StoredResult(args.pickles_folder, args.name_exp, "cv")
    deltas = result.array("deltas")  # (n,), as the two below
    if (deltas <= 0).any():
        raise result.error("deltas are not all above 0")
    estimated = result.array(result.of("estimated_nll", args.class_cov))
    test_nlls = result.array("test_nlls")
    errors = 1 - result.array("test_accs", low=0, high=1) if args.test_error else None
    result.same_length(deltas=deltas, estimated_nll=estimated, test_nlls=test_nlls)
    if errors is not None:
        result.same_length(deltas=deltas, test_accs=errors)
    if len(deltas) < args.window:
        raise FlagError(
            f"--window {args.window}: {result.path} holds {len(deltas)} deltas; give at most {len(deltas)}"
        )
    order = np.argsort(deltas, kind="stable")
    deltas, estimated, test_nlls = deltas[order], estimated[order], test_nlls[order]
    errors = None if errors is None else errors[order]

    figure = loo_l2reg(deltas, estimated, test_nlls, args.window, errors)
    suffix = (f"_{args.class_cov}" if args.class_cov else "") + "_error" * args.test_error
    for name, values in (("the leave-one-out estimate", estimated), ("the test loss", test_nlls)):
        smooth = moving_average(values, args.window)
        chosen = deltas[args.window - 1 + smooth.argmin()]
        print(f"{name} is least, {smooth.min():.4f}, at delta {chosen:.4g}")
    print(*save_figure(figure, args.plots_folder / f"{args.name_exp}_cv{suffix}"), sep="\n")
    if args.show:
        show(figure)


if __name__ == "__main__":
    run_script(main)
