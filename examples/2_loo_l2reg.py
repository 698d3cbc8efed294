#!/usr/bin/env python3
r"""Choose the L2 parameter with the leave-one-out estimate and compare it with the test loss (Figures 4, 7).

Trains --n_exp models in parallel with L2 parameters from 10^deltas_start to 10^deltas_stop, with the same initial
weights and batches, and estimates the leave-one-out loss of each with a Laplace posterior. With --finite_time, the
estimates that assume convergence are also saved.
Reads the data set in --datasets_folder. Writes {pickles_folder}/{name_exp}_cv.pkl as models finish;
plot_loo_l2reg.py plots this file.

  python 2_loo_l2reg.py --name_exp mnist_mlp --dataset MNIST --model large_mlp --n_exp 100 --deltas_start 0 \
      --deltas_stop 3 --optimizer sgd --lr 1e-2 --lrmin 1e-3 --bs 256 --epochs 500 --bs_jacs 50
  python 2_loo_l2reg.py --name_exp digits --dataset digits --model small_mlp --epochs 30 --bs 32 --n_exp 8 \
      --deltas_start -2 --deltas_stop 2
"""

import logging
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import mpe
from mpe.config import (
    EXPERIMENT_FOLDERS,
    ONE_PROCESS,
    SHUFFLE_ORDERS,
    SIDE_BY_SIDE,
    ExperimentConfig,
    RetrainingConfig,
)
from src.artifacts.paths import Folders
from src.cli import Parser, build, number, option, print_next, run_script, whole_number
from src.datasets import DataConfig
from src.devices import ComputeConfig
from src.errors import ArgumentError, FlagError
from src.models import ModelConfig

log = logging.getLogger("2_loo_l2reg")

DEFAULTS = {"name_exp": "mnist_mlp", "lrmin": 1e-3, "epochs": 500, "bs_jacs": 50}


@dataclass(frozen=True)
class DeltasConfig:
    """The L2 parameters, and the optimizer."""

    n_exp: int = option(100, "number of L2 parameters, evenly spaced on a log scale", whole_number(1))
    deltas_start: float = option(0.0, "log10 of the first L2 parameter", number(float, -30, 30))
    deltas_stop: float = option(3.0, "log10 of the last L2 parameter", number(float, -30, 30))
    optimizer: str = option("sgd", "optimizer", choices=("sgd", "adam", "adamw"))

    def __post_init__(self) -> None:
        if self.deltas_stop < self.deltas_start:
            raise ArgumentError(
                "deltas_stop",
                f"{self.deltas_stop:g}: is below --deltas_start {self.deltas_start:g}; give at least that value",
            )


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data", defaults={"dataset": "mnist"})
    parser.add(ModelConfig, "model", only=("model",), defaults={"model": "large_mlp"})
    parser.add(
        ExperimentConfig, "experiment", skip=("delta", "checkpoint", "hess_init", "iblr_backend"), defaults=DEFAULTS
    )
    parser.add(DeltasConfig, "L2 parameters")
    parser.add(RetrainingConfig, "parallel training", only=("ensemble_size", "ensemble"))
    parser.add(ComputeConfig, "computing", skip=ONE_PROCESS, choices=SIDE_BY_SIDE)
    parser.add(Folders, "folders", only=EXPERIMENT_FOLDERS)
    args = parser.parse_args()
    if args.compile:
        raise FlagError("--compile: models trained in parallel are not compiled; leave it out")
    return args


def content(rows: dict[str, np.ndarray], deltas: np.ndarray, class_cov: str) -> dict:
    """The content of the result file, for the models trained so far."""
    more = {name: values for name, values in rows.items() if name not in ("test_accs", "test_nlls")}
    return {
        "estimated_nll": [np.float64(value) for value in rows[f"estimated_nll_{class_cov}"]],
        "deltas": deltas[: len(rows["test_accs"])],
        "test_accs": rows["test_accs"].tolist(),
        "test_nlls": [np.float32(value) for value in rows["test_nlls"]],
        **more,
    }


def main() -> None:
    """Configure, train, evaluate, save, print."""
    args = parse()
    config = build(ExperimentConfig, args)
    side_by_side = build(RetrainingConfig, args)
    own = build(DeltasConfig, args)
    data, compute, folders = build(DataConfig, args), build(ComputeConfig, args), build(Folders, args)
    from mpe.experiment import Experiment, forms_of
    from mpe.posterior import sgd_time
    from mpe.retraining import RetrainSettings, check_retraining, how_to_run, retrain

    experiment = Experiment(config, data, compute, folders, "cv", vars(args))
    deltas = np.logspace(own.deltas_start, own.deltas_stop, own.n_exp)
    check_retraining(experiment, side_by_side, [experiment.count])
    experiment.check_variances(deltas[0])
    result = experiment.result()
    time = (
        sgd_time(config.epochs, config.lr, config.lrmin, experiment.count, config.bs) if config.finite_time else None
    )
    member = experiment.build()  # reused: each trained model is loaded into it

    def measure(weights, number: int) -> dict[str, float]:
        member.load_state_dict(weights)
        accuracy, loss = experiment.test_metrics(member)
        delta = deltas[number]
        found = experiment.laplace(delta, time=time, model=member)
        row = {"test_accs": accuracy, "test_nlls": loss, "train_acc": found.accuracy, "train_nll": found.nll}
        estimated = (
            {"": found} if time is None else {"": found, "_converged": experiment.laplace(delta, model=member)}
        )
        for suffix, predictions in estimated.items():
            for form in forms_of(config.class_cov):
                losses = mpe.loo_losses(predictions, mpe.estimate(predictions, form))
                row[f"estimated_nll_{form}{suffix}"] = float(losses.mean())
        log.info(
            f"delta {delta:.4g}: train accuracy {100 * found.accuracy:.2f} % NLL {found.nll:.6f}; "
            f"test accuracy {100 * accuracy:.2f} % NLL {loss:.6f}; "
            f"LOO-NLL {row[f'estimated_nll_{config.class_cov}']:.6f} ({config.class_cov})"
        )
        return row

    def write(rows: dict[str, np.ndarray]) -> None:
        result.write(**content(rows, deltas, config.class_cov))

    settings = RetrainSettings(
        epochs=config.epochs,
        batch_size=config.bs,
        learning_rate=config.lr,
        lr_min=config.lrmin,
        delta=0.0,  # each model has its own delta
        seed=config.seed,
        optimizer=config.optimizer,
    )
    rows = retrain(
        experiment.model,
        experiment.prepared(experiment.train),
        experiment.train.labels,
        [np.empty(0, np.int64)] * len(deltas),  # no examples are removed
        settings,
        measure_each=measure,
        key=experiment.settings(),
        after_chunk=write,
        deltas=list(deltas),
        permutation=experiment.batches(
            experiment.train, experiment.count, SHUFFLE_ORDERS[config.base_shuffle]
        ).visited,
        **how_to_run(experiment, side_by_side),
    )
    write(rows)
    for what, values in (("leave-one-out", rows[f"estimated_nll_{config.class_cov}"]), ("test", rows["test_nlls"])):
        print(f"lowest {what} NLL {values.min():.6f} at delta {deltas[values.argmin()]:.4g}")
    print(result.path)
    print_next("plot_loo_l2reg.py", ["pickles_folder"], name_exp=config.name_exp)


if __name__ == "__main__":
    run_script(main)
