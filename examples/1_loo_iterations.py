#!/usr/bin/env python3
r"""Estimate the leave-one-out loss while a network trains, beside its test loss (paper: Figures 1b, 5, 8, 9, 10).

Reads the data set under --datasets_folder. Writes {pickles_folder}/{name_exp}_iter.pkl after every epoch: the
leave-one-out estimate at epochs 1, 2, 5, 10, 20, ... and the last, test accuracy and NLL at every epoch;
plot_loo_iterations.py draws it. The network goes to {models_folder}/mpe/{name_exp}_iter/seed_{seed}/. With
--write_scores also the sensitivity of every training example, as a score file, {metrics_folder}/mpe/mpe_{dataset}.pkl

  python 1_loo_iterations.py --name_exp fmnist_lenet_iblr --dataset FMNIST --model lenet --optimizer iblr --lr 0.1 \
      --lrmin 0 --hess_init 0.1 --delta 60 --epochs 100 --bs 256 --bs_jacs 500 --optim_var
  python 1_loo_iterations.py --dataset digits --model small_mlp --epochs 20 --bs 32 --delta 1 --name_exp digits
"""

import logging
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpe.config import STRUCTURES
from mpe.results import Result
from src.artifacts import label_hash
from src.artifacts.score_files import refuse_other_scores
from src.cli import Parser, print_next, restrict, run_script, start_logging
from src.errors import FlagError
from src.metrics import SCORES
from src.settings import add_experiment_flags, add_folder_flags, add_laplace_flags, number

log = logging.getLogger("1_loo_iterations")

DEFAULTS = {
    "name_exp": "fmnist_lenet_sgd_kfac",
    "dataset": "fmnist",
    "model": "lenet",
    "lr": 1e-2,
    "lrmin": 1e-4,
    "bs": 256,
    "epochs": 100,
    "delta": 60,
    "bs_jacs": 500,
}


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    add_experiment_flags(parser, DEFAULTS, optimizers=("sgd", "iblr", "adam", "adamw"))
    group = parser.add_argument_group("posterior")
    group.add_argument(
        "--hess_init", type=number(float, 0, open_low=True), default=0.1, help="initial Hessian of iblr"
    )
    group.add_argument(
        "--optim_var",
        action="store_true",
        help="variances from the optimiser's state (iblr, adam), not Laplace's",
    )
    group.add_argument(
        "--var_version", choices=STRUCTURES, default=STRUCTURES[0], help="structure of Laplace's posterior"
    )
    add_laplace_flags(parser)
    restrict(
        parser,
        {
            ("--hess_init",): (lambda args: args.optimizer == "iblr", "without --optimizer=iblr"),
            ("--var_version", "--laplace_backend"): (
                lambda args: not args.optim_var,
                "beside --optim_var: no Laplace posterior is fitted",
            ),
        },
    )
    scores = parser.add_argument_group("scores")
    scores.add_argument("--write_scores", action="store_true", help="write the last sensitivities as the score 'mpe'")
    add_folder_flags(parser, "metrics")
    args = parser.parse_args()
    if args.optim_var and args.optimizer not in ("iblr", "adam"):
        raise FlagError(
            f"--optim_var: the state of {args.optimizer} holds no variances; give --optimizer iblr or adam, or "
            "leave it out"
        )
    return args


def main() -> None:
    """Parse, train and measure, print."""
    args = parse()
    from mpe.experiment import Experiment, plain_args
    from mpe.loo_iterations import LooIterations

    start_logging(args.log_folder / "mpe" / f"{args.name_exp}_iter.log")
    experiment = Experiment(args, "iter")
    result = Result(
        experiment.path(),
        plain_args(args),
        experiment.settings(),
        resume=args.resume,
        overwrite=args.overwrite,
    )
    if args.write_scores and not args.overwrite:
        refuse_other_scores(SCORES["mpe"].path(args.metrics_folder, experiment.entry.name), experiment.settings())
    if args.optim_var:
        experiment.check_network()
        measure = experiment.from_optimizer
    else:
        experiment.check_variances(args.delta, args.var_version)

        def measure(trainer):
            return experiment.laplace(args.delta, args.var_version)

    iterations = LooIterations(result, measure, args.epochs, args.class_cov)
    trainer = experiment.train_base(args.optimizer, measure=iterations)
    iterations.finish(trainer)
    last = trainer.history[-1]
    print(
        f"test accuracy {100 * last['test_accuracy']:.2f} %, test NLL {last['test_loss']:.6f} "
        f"after {args.epochs} epochs"
    )
    print(result.path)
    if args.write_scores:
        found = iterations.sensitivities(trainer)
        more = {
            **experiment.settings(),
            "label_hash": label_hash(experiment.whole_labels),
            "data_hash": experiment.whole_train.digest,
        }
        for path in found.write_scores(
            args.metrics_folder, experiment.entry.name, total=experiment.train.total, settings=more
        ):
            print(path)
    print_next("plot_loo_iterations.py", ["pickles_folder"], name_exp=args.name_exp)


if __name__ == "__main__":
    run_script(main)
