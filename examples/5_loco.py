#!/usr/bin/env python3
r"""Estimate what removing a whole class does to the loss, beside retraining without it (paper: Figures 3a, 11d).

Reads the data set under --datasets_folder. Writes {pickles_folder}/{name_exp}_leaveclassout.pkl, class by class: the
estimate, and the test NLL and accuracy of the network retrained without the class; plot_loco.py draws one or several.

  python 5_loco.py --name_exp fmnist_lenet --dataset FMNIST --model lenet --lr 1e-1 --lrmin 1e-3 --bs 256 \
      --epochs 300 --delta 100 --lr_retrain 1e-4 --lrmin_retrain 1e-5 --epochs_retrain 1000 --bs_jacs 500
  python 5_loco.py --name_exp digits --dataset digits --model small_mlp --epochs 30 --bs 32 --delta 1 \
      --epochs_retrain 50
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from mpe.results import Result
from src.cli import Parser, print_next, run_script, start_logging
from src.settings import add_experiment_flags, add_laplace_flags, add_retraining_flags

DEFAULTS = {
    "name_exp": "fmnist_lenet",
    "dataset": "fmnist",
    "model": "lenet",
    "lr": 1e-1,
    "lrmin": 1e-3,
    "bs": 256,
    "epochs": 300,
    "delta": 100,
    "bs_jacs": 500,
}


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    add_experiment_flags(parser, DEFAULTS)
    add_laplace_flags(parser)
    add_retraining_flags(parser, lr=1e-4, lrmin=1e-5, epochs=1000)
    return parser.parse_args()


def main() -> None:
    """Parse, train, estimate, retrain, print."""
    args = parse()
    from mpe.class_removal import class_content, class_estimates, measure_test
    from mpe.experiment import Experiment, plain_args
    from mpe.retraining import check_last_batches, check_retraining, retrain_without

    start_logging(args.log_folder / "mpe" / f"{args.name_exp}_leaveclassout.log")
    experiment = Experiment(args, "leaveclassout")
    check_retraining(experiment)
    sizes = experiment.labels.bincount().cpu().tolist()
    check_last_batches(experiment, [experiment.count, *(experiment.count - size for size in sizes)])
    experiment.check_variances(args.delta, "kfac")
    result = Result(
        experiment.path(), plain_args(args), experiment.settings(), resume=args.resume, overwrite=args.overwrite
    )

    trainer = experiment.train_base("sgd")
    predictions = experiment.laplace(args.delta)
    estimated = class_estimates(predictions, args.class_cov, experiment.entry.num_classes)
    last = trainer.history[-1]
    base = (last["test_accuracy"], last["test_loss"])

    labels = experiment.labels.cpu().numpy()
    classes = [int(c) for c in np.unique(labels)]
    images, test = experiment.prepared(experiment.train), experiment.prepared(experiment.test)

    def write(rows: dict[str, np.ndarray]) -> None:
        result.write(**class_content(rows, estimated, classes, base))

    leave_out = [np.empty(0, np.int64), *(np.flatnonzero(labels == c) for c in classes)]
    measure = measure_test(test, experiment.test.labels)
    rows = retrain_without(experiment, images, leave_out, measure, write, extra_draws=1)
    write(rows)
    print(f"with all classes: test accuracy {100 * base[0]:.2f} %, NLL {base[1]:.6f}")
    for c, nll, acc in zip(classes, rows["nll"][1:], rows["acc"][1:], strict=True):
        who = f"{experiment.train.class_names[c]} ({(labels == c).sum()})"
        print(f"without {who}: estimated {estimated['est_nll'][c]:.4f}, test NLL {nll:.4f}, {100 * acc:.2f} %")
    print(result.path)
    print_next("plot_loco.py", ["pickles_folder"], names_exp=[args.name_exp], plot_name=args.name_exp)


if __name__ == "__main__":
    run_script(main)
