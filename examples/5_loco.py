#!/usr/bin/env python3
r"""Estimate the effect of removing a class on the loss and compare it with retraining (Figures 3a, 11d).

Reads the data set in --datasets_folder. Writes {pickles_folder}/{name_exp}_leaveclassout.pkl: for each class, the
estimate, and the test NLL and accuracy after retraining without the class. plot_loco.py plots one or more such files.

  python 5_loco.py --name_exp fmnist_lenet --dataset FMNIST --model lenet --lr 1e-1 --lrmin 1e-3 --bs 256 \
      --epochs 300 --delta 100 --lr_retrain 1e-4 --lrmin_retrain 1e-5 --epochs_retrain 1000 --bs_jacs 500
  python 5_loco.py --name_exp digits --dataset digits --model small_mlp --epochs 30 --bs 32 --delta 1 \
      --epochs_retrain 50
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import mpe
from mpe.config import EXPERIMENT_FOLDERS, ONE_PROCESS, SIDE_BY_SIDE, ExperimentConfig, RetrainingConfig
from src.artifacts.paths import Folders
from src.cli import Parser, build, print_next, run_script
from src.datasets import DataConfig
from src.devices import ComputeConfig
from src.lazy import torch
from src.models import ModelConfig

DEFAULTS = {"lr": 1e-1, "lrmin": 1e-3, "epochs": 300, "delta": 100.0}
RETRAINING = {"lr_retrain": 1e-4, "lrmin_retrain": 1e-5, "epochs_retrain": 1000}


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data", defaults={"dataset": "fmnist"})
    parser.add(ModelConfig, "model", only=("model",), defaults={"model": "lenet"})
    parser.add(ExperimentConfig, "experiment", skip=("checkpoint", "hess_init", "iblr_backend"), defaults=DEFAULTS)
    parser.add(RetrainingConfig, "retraining", defaults=RETRAINING)
    parser.add(ComputeConfig, "computing", skip=ONE_PROCESS, choices=SIDE_BY_SIDE)
    parser.add(Folders, "folders", only=EXPERIMENT_FOLDERS)
    return parser.parse_args()


def class_estimates(predictions: mpe.Predictions, class_cov: str, classes: int) -> dict[str, np.ndarray]:
    """Leave-one-class-out estimates: the mean leave-one-out loss over the examples of each class.

    This is the paper's formula (Section 4) with each example's own Jacobian instead of the class's Jacobian.

    Returns:
        ``est_nll`` ``(C,)`` with the requested form, and ``est_nll_{form}`` for every form computed in the same pass;
        NaN for a class without examples.
    """
    from mpe.experiment import forms_of

    labels, found = predictions.labels.numpy(), {}
    for form in forms_of(class_cov):
        losses = mpe.loo_losses(predictions, mpe.estimate(predictions, form)).numpy()
        means = [losses[labels == c].mean() if (labels == c).any() else np.nan for c in range(classes)]
        found[f"est_nll_{form}"] = np.array(means)
    return {"est_nll": found[f"est_nll_{class_cov}"], **found}


def measure_test(images: torch.Tensor, labels: torch.Tensor, batch: int = 1000) -> Callable:
    """Build the function that measures the test NLL and accuracy ``(m,)`` of an ensemble's members.

    Args:
        images: Test images, on the device.
        labels: Test labels, on the device.
        batch: Images per forward pass, counting an image once per member, so memory does not grow with the ensemble.
    """
    from mpe.posterior import EPS

    def measure(ensemble, members: range) -> dict[str, np.ndarray]:
        nll = torch.zeros(len(members), dtype=torch.float64, device=images.device)
        correct = torch.zeros_like(nll)
        size = max(1, batch // len(ensemble))
        for part, wanted in zip(images.split(size), labels.split(size), strict=True):
            p = ensemble.logits(part).detach().double().softmax(-1)  # (m, b, C)
            own = p.gather(2, wanted.expand(len(members), -1).unsqueeze(2)).squeeze(2)
            nll -= own.clamp_min(EPS).log().sum(1)
            correct += (p.argmax(2) == wanted).sum(1)
        return {"nll": (nll / len(labels)).cpu().numpy(), "acc": (correct / len(labels)).cpu().numpy()}

    return measure


def content(
    rows: dict[str, np.ndarray], estimated: dict[str, np.ndarray], classes: Sequence[int], base: tuple[float, float]
) -> dict:
    """The content of the result file, for the models retrained so far.

    Args:
        rows: The measurements of ``measure_test`` for models 0 (the control), 1 (without ``classes[0]``), ...
        estimated: Leave-one-class-out estimates, see ``class_estimates``.
        classes: The classes that are removed, one at a time.
        base: Test accuracy and NLL of the base model.
    """
    nll = np.full(len(estimated["est_nll"]), np.nan)
    acc = nll.copy()
    done = list(classes[: len(rows["nll"]) - 1])
    nll[done], acc[done] = rows["nll"][1:], rows["acc"][1:]
    return {
        "org_acc": base[0],
        "org_nll": base[1],
        **estimated,
        "perturb_nll": nll,
        "perturb_acc": acc,
        "control_acc": float(rows["acc"][0]),
        "control_nll": float(rows["nll"][0]),
    }


def main() -> None:
    """Configure, train, estimate, retrain, save, print."""
    args = parse()
    config = build(ExperimentConfig, args)
    retraining = build(RetrainingConfig, args)
    data, compute, folders = build(DataConfig, args), build(ComputeConfig, args), build(Folders, args)
    from mpe.experiment import Experiment
    from mpe.retraining import check_retraining, retrain_without, retraining_time

    experiment = Experiment(config, data, compute, folders, "leaveclassout", vars(args))
    labels = experiment.train.labels.cpu().numpy()
    count, classes = experiment.count, [int(c) for c in np.unique(labels)]
    removed = [np.empty(0, np.int64), *(np.flatnonzero(labels == c) for c in classes)]
    check_retraining(experiment, retraining, [count - len(positions) for positions in removed])
    experiment.check_variances(config.delta)
    result = experiment.result()

    last = experiment.train_base().history[-1]
    base = (last["test_accuracy"], last["test_loss"])
    time = retraining_time(experiment, retraining, count)
    predictions = experiment.laplace(config.delta, time=time)
    estimated = class_estimates(predictions, config.class_cov, experiment.context.entry.num_classes)

    def write(rows: dict[str, np.ndarray]) -> None:
        result.write(**content(rows, estimated, classes, base))

    images, test = experiment.prepared(experiment.train), experiment.prepared(experiment.context.test)
    measure = measure_test(test, experiment.context.test.labels)
    rows = retrain_without(experiment, retraining, images, removed, measure, write, extra_draws=1)
    write(rows)
    print(f"with all classes: test accuracy {100 * base[0]:.2f} %, NLL {base[1]:.6f}")
    for c, nll, acc in zip(classes, rows["nll"][1:], rows["acc"][1:], strict=True):
        who = f"{experiment.train.class_names[c]} ({(labels == c).sum()})"
        print(f"without {who}: estimated {estimated['est_nll'][c]:.4f}, test NLL {nll:.4f}, {100 * acc:.2f} %")
    print(result.path)
    print_next("plot_loco.py", ["pickles_folder"], names_exp=[config.name_exp], plot_name=config.name_exp)


if __name__ == "__main__":
    run_script(main, flags={"batch_size": "bs"})
