#!/usr/bin/env python3
r"""Check estimated sensitivities against retraining without the example (paper: Figure 2).

Trains a network, estimates from Laplace's posterior how much its output at every training example would change if
that example were left out, and retrains without --n_retrain random ones, one each, many networks side by side.
Reads the data set under --datasets_folder. Writes {pickles_folder}/{name_exp}_scores.pkl (the estimates) and, as
networks are retrained, {name_exp}_retrain.pkl (the true deviations); plot_validation_sensitivities.py draws them.

  python 3_validation_sensitivities.py --name_exp mnist_mlp --dataset MNIST --model large_mlp --lr 1e-2 --lrmin 1e-3 \
      --bs 256 --epochs 500 --delta 100 --lr_retrain 1e-3 --lrmin_retrain 1e-4 --epochs_retrain 300 --n_retrain 1000 \
      --bs_jacs 50
  python 3_validation_sensitivities.py --name_exp digits --dataset digits --model small_mlp --epochs 30 --bs 32 \
      --delta 1 --n_retrain 20 --epochs_retrain 20
"""

import logging
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from mpe.results import Result
from src.cli import Parser, print_next, run_script, start_logging
from src.errors import FlagError
from src.settings import add_experiment_flags, add_laplace_flags, add_retraining_flags, number

log = logging.getLogger("3_validation_sensitivities")

DEFAULTS = {
    "name_exp": "mnist_mlp",
    "dataset": "mnist",
    "model": "large_mlp",
    "lr": 1e-2,
    "lrmin": 1e-3,
    "bs": 256,
    "epochs": 500,
    "delta": 100,
    "bs_jacs": 50,
}


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    add_experiment_flags(parser, DEFAULTS)
    add_laplace_flags(parser)
    add_retraining_flags(parser, lr=1e-3, lrmin=1e-4, epochs=300)
    group = parser.add_argument_group("examples left out")
    group.add_argument(
        "--n_retrain", type=number(int, 0), default=1000, help="random examples to leave out, one each"
    )
    group.add_argument(
        "--n_spread",
        type=number(int, 0),
        default=0,
        help="as many more, spread evenly over the range of the estimated sensitivities",
    )
    return parser.parse_args()


def main() -> None:
    """Parse, train, estimate, retrain, print."""
    args = parse()
    from mpe.experiment import Experiment, plain_args
    from mpe.retraining import check_last_batches, check_retraining, retrain_without, weights_hash
    from mpe.validation import (
        drawn_examples,
        estimates_of,
        kept_scores,
        measure_removed,
        retrain_content,
        score_content,
        spread_examples,
    )

    start_logging(args.log_folder / "mpe" / f"{args.name_exp}_retrain.log")
    experiment = Experiment(args, "retrain")
    wanted = args.n_retrain + args.n_spread
    if not 0 < wanted <= experiment.count:
        raise FlagError(
            f"--n_retrain {args.n_retrain} and --n_spread {args.n_spread}: {wanted} of {experiment.count} training "
            f"examples cannot be left out; give 1 to {experiment.count} together"
        )
    check_retraining(experiment)
    check_last_batches(experiment, [experiment.count, experiment.count - 1])
    experiment.check_variances(args.delta, "kfac")
    settings = experiment.settings()
    flags = {"resume": args.resume, "overwrite": args.overwrite}
    scores = Result(experiment.path("scores"), plain_args(args), settings, **flags)
    retrained = Result(experiment.path("retrain"), plain_args(args), settings, **flags)
    if args.overwrite:
        retrained.remove_other()  # or it would stand beside scores of other settings

    experiment.train_base("sgd")
    weights = weights_hash(experiment.model)
    content = kept_scores(scores.stored, weights)
    if content is None:
        predictions = experiment.laplace(args.delta)
        content = score_content(predictions, estimates_of(predictions, args.class_cov), args.class_cov, weights)
        scores.write(**content)
    else:
        log.info("the estimates are those of the earlier run, %s", scores.path)
    print(scores.path)
    print(f"train accuracy {100 * content['train_acc']:.2f} %, NLL {content['train_nll']:.6f}")
    accuracy, loss = experiment.test_metrics()
    print(f"test accuracy {100 * accuracy:.2f} %, NLL {loss:.6f}")

    removed = drawn_examples(experiment.count, args.n_retrain, args.seed)
    removed = np.concatenate([removed, spread_examples(content["sensitivities"], args.n_spread, removed)])

    def write(rows: dict[str, np.ndarray]) -> None:
        retrained.write(**retrain_content(rows, removed, args.n_spread, content["probabilities"], content["indices"]))

    images = experiment.prepared(experiment.train)
    leave_out = [np.empty(0, np.int64), *removed[:, None]]
    write(retrain_without(experiment, images, leave_out, measure_removed(images, removed), write))
    print(retrained.path)
    print_next("plot_validation_sensitivities.py", ["pickles_folder"], name_exp=args.name_exp)


if __name__ == "__main__":
    run_script(main)
