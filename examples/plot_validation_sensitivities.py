#!/usr/bin/env python3
r"""Draw estimated sensitivities against the deviations that retraining without each example shows (Fig. 2).

Reads {pickles_folder}/{name_exp}_scores.pkl and {name_exp}_retrain.pkl, which 3_validation_sensitivities.py writes.
Writes, as PNG and PDF, {plots_folder}/{name_exp}_validation, with _{class_cov} and _corrected where asked for.
Prints the correlations with bootstrap intervals; those of the random examples and of the
ones spread over the estimates' range (--n_spread) also apart.

  python examples/plot_validation_sensitivities.py --name_exp mnist_mlp
  python examples/plot_validation_sensitivities.py --name_exp mnist_mlp --class_cov full --corrected
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, from any current folder

import numpy as np

from mpe.config import FigureConfig
from src.cli import Parser, run_script
from src.errors import FileError, FlagError

if TYPE_CHECKING:
    from mpe.plots import StoredResult


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--corrected",
        action="store_true",
        help="take true deviations from a control, retrained with every example, in place of the model before",
    )
    parser.add(FigureConfig, "figure", defaults={"name_exp": "mnist_mlp"})
    return parser.parse_args()


def groups(retrain: StoredResult, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The examples drawn at random and those spread over the estimates, masks ``(m,)``, where there are both."""
    if "spread" not in retrain:
        return {}
    spread = retrain.integers("spread", 0, 1).astype(bool)
    retrain.same_length(indices_retrain=indices, spread=spread)
    return {"random examples": ~spread, "spread examples": spread} if spread.any() and not spread.all() else {}


def main() -> None:
    """Parse, read, draw, print."""
    args = parse()
    from mpe.estimates import correlation_text
    from mpe.plots import StoredResult, save_and_show, validation

    scores = StoredResult(args.pickles_folder, args.name_exp, "scores")
    retrain = StoredResult(args.pickles_folder, args.name_exp, "retrain")
    retrain.same_run(scores)
    if retrain.is_empty("indices_retrain"):
        raise FileError(
            f"{retrain.path}: no model is retrained yet; repeat {retrain.script} as it was run, with --resume"
        )
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

    estimated = sensitivities[indices]
    text = correlation_text(deviations, estimated)
    figure = validation(deviations, estimated, text)
    print(text.replace("\n", ", "))
    for name, chosen in groups(retrain, indices).items():
        text = correlation_text(deviations[chosen], estimated[chosen])
        print(f"{name}:", text.replace("\n", ", "))
    suffix = (f"_{args.class_cov}" if args.class_cov else "") + "_corrected" * args.corrected
    save_and_show(figure, args.plots_folder / f"{args.name_exp}_validation{suffix}", args.show)


if __name__ == "__main__":
    run_script(main)
