#!/usr/bin/env python3
r"""Follow the sensitivity of every training example while iBLR trains a network (paper: Figures 3b, 11b, 11c).

Reads the data set under --datasets_folder. Writes {pickles_folder}/{name_exp}_evolving.pkl after each checkpoint: the
sensitivities (checkpoints, N) after given optimiser steps; plot_evolving_sensitivities.py draws it. The network goes
to {models_folder}/mpe/{name_exp}_evolving/seed_{seed}/.

  python 4_evolving_sensitivities.py --name_exp fmnist_lenet --dataset FMNIST --model lenet --lr 0.1 --lrmin 0 \
      --hess_init 0.1 --delta 60 --epochs 100 --bs 256 --bs_jacs 500
  python 4_evolving_sensitivities.py --name_exp digits --dataset digits --model small_mlp --epochs 20 --bs 32 \
      --delta 1
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from mpe.results import Result
from src.cli import Parser, print_next, run_script, start_logging
from src.settings import add_experiment_flags, number

DEFAULTS = {
    "name_exp": "fmnist_lenet",
    "dataset": "fmnist",
    "model": "lenet",
    "lr": 0.1,
    "lrmin": 0.0,
    "bs": 256,
    "epochs": 100,
    "delta": 60,
    "bs_jacs": 500,
}


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    add_experiment_flags(parser, DEFAULTS)
    group = parser.add_argument_group("iBLR")
    group.add_argument("--hess_init", type=number(float, 0, open_low=True), default=0.1, help="initial Hessian")
    group.add_argument(
        "--checkpoints",
        type=number(int, 1),
        nargs="+",
        metavar="STEP",
        help="optimiser steps to measure after (default: the paper's, or the same shares of the run)",
    )
    return parser.parse_args()


def main() -> None:
    """Parse, train and measure, print."""
    args = parse()
    from mpe.evolving import Evolving, checkpoints_of
    from mpe.experiment import Experiment, plain_args

    start_logging(args.log_folder / "mpe" / f"{args.name_exp}_evolving.log")
    experiment = Experiment(args, "evolving")
    steps = args.epochs * -(-experiment.count // args.bs)
    checkpoints = checkpoints_of(experiment.entry.name, steps, args.checkpoints)
    experiment.check_network()
    result = Result(
        experiment.path(),
        plain_args(args),
        {**experiment.settings(), "checkpoints": checkpoints},
        resume=args.resume,
        overwrite=args.overwrite,
    )
    evolving = Evolving(result, experiment.from_optimizer, checkpoints, args.class_cov, args.seed)
    trainer = experiment.train_base("iblr", after_step=[evolving])
    last = trainer.history[-1]
    evolving.finish(test_acc=last["test_accuracy"], test_nll=np.float32(last["test_loss"]))
    print(f"test accuracy {100 * last['test_accuracy']:.2f} %, test NLL {last['test_loss']:.6f}")
    print(f"{len(evolving.rows)} checkpoints, after steps {', '.join(map(str, sorted(evolving.rows)))}")
    print(result.path)
    print_next("plot_evolving_sensitivities.py", ["pickles_folder"], name_exp=args.name_exp)


if __name__ == "__main__":
    run_script(main)
