#!/usr/bin/env python3
r"""Estimate the leave-one-out loss during training and compare it with the test loss (Figures 1b, 5, 8, 9, 10).

Reads the data set in --datasets_folder. After every epoch, writes {pickles_folder}/{name_exp}_iter.pkl: the test
accuracy and NLL at every epoch, and the leave-one-out estimate at epochs 1, 2, 5, 10, 20, ... and the last epoch.
plot_loo_iterations.py plots this file. Writes the model to {models_folder}/mpe/{name_exp}_iter/seed_{seed}/. With
--write_scores, also writes the sensitivity of every training example to {metrics_folder}/mpe/mpe_{dataset}.pkl, and
to a csv file next to it. With --checkpoint, measures the model in that file without training, as epoch 1.

  python 1_loo_iterations.py --name_exp fmnist_lenet_iblr --dataset FMNIST --model lenet --optimizer iblr --lr 0.1 \
      --lrmin 0 --hess_init 0.1 --delta 60 --epochs 100 --bs 256 --bs_jacs 500 --optim_var
  python 1_loo_iterations.py --dataset digits --model small_mlp --epochs 20 --bs 32 --delta 1 --name_exp digits
"""

import logging
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import mpe
from mpe.config import EXPERIMENT_FOLDERS, ONE_PROCESS, TRAINS_BASE, ExperimentConfig
from src.artifacts.paths import Folders
from src.artifacts.store import check_score_target
from src.cli import Parser, build, option, print_next, run_script
from src.datasets import DataConfig
from src.devices import ComputeConfig
from src.errors import ArgumentError
from src.metrics import SCORES
from src.models import ModelConfig

log = logging.getLogger("1_loo_iterations")

EVALUATED = (1, 2, 5, 10, 20, 30, 40, 50, 75, 100, 150, 200, 250, 300)


@dataclass(frozen=True)
class LooConfig:
    """Settings specific to this experiment."""

    optimizer: str = option("sgd", "optimizer", choices=("sgd", "iblr", "adam", "adamw"), acts=TRAINS_BASE)
    optim_var: bool = option(
        False, "use variances from the optimizer's state (iblr, adam) instead of Laplace", acts=TRAINS_BASE
    )
    write_scores: bool = option(False, "write the final sensitivities as score 'mpe'")

    def __post_init__(self) -> None:
        if self.optim_var and self.optimizer not in ("iblr", "adam"):
            raise ArgumentError(
                "optim_var",
                f": the state of {self.optimizer} has no variances; give --optimizer iblr or adam, or leave it out",
            )


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data", defaults={"dataset": "fmnist"})
    parser.add(ModelConfig, "model", only=("model",), defaults={"model": "lenet"})
    parser.add(ExperimentConfig, "experiment", skip=("finite_time",), defaults={"name_exp": "fmnist_lenet_sgd_kfac"})
    parser.add(LooConfig, "leave-one-out estimates")
    parser.add(ComputeConfig, "computing", skip=ONE_PROCESS)
    parser.add(Folders, "folders", only=(*EXPERIMENT_FOLDERS, "metrics_folder"))
    return parser.parse_args()


