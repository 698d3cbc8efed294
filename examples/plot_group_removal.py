#!/usr/bin/env python3
r"""Plot estimated against true deviations of the predictions on removed groups of examples (Fig. 6).

Reads {pickles_folder}/{name_exp}_group.pkl, written by 6_group_removal.py. Writes {plots_folder}/{name_exp}_group as
PNG and PDF, with the suffix _corrected if this flag is given. Prints the correlations with bootstrap intervals, and
the ratio of estimated to true deviations. A deviation is the sum over the group's members of the absolute change of
their predicted probability.

  python examples/plot_group_removal.py --name_exp mnist_3_5
  python examples/plot_group_removal.py --name_exp mnist_3_5 --corrected --forms full diag woodbury
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
    parser.add_argument(
        "--forms",
        choices=CLASS_COVARIANCES,
        nargs="+",
        default=["full", "diag"],
        help="estimates to plot: full and diag, the forms of Equation 43; woodbury, a Newton step without the group "
        "(default: full diag)",
    )
    parser.add_argument(
        "--corrected",
        action="store_true",
        help="measure true deviations from a control retrained on all examples, instead of from the base model",
    )
    parser.add(FigureConfig, "figure", skip=("class_cov",), defaults={"name_exp": "mnist_3_5"})
    return parser.parse_args()


def main() -> None:
    """Parse, read, plot, print."""
    args = parse()
    from mpe.estimates import correlation_intervals, correlation_text
    from mpe.plots import StoredResult, group_removal, save_and_show
    from src.errors import FileError

    result = StoredResult(args.pickles_folder, args.name_exp, "group")
    suffix = "_corrected" * args.corrected
    if result.is_empty("softmax_deviations"):
        raise FileError(
            f"{result.path}: no model has been retrained yet; run {result.script} again with the same flags and "
            "--resume"
        )
    true = result.array(f"softmax_deviations{suffix}", low=0)  # (G,)
    forms = {form: result.array(f"sensitivities_{form}", low=0) for form in args.forms}
    result.same_length(true=true, **forms)
    estimates = {}
    for form, estimated in forms.items():
        ratio = f"median of estimated / true {np.median(estimated / true):.2f}"
        print(f"{form}: {correlation_text(true, estimated)}\n{ratio}".replace("\n", ", "))
        rank = correlation_intervals(true, estimated)["Spearman"].value
        estimates[f"{form}\nSpearman {rank:.2f}"] = estimated
    figure = group_removal(true, estimates)
    save_and_show(figure, args.plots_folder / f"{args.name_exp}_group{suffix}", args.show)


if __name__ == "__main__":
    run_script(main)
