#!/usr/bin/env python3
r"""Draw estimated sensitivities against the deviations that retraining without each example shows (Fig. 2).

Reads {pickles_folder}/{name_exp}_scores.pkl and {name_exp}_retrain.pkl, which 3_validation_sensitivities.py writes.
Writes, as PNG and PDF, {plots_folder}/{name_exp}_validation, with _{class_cov} and _corrected where asked for.
Prints the correlations.

  python examples/plot_validation_sensitivities.py --name_exp mnist_mlp
  python examples/plot_validation_sensitivities.py --name_exp mnist_mlp --class_cov full --corrected
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, from any current folder

from mpe.figure_parts import show
from mpe.plots import correlations, validation
from mpe.stored import StoredResult
from src.artifacts import save_figure
from src.errors import FlagError
from src.scripting import Parser, run_script, start_logging
from src.settings.mpe_plots import add_class_cov_flag, add_experiment_flag, add_figure_flags


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    add_experiment_flag(parser, "mnist_mlp")
    add_class_cov_flag(parser)
    parser.add_argument(
        "--corrected",
        action="store_true",
        help="take true deviations from a control, retrained with every example, in place of the network before",
    )
    add_figure_flags(parser)
    return parser.parse_args()


def main() -> None:
    """Parse, read, draw, print."""
    args = parse()
    start_logging()
    scores = StoredResult(args.pickles_folder, args.name_exp, "scores")
    retrain = StoredResult(args.pickles_folder, args.name_exp, "retrain")
    sensitivities = scores.array(scores.of("sensitivities", args.class_cov), low=0)  # (N,)
    indices = retrain.integers("indices_retrain", 0)  # (m,)
    key = "softmax_deviations" + "_corrected" * args.corrected
    if args.corrected and key not in retrain:
        raise FlagError(f"--corrected: {retrain.path} has no {key}; {retrain.command} makes them")
    deviations = retrain.array(key, low=0)  # (m,)
    retrain.same_length(indices_retrain=indices, **{key: deviations})
    if indices.max() >= len(sensitivities):
        raise retrain.error(
            f"example {indices.max()} was left out, but {scores.path.name} holds {len(sensitivities)} sensitivities"
        )

    figure = validation(deviations, sensitivities[indices])
    print(correlations(deviations, sensitivities[indices]).replace("\n", ", "))
    suffix = (f"_{args.class_cov}" if args.class_cov else "") + "_corrected" * args.corrected
    print(*save_figure(figure, args.plots_folder / f"{args.name_exp}_validation{suffix}"), sep="\n")
    if args.show:
        show(figure)


if __name__ == "__main__":
    run_script(main)