class LooIterations:
    """Evaluates the model at selected epochs, and writes the result after every epoch.

    Args:
        result: The result file. Existing rows are kept up to the epoch at which training continues.
        predict: Returns predictions with variances for the training examples.
        epochs: The number of epochs of the run. The last epoch is always evaluated.
        class_cov: The form stored as ``estimated_nll``. Other forms computed in the same pass are stored next to it.
    """

    def __init__(self, result, predict, epochs: int, class_cov: str) -> None:
        self.result, self.predict, self.class_cov = result, predict, class_cov
        self.evaluated = {epoch for epoch in (*EVALUATED, epochs) if epoch <= epochs}
        stored = result.stored
        names = [name for name in stored if name.startswith(("estimated_nll_", "train_")) or name == "unstable"]
        self.rows = {
            int(epoch): {name: float(stored[name][i]) for name in names}
            for i, epoch in enumerate(stored.get("epochs", ()))
        }
        self.last = None  # sensitivities at the last evaluated epoch

    def __call__(self, trainer) -> None:
        """After an epoch: evaluate the model if the epoch is selected, and write the result."""
        self.rows = self.result.rows_before(self.rows, self.evaluated, trainer.epoch, "estimate of epoch")
        if trainer.epoch in self.evaluated:
            self.rows[trainer.epoch] = self.measure(trainer)
        self.write(trainer)

    def measure(self, trainer) -> dict[str, float]:
        """Compute leave-one-out estimates and training metrics of the current model."""
        from mpe.experiment import forms_of

        predictions = self.predict(trainer)
        row = {"train_acc": predictions.accuracy, "train_nll": predictions.nll}
        for form in forms_of(self.class_cov):
            found = mpe.estimate(predictions, form)
            row[f"estimated_nll_{form}"] = float(mpe.loo_losses(predictions, found).mean())
            row[f"estimated_nll_unclamped_{form}"] = float(mpe.loo_losses(predictions, found, clamp=False).mean())
            if form == self.class_cov:
                self.last = mpe.Sensitivities(predictions, found)
            if form == "woodbury":
                row["unstable"] = float(found.unstable.sum())
        test = trainer.history[-1]
        log.info(
            f"epoch {trainer.epoch}: train accuracy {100 * row['train_acc']:.2f} % NLL {row['train_nll']:.6f}; "
            f"test accuracy {100 * test['test_accuracy']:.2f} % NLL {test['test_loss']:.6f}; "
            f"LOO-NLL {row[f'estimated_nll_{self.class_cov}']:.6f} ({self.class_cov})"
        )
        return row

    def finish(self, trainer) -> None:
        """Write the complete result after the last epoch, even if training had already finished."""
        rows = self.result.rows_before(self.rows, self.evaluated, trainer.epoch, "estimate of epoch")
        self.rows = {**rows, trainer.epoch: self.rows.get(trainer.epoch) or self.measure(trainer)}
        self.write(trainer)

    def write(self, trainer) -> None:
        """Write the rows so far and the test metrics of every epoch."""
        epochs = sorted(self.rows)
        columns = sorted({name for row in self.rows.values() for name in row})
        self.result.write(
            estimated_nll=[np.float64(self.rows[epoch][f"estimated_nll_{self.class_cov}"]) for epoch in epochs],
            test_accs=[record["test_accuracy"] for record in trainer.history],
            test_nlls=[np.float32(record["test_loss"]) for record in trainer.history],
            epochs=np.array(epochs, dtype=np.int64),
            **{name: np.array([self.rows[epoch].get(name, 0.0) for epoch in epochs]) for name in columns},
        )


def main() -> None:
    """Configure, train, evaluate, save, print."""
    args = parse()
    config = build(ExperimentConfig, args)
    own = build(LooConfig, args)
    data, compute, folders = build(DataConfig, args), build(ComputeConfig, args), build(Folders, args)
    from mpe.experiment import Experiment

    experiment = Experiment(config, data, compute, folders, "iter", vars(args))
    result = experiment.result()
    if own.write_scores:
        path = SCORES["mpe"].path(folders.metrics_folder, experiment.context.entry.name)
        settings = experiment.settings()
        check_score_target(path, settings, overwrite=config.overwrite, only=settings)
    experiment.check_variances(config.delta)

    def predict(trainer):
        if own.optim_var:
            return experiment.from_optimizer(trainer)
        return experiment.laplace(config.delta)

    iterations = LooIterations(result, predict, config.epochs, config.class_cov)
    trainer = experiment.train_base(measure=iterations)
    iterations.finish(trainer)
    last = trainer.history[-1]
    after = f"after {config.epochs} epochs" if config.checkpoint is None else f"of {config.checkpoint}"
    print(f"test accuracy {100 * last['test_accuracy']:.2f} %, test NLL {last['test_loss']:.6f} {after}")
    print(result.path)
    if own.write_scores:
        if iterations.last is None:  # evaluated in an earlier run
            iterations.measure(trainer)
        context = experiment.context
        facts = {"label_hash": context.label_hash, "data_hash": context.full_train.digest}
        cost = experiment.cost(trainer)  # unknown for a checkpoint
        facts |= {} if cost is None else {"cost": cost}
        paths = iterations.last.write_scores(
            folders.metrics_folder,
            context.entry.name,
            total=experiment.train.total,
            settings={**experiment.settings(), **facts},
            examples=context.full_train.examples,
        )
        print(*paths, sep="\n")
    print_next("plot_loo_iterations.py", ["pickles_folder"], name_exp=config.name_exp)


if __name__ == "__main__":
    run_script(main, flags={"batch_size": "bs"})
