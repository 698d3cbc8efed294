#!/usr/bin/env python3
r"""Choose the L2 parameter by the leave-one-out estimate, beside the test loss (paper: Figures 4, 7).

Trains --n_exp networks with L2 parameters from 10^deltas_start to 10^deltas_stop, side by side, from the same initial
weights on the same batches, and estimates the leave-one-out loss of each from Laplace's posterior.
Reads the data set under --datasets_folder. Writes {pickles_folder}/{name_exp}_cv.pkl as networks are done;
plot_loo_l2reg.py draws it.

  python 2_loo_l2reg.py --name_exp mnist_mlp --dataset MNIST --model large_mlp --n_exp 100 --deltas_start 0 \
      --deltas_stop 3 --optimizer sgd --lr 1e-2 --lrmin 1e-3 --bs 256 --epochs 500 --bs_jacs 50
  python 2_loo_l2reg.py --name_exp digits --dataset digits --model small_mlp --epochs 30 --bs 32 --n_exp 8 \
      --deltas_start -2 --deltas_stop 2
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from mpe.results import Result
from src.cli import Parser, print_next, run_script, start_logging
from src.errors import FlagError
from src.settings import add_ensemble_flags, add_experiment_flags, add_laplace_flags, number, whole_number

DEFAULTS = {
    "name_exp": "mnist_mlp",
    "dataset": "mnist",
    "model": "large_mlp",
    "lr": 1e-2,
    "lrmin": 1e-3,
    "bs": 256,
    "epochs": 500,
    "bs_jacs": 50,
}


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    add_experiment_flags(parser, DEFAULTS, optimizers=("sgd", "adam", "adamw"))
    add_laplace_flags(parser)
    group = parser.add_argument_group("L2 parameters")
    group.add_argument("--n_exp", type=whole_number(1), default=100, help="how many, evenly spaced in logarithms")
    group.add_argument("--deltas_start", type=number(float, -30, 30), default=0.0, help="the first is 10 to this")
    group.add_argument("--deltas_stop", type=number(float, -30, 30), default=3.0, help="the last is 10 to this")
    add_ensemble_flags(parser.add_argument_group("training side by side"))
    args = parser.parse_args()
    if args.deltas_stop < args.deltas_start:
        raise FlagError(
            f"--deltas_stop {args.deltas_stop:g}: lies below --deltas_start {args.deltas_start:g}; give at least that"
        )
    if args.compile:
        raise FlagError("--compile: networks side by side are not compiled; leave it out")
    return args


def main() -> None:
    """Parse, train, estimate, print."""
    args = parse()
    from mpe.experiment import Experiment, plain_args
    from mpe.l2_selection import l2_content, measure_deltas
    from mpe.retraining import check_last_batches, train_with_deltas, vectorised

    start_logging(args.log_folder / "mpe" / f"{args.name_exp}_cv.log")
    experiment = Experiment(args, "cv")
    deltas = np.logspace(args.deltas_start, args.deltas_stop, args.n_exp)
    vectorised(experiment)  # refuses what cannot be
    check_last_batches(experiment, [experiment.count])
    experiment.check_variances(deltas[0], "kfac")
    result = Result(
        experiment.path(), plain_args(args), experiment.settings(), resume=args.resume, overwrite=args.overwrite
    )

    def write(rows: dict[str, np.ndarray]) -> None:
        result.write(**l2_content(rows, deltas, args.class_cov))

    member = experiment.build()
    measure = measure_deltas(
        deltas,
        args.class_cov,
        member,
        lambda delta: experiment.laplace(delta, model=member),
        lambda: experiment.test_metrics(member),
    )
    images = experiment.prepared(experiment.train)
    rows = train_with_deltas(experiment, images, deltas, args.optimizer, measure, write)
    write(rows)
    for what, values in (("leave-one-out", rows[f"estimated_nll_{args.class_cov}"]), ("test", rows["test_nlls"])):
        print(f"lowest {what} NLL {values.min():.6f} at delta {deltas[values.argmin()]:.4g}")
    print(result.path)
    print_next("plot_loo_l2reg.py", ["pickles_folder"], name_exp=args.name_exp)


if __name__ == "__main__":
    run_script(main)
