#!/usr/bin/env python3
r"""Plot the leave-one-out estimate and the test loss during training (Figs. 1b, 5, 8, 9, 10).

Reads {pickles_folder}/{name_exp}_iter.pkl, written by 1_loo_iterations.py. Writes {plots_folder}/{name_exp}_iter as
PNG and PDF; with --class_cov, {name_exp}_iter_{class_cov}.

  python examples/plot_loo_iterations.py --name_exp fmnist_lenet_iblr
  python examples/plot_loo_iterations.py --name_exp fmnist_lenet_sgd_kfac --class_cov diag full
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes the project importable from any folder

import numpy as np

from mpe.config import CLASS_COVARIANCES, FigureConfig
from src.cli import Parser, run_script


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(FigureConfig, "figure", skip=("class_cov",), defaults={"name_exp": "fmnist_lenet_sgd_kfac"})
    parser.add_argument(
        "--class_cov",
        choices=CLASS_COVARIANCES,
        nargs="+",
        help="plot estimates with these covariances between classes (default: the setting of the experiment)",
    )
    return parser.parse_args()


def main() -> None:
    """Parse, read, plot, print."""
    args = parse()
    from mpe.plots import StoredResult, loo_iterations, save_and_show

    result = StoredResult(args.pickles_folder, args.name_exp, "iter")
    test_nlls = result.array("test_nlls")  # (E,)
    epochs = result.integers("epochs", 1, len(test_nlls))  # (k,)
    if (np.diff(epochs) <= 0).any():
        raise result.error("epochs are not ascending")
    class_covs = list(dict.fromkeys(args.class_cov or [None]))
    estimates = {str(name): result.array(result.of("estimated_nll", name)) for name in class_covs}  # each (k,)
    result.same_length(epochs=epochs, **{f"estimates of {name}": values for name, values in estimates.items()})

    figure = loo_iterations(epochs, estimates, test_nlls)
    suffix = "_".join(["", *class_covs]) if args.class_cov else ""
    save_and_show(figure, args.plots_folder / f"{args.name_exp}_iter{suffix}", args.show)


if __name__ == "__main__":
    run_script(main)
