#!/usr/bin/env python3
r"""Track sensitivities while variational online Newton learns a Bayesian softmax regression (Figure 11a).

Reads the data set in --datasets_folder. Learns a Gaussian with a full covariance over the weights of a linear model
(Equation 29). After each checkpoint, writes {pickles_folder}/{name_exp}_von.pkl: the sensitivities (checkpoints, N)
and the test accuracy and NLL after selected updates. plot_von_logistic.py plots this file. The precision matrix has
(D C)^2 entries, for C classes and D independent pixels: 140 MB for 6,000 images of MNIST.

  python 7_von_logistic.py --name_exp mnist_von --dataset MNIST --subset first_6000.txt --delta 0.1 --bs 200
  python 7_von_logistic.py --name_exp digits --dataset digits --delta 0.1 --bs 48
"""

from __future__ import annotations

import logging
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import mpe
from mpe.config import EXPERIMENT_FOLDERS, SIDE_BY_SIDE, ExperimentConfig, VonConfig
from src.artifacts.io import read_checkpoint, write_checkpoint
from src.artifacts.locks import lock
from src.artifacts.paths import LOCK_NAME, Folders
from src.artifacts.store import load_result
from src.cli import Parser, build, number, print_next, run_script
from src.datasets import DataConfig
from src.devices import TRAINING_ONLY, ComputeConfig
from src.errors import FlagError
from src.lazy import torch
from src.rng import generator

log = logging.getLogger("7_von_logistic")

SHARES = (0.04, 0.08, 0.2, 1)  # the paper's checkpoints 5, 10, 25 and 125, as fractions of 125 updates
SHARED = ("name_exp", "seed", "bs", "delta", "resume", "overwrite", "class_cov", "pickles_folder")
ROWS = ("sensitivity", *(f"sensitivity_{form}" for form in mpe.CLASS_COVARIANCES), "train_accs", "train_nlls",
        "test_accs", "test_nlls")  # fmt: skip
SAVE_SECONDS = 60.0  # minimum time between two states, which are large


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data", defaults={"dataset": "mnist"})
    defaults = {"name_exp": "mnist_von", "bs": 200, "delta": 0.1}
    parser.add(ExperimentConfig, "experiment", only=SHARED, defaults=defaults)
    parser.add(VonConfig, "variational online Newton")
    parser.add_argument(
        "--checkpoints",
        type=number(int, 1),
        nargs="+",
        metavar="UPDATE",
        help="updates after which to measure; the last ends the run (default: 5 10 25 125, or the same fractions)",
    )
    parser.add(ComputeConfig, "computing", skip=TRAINING_ONLY, choices=SIDE_BY_SIDE)
    parser.add(Folders, "folders", only=EXPERIMENT_FOLDERS)
    args = parser.parse_args()
    if args.checkpoints and max(args.checkpoints) > args.updates:
        raise FlagError(
            f"--checkpoints {max(args.checkpoints)}: the run has {args.updates} updates; give 1 to {args.updates}"
        )
    return args


