#!/usr/bin/env python3
r"""Draw the leave-one-out estimate beside the test loss during training (Figs. 1b, 5, 8, 9, 10).

Reads {pickles_folder}/{name_exp}_iter.pkl, which 1_loo_iterations.py writes. Writes, as PNG and PDF,
{plots_folder}/{name_exp}_iter, with --class_cov {name_exp}_iter_{class_cov}.

  python examples/plot_loo_iterations.py --name_exp fmnist_lenet_iblr
  python examples/plot_loo_iterations.py --name_exp fmnist_lenet_sgd_kfac --class_cov diag full
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, from any current folder

import numpy as np

from mpe.results import StoredResult
from src.artifacts import save_figure
from src.cli import Parser, run_script
from src.settings.experiments import add_class_cov_flag, add_experiment_flag, add_figure_flags


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    add_experiment_flag(parser, "fmnist_lenet_sgd_kfac")
    add_class_cov_flag(parser, several=True)
    add_figure_flags(parser)
    return parser.parse_args()


def main() -> None:
    """Parse, read, draw, print."""
    args = parse()
    from mpe.plots import loo_iterations, show

    result = StoredResult(args.pickles_folder, args.name_exp, "iter")
    test_nlls = result.array("test_nlls")  # (E,)
    epochs = result.integers("epochs", 1, len(test_nlls))  # (k,)
    if (np.diff(epochs) <= 0).any():
        raise result.error("epochs do not ascend")
    class_covs = list(dict.fromkeys(args.class_cov or [None]))
    estimates = {str(name): result.array(result.of("estimated_nll", name)) for name in class_covs}  # each (k,)
    result.same_length(epochs=epochs, **{f"estimates of {name}": values for name, values in estimates.items()})

    figure = loo_iterations(epochs, estimates, test_nlls)
    suffix = "_".join(["", *class_covs]) if args.class_cov else ""
    print(*save_figure(figure, args.plots_folder / f"{args.name_exp}_iter{suffix}"), sep="\n")
    if args.show:
        show(figure)


if __name__ == "__main__":
    run_script(main)
