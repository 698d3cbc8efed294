#!/usr/bin/env python3
r"""Track the sensitivity of every training example while a model trains with iBLR (Figures 3b, 11b, 11c).

Reads the data set in --datasets_folder. After each checkpoint, writes {pickles_folder}/{name_exp}_evolving.pkl: the
sensitivities (checkpoints, N) after selected optimizer steps. plot_evolving_sensitivities.py plots this file. Writes
the model to {models_folder}/mpe/{name_exp}_evolving/seed_{seed}/.

  python 4_evolving_sensitivities.py --name_exp fmnist_lenet --dataset FMNIST --model lenet --lr 0.1 --lrmin 0 \
      --hess_init 0.1 --delta 60 --epochs 100 --bs 256 --bs_jacs 500
  python 4_evolving_sensitivities.py --name_exp digits --dataset digits --model small_mlp --epochs 20 --bs 32 \
      --delta 1
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import mpe
from mpe.config import EXPERIMENT_FOLDERS, ONE_PROCESS, ExperimentConfig
from src.artifacts.paths import Folders
from src.cli import Parser, build, number, print_next, run_script
from src.datasets import DataConfig
from src.devices import ComputeConfig
from src.errors import FlagError
from src.lazy import torch
from src.models import ModelConfig

log = logging.getLogger("4_evolving_sensitivities")

CHECKPOINTS = {  # the paper's optimizer steps
    "mnist": (10, 1000, 5000, 12250),
    "fmnist": (10, 1000, 5000, 12250),
    "cifar10": (10, 2000, 10000, 24500),
}
SHARES = tuple(step / 23500 for step in CHECKPOINTS["mnist"])  # as fractions of the paper's MNIST and FMNIST runs


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data", defaults={"dataset": "fmnist"})
    parser.add(ModelConfig, "model", only=("model",), defaults={"model": "lenet"})
    parser.add(
        ExperimentConfig,
        "experiment",
        skip=("checkpoint", "var_version", "laplace_backend", "finite_time"),
        defaults={"lr": 0.1, "lrmin": 0.0},
    )
    parser.add_argument(
        "--checkpoints",
        type=number(int, 1),
        nargs="+",
        metavar="STEP",
        help="optimizer steps after which to measure (default: the paper's steps, or the same fractions of the run)",
    )
    parser.add(ComputeConfig, "computing", skip=ONE_PROCESS)
    parser.add(Folders, "folders", only=EXPERIMENT_FOLDERS)
    return parser.parse_args()


def checkpoints_of(dataset: str, steps: int, given: Sequence[int] | None = None) -> list[int]:
    """The steps after which to measure, in ascending order.

    Args:
        dataset: The data set's name.
        steps: Number of steps of the full run.
        given: The user's choice. By default, the paper's steps if the run reaches them all, otherwise the same
            fractions of the run as in the paper.
    """
    if given:
        chosen = sorted(set(given))
        if chosen[-1] > steps:
            raise FlagError(f"--checkpoints {chosen[-1]}: the run has {steps} steps; give steps from 1 to {steps}")
        return chosen
    papers = CHECKPOINTS.get(dataset, ())
    if papers and papers[-1] <= steps:
        return list(papers)
    return sorted({max(1, round(share * steps)) for share in SHARES})


class Evolving:
    """Measures sensitivities after selected steps, and writes the result each time.

    Args:
        result: The result file. Existing rows are kept up to the step at which training continues.
        predict: Returns predictions with variances for the training examples.
        checkpoints: The steps after which to measure.
        class_cov: The form of the covariance between classes.
        seed: Seed of the logit samples.
    """

    def __init__(self, result, predict, checkpoints: Sequence[int], class_cov: str, seed: int) -> None:
        from mpe.experiment import forms_of

        self.result, self.predict, self.class_cov, self.seed = result, predict, class_cov, seed
        self.checkpoints, self.forms = set(checkpoints), forms_of(class_cov)
        stored = result.stored
        self.rows = {  # step -> (forms, N)
            int(step): np.array([stored[f"sensitivity_{form}"][i] for form in self.forms])
            for i, step in enumerate(stored.get("steps", ()))
        }

    def __call__(self, trainer, epoch: int, step: int) -> None:
        """After a step: measure if the step is selected, and write the result."""
        if step not in self.checkpoints:
            return
        self.rows = self.result.rows_before(self.rows, self.checkpoints, step, "sensitivities after step")
        trainer.require_finite(epoch)
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # measuring must not affect training
            found = self.predict(trainer)
            self.rows[step] = mpe.sampled_sensitivities(found, self.forms, self.seed, step)
        mean = self.rows[step][self.forms.index(self.class_cov)].mean()
        log.info(
            f"step {step} (epoch {epoch}): train accuracy {100 * found.accuracy:.2f} % NLL {found.nll:.6f}; "
            f"mean sensitivity {mean:.6f}"
        )
        self.write()

    def finish(self, **more) -> None:
        """Write all rows and the entries of ``more`` after the last step."""
        end = max(self.checkpoints) + 1
        self.rows = self.result.rows_before(self.rows, self.checkpoints, end, "sensitivities after step")
        self.write(**more)

    def write(self, **more) -> None:
        """Write the rows so far."""
        steps = sorted(self.rows)
        found = {form: np.array([self.rows[step][i] for step in steps]) for i, form in enumerate(self.forms)}
        self.result.write(
            sensitivity=found[self.class_cov],
            **{f"sensitivity_{form}": values for form, values in found.items()},
            iterations_list=np.array(steps, dtype=np.int64) + 1,  # same counting as in the paper's files
            steps=np.array(steps, dtype=np.int64),
            **more,
        )


def main() -> None:
    """Configure, train, measure, save, print."""
    args = parse()
    config = build(ExperimentConfig, args, optimizer="iblr")
    data, compute, folders = build(DataConfig, args), build(ComputeConfig, args), build(Folders, args)
    from mpe.experiment import Experiment

    experiment = Experiment(config, data, compute, folders, "evolving", vars(args))
    steps = config.epochs * -(-experiment.count // config.bs)
    checkpoints = checkpoints_of(experiment.context.entry.name, steps, args.checkpoints)
    experiment.check_variances()
    result = experiment.result(checkpoints=checkpoints)
    evolving = Evolving(result, experiment.from_optimizer, checkpoints, config.class_cov, config.seed)
    last = experiment.train_base(after_step=[evolving]).history[-1]
    evolving.finish(test_acc=last["test_accuracy"], test_nll=np.float32(last["test_loss"]))
    print(f"test accuracy {100 * last['test_accuracy']:.2f} %, test NLL {last['test_loss']:.6f}")
    print(f"{len(evolving.rows)} checkpoints, after steps {', '.join(map(str, sorted(evolving.rows)))}")
    print(result.path)
    print_next("plot_evolving_sensitivities.py", ["pickles_folder"], name_exp=config.name_exp)


if __name__ == "__main__":
    run_script(main, flags={"batch_size": "bs"})