def main() -> None:
    """Configure, learn, measure, save, print."""
    args = parse()
    config = build(ExperimentConfig, args, model="logistic")
    own = build(VonConfig, args)
    data, compute, folders = build(DataConfig, args), build(ComputeConfig, args), build(Folders, args)
    from mpe.experiment import Experiment, forms_of
    from mpe.posterior import Predictions
    from mpe.von import Von, row_basis

    experiment = Experiment(config, data, compute, folders, "von", vars(args))
    count, train = experiment.count, experiment.train
    checkpoints = args.checkpoints or [max(1, round(share * own.updates)) for share in SHARES]
    checkpoints = sorted(set(checkpoints))
    result, forms = experiment.result(checkpoints=checkpoints), forms_of(config.class_cov)
    head = experiment.model.head

    images = experiment.prepared(train).flatten(1)
    pixels = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)  # the last column multiplies the bias
    basis = row_basis(pixels)
    features = pixels @ basis
    start = count * own.hess_init + config.delta
    von = Von(
        head.out_features, basis.shape[1], num_examples=count, delta=config.delta, precision_init=start, like=features
    )
    log.info(
        "%d images, %d weights in %d independent directions", count, pixels.shape[1] * len(von.mean), von.mean.numel()
    )

    def measure(update: int) -> dict[str, Any]:
        """Compute sensitivities, and evaluate the mean of the posterior on the test set."""
        logits, variances = von.predict(features, full=len(forms) > 1)
        of_all = (train.indices, train.labels, logits.double(), variances.double())
        predictions = Predictions(*(values.cpu() for values in of_all))
        weights = von.mean @ basis.mT
        with torch.no_grad():
            head.weight.copy_(weights[:, :-1])
            head.bias.copy_(weights[:, -1])
        test_accuracy, test_loss = experiment.test_metrics()
        scores = mpe.sampled_sensitivities(predictions, forms, config.seed, update)
        log.info(
            f"update {update}: train accuracy {100 * predictions.accuracy:.2f} % NLL {predictions.nll:.6f}; test "
            f"accuracy {100 * test_accuracy:.2f} % NLL {test_loss:.6f}"
        )
        found = {f"sensitivity_{form}": row for form, row in zip(forms, scores, strict=True)}
        return {
            **found,
            "sensitivity": found[f"sensitivity_{config.class_cov}"],
            "train_accs": predictions.accuracy,
            "train_nlls": predictions.nll,
            "test_accs": test_accuracy,
            "test_nlls": test_loss,
        }

    state_path = experiment.files.resume / "von.pt"
    settings = result.settings
    with lock(state_path.parent / LOCK_NAME, "running this experiment"):
        state = load_result(state_path, settings, read_state, overwrite=config.overwrite) if config.resume else None
        rows = {
            int(step): {name: result.stored[name][k] for name in ROWS if name in result.stored}
            for k, step in enumerate(result.stored.get("steps", ()))
        }
        done = checkpoints[-1] if checkpoints[-1] in rows else 0
        if state is not None:
            von.restore(state)
            done = state["step"]
        if done:
            log.info("continuing after update %d of %d", done, checkpoints[-1])
        else:
            state_path.unlink(missing_ok=True)
        rows = result.rows_before(rows, checkpoints, done + 1, "measurements after update")
        per_epoch, saved = -(-count // config.bs), time.monotonic()
        for update in range(done + 1, checkpoints[-1] + 1):
            epoch, batch = divmod(update - 1, per_epoch)
            order = torch.randperm(count, generator=generator(config.seed, epoch + 1, "VON batches"))
            chosen = order[batch * config.bs : (batch + 1) * config.bs].to(features.device)
            noise = torch.randn(
                own.samples, von.mean.numel(), generator=generator(config.seed, update, "VON samples")
            )
            rate = own.lr + (own.lrmin - own.lr) * (update - 1) / max(own.updates - 1, 1)
            von.step(features[chosen], train.labels[chosen], noise.to(features), rate, own.lr_precision)
            if update in checkpoints:
                rows[update] = measure(update)
                columns = {name: np.array([rows[step][name] for step in sorted(rows)]) for name in rows[update]}
                result.write(**columns, steps=np.array(sorted(rows), dtype=np.int64))
            if update < checkpoints[-1] and (update in checkpoints or time.monotonic() - saved > SAVE_SECONDS):
                write_checkpoint(state_path, {"settings": settings, "step": update, **von.state()})
                saved = time.monotonic()
        state_path.unlink(missing_ok=True)
    last = rows[checkpoints[-1]]
    print(f"train accuracy {100 * last['train_accs']:.2f} %, NLL {last['train_nlls']:.6f}")
    print(f"test accuracy {100 * last['test_accs']:.2f} %, NLL {last['test_nlls']:.6f}")
    print(result.path)
    print_next("plot_von_logistic.py", ["pickles_folder"], name_exp=config.name_exp)


def read_state(path: Path) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """Read a state of VON and its settings."""
    state = read_checkpoint(path)
    return state, state.get("settings")


if __name__ == "__main__":
    run_script(main, flags={"batch_size": "bs"})
