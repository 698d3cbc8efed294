#!/usr/bin/env python3
r"""Plot estimated sensitivities against the true deviations after retraining without each example (Fig. 2).

Reads {pickles_folder}/{name_exp}_scores.pkl and {name_exp}_retrain.pkl, written by 3_validation_sensitivities.py.
Writes {plots_folder}/{name_exp}_validation as PNG and PDF, with the suffixes _{scores_exp}, _{class_cov} and
_corrected if these flags are given. Prints the correlations with bootstrap intervals, and the slope of the line
through the origin (1 if the estimates have the size of the true deviations), also separately for the random examples
and for those spread over the range of the estimates (--n_spread). Prints the median of estimated / true deviations.

  python examples/plot_validation_sensitivities.py --name_exp mnist_mlp
  python examples/plot_validation_sensitivities.py --name_exp mnist_mlp --class_cov full --corrected
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # makes the project importable from any folder

import numpy as np

from mpe.config import FigureConfig
from src.cli import Parser, file_name, run_script
from src.errors import FileError, FlagError

if TYPE_CHECKING:
    from mpe.plots import StoredResult

LARGE = 0.001  # ratios to smaller true deviations are mostly noise


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--corrected",
        action="store_true",
        help="measure true deviations from a control retrained on all examples, instead of from the base model",
    )
    parser.add_argument(
        "--scores_exp",
        type=file_name,
        metavar="NAME",
        help="compare the estimates of this experiment, which has the same base model (default: name_exp)",
    )
    parser.add(FigureConfig, "figure", defaults={"name_exp": "mnist_mlp"})
    return parser.parse_args()


def groups(retrain: StoredResult, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Masks ``(m,)`` of the random examples and of those spread over the estimates, if there are both."""
    if "spread" not in retrain:
        return {}
    spread = retrain.integers("spread", 0, 1).astype(bool)
    retrain.same_length(indices_retrain=indices, spread=spread)
    return {"random examples": ~spread, "spread examples": spread} if spread.any() and not spread.all() else {}


def main() -> None:
    """Parse, read, plot, print."""
    args = parse()
    from mpe.estimates import correlation_text
    from mpe.plots import StoredResult, save_and_show, validation

    scores = StoredResult(args.pickles_folder, args.name_exp, "scores")
    retrain = StoredResult(args.pickles_folder, args.name_exp, "retrain")
    retrain.same_run(scores)
    if args.scores_exp:
        base = scores.values.get("base_weights")  # a hash
        scores = StoredResult(args.pickles_folder, args.scores_exp, "scores")
        if base is None or scores.values.get("base_weights") != base:
            raise FlagError(
                f"--scores_exp {args.scores_exp}: {scores.path} does not have the same base model as {args.name_exp}"
            )
    if retrain.is_empty("indices_retrain"):
        raise FileError(
            f"{retrain.path}: no model has been retrained yet; run {retrain.script} again with the same flags and "
            "--resume"
        )
    sensitivities = scores.array(scores.of("sensitivities", args.class_cov), low=0)  # (N,)
    indices = retrain.integers("indices_retrain", 0)  # (m,)
    key = "softmax_deviations" + "_corrected" * args.corrected
    if args.corrected and key not in retrain:
        raise FlagError(f"--corrected: {retrain.path} has no {key}; create them with: {retrain.command}")
    deviations = retrain.array(key, low=0)  # (m,)
    retrain.same_length(indices_retrain=indices, **{key: deviations})
    if indices.max() >= len(sensitivities):
        raise retrain.error(
            f"example {indices.max()} was left out, but {scores.path.name} has {len(sensitivities)} sensitivities"
        )

    estimated = sensitivities[indices]
    text = correlation_text(deviations, estimated)
    figure = validation(deviations, estimated, text)
    print(text.replace("\n", ", "))
    for name, chosen in groups(retrain, indices).items():
        text = correlation_text(deviations[chosen], estimated[chosen])
        print(f"{name}:", text.replace("\n", ", "))
    large = deviations > LARGE
    if large.any():
        ratio = np.median(estimated[large] / deviations[large])
        print(f"median of estimated / true {ratio:.3g} for the {large.sum()} true deviations above {LARGE:g}")
    print(f"largest true deviation {deviations.max():.3g}, largest estimate {estimated.max():.3g}")
    suffix = "".join(f"_{part}" for part in (args.scores_exp, args.class_cov) if part) + "_corrected" * args.corrected
    save_and_show(figure, args.plots_folder / f"{args.name_exp}_validation{suffix}", args.show)


if __name__ == "__main__":
    run_script(main)
