#!/usr/bin/env python3
r"""Compare estimated sensitivities with leave-one-out retraining (Figure 2).

Trains a model and estimates, with a Laplace posterior, how much its prediction on every training example would
change if that example were left out. Then retrains the model without one random example at a time, for --n_retrain
examples, many models in parallel. With --checkpoint, the base model is that file's instead of a newly trained one.
Reads the data set in --datasets_folder. Writes {pickles_folder}/{name_exp}_scores.pkl (the estimates) and, as
models finish, {name_exp}_retrain.pkl (the true deviations); plot_validation_sensitivities.py plots both.
Several processes can share the retraining: first --retrain_part none trains the base model and estimates, then each
retrains its models with --retrain_part FIRST-LAST --resume, and --resume alone joins the parts.

  python 3_validation_sensitivities.py --name_exp mnist_mlp --dataset MNIST --model large_mlp --lr 1e-2 --lrmin 1e-3 \
      --bs 256 --epochs 500 --delta 100 --lr_retrain 1e-3 --lrmin_retrain 1e-4 --epochs_retrain 300 --n_retrain 1000 \
      --bs_jacs 50
  python 3_validation_sensitivities.py --name_exp digits --dataset digits --model small_mlp --epochs 30 --bs 32 \
      --delta 1 --n_retrain 20 --epochs_retrain 20
"""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import mpe
from mpe.config import EXPERIMENT_FOLDERS, ONE_PROCESS, SIDE_BY_SIDE, ExperimentConfig, RetrainingConfig
from src.artifacts.paths import Folders
from src.cli import Parser, build, number, print_next, run_script
from src.datasets import DataConfig
from src.devices import ComputeConfig
from src.errors import FileError, FlagError
from src.lazy import torch
from src.models import ModelConfig

log = logging.getLogger("3_validation_sensitivities")

DEFAULTS = {
    "name_exp": "mnist_mlp",
    "model": "large_mlp",
    "lrmin": 1e-3,
    "epochs": 500,
    "delta": 100.0,
    "bs_jacs": 50,
}
PASS = 500  # images per forward pass of an ensemble, counting an image once per member


def retrain_part(text: str) -> list[int]:
    """Parse the value of ``--retrain_part``: the first and the last model, or an empty list for ``none``."""
    if text == "none":
        return []
    first, dash, last = text.partition("-")
    if not (dash and first.isdigit() and last.isdigit() and int(first) <= int(last)):
        raise ArgumentTypeError(f"{text!r}: give a part such as 0-49, or none")
    return [int(first), int(last)]


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data", defaults={"dataset": "mnist"})
    parser.add(ModelConfig, "model", only=("model",), defaults={"model": "large_mlp"})
    parser.add(ExperimentConfig, "experiment", skip=("hess_init", "iblr_backend"), defaults=DEFAULTS)
    parser.add(RetrainingConfig, "retraining")
    add = parser.add_argument_group("examples left out").add_argument
    add(
        "--n_retrain", type=number(int, 0), default=1000, help="number of random examples to leave out, one at a time"
    )
    add(
        "--n_spread",
        type=number(int, 0),
        default=0,
        help="number of additional examples, spread evenly over the range of the estimated sensitivities",
    )
    add(
        "--retrain_part",
        type=retrain_part,
        metavar="FIRST-LAST|none",
        help="retrain only these models, from the base model of an earlier run; model 0 is the control, model i "
        "lacks the i-th example; none: train the base model and estimate, retrain nothing (default: all models, with "
        "--resume those that no part has finished)",
    )
    parser.add(ComputeConfig, "computing", skip=ONE_PROCESS, choices=SIDE_BY_SIDE)
    parser.add(Folders, "folders", only=EXPERIMENT_FOLDERS)
    args = parser.parse_args()
    if args.retrain_part and not args.resume:
        raise FlagError("--retrain_part: continues from the base model of an earlier run; give --resume")
    return args


def score_content(predictions: mpe.Predictions, class_cov: str, weights: str) -> dict:
    """The content of the file of estimates: ``sensitivities`` ``(N,)`` with the requested form, and all other forms.

    It also contains the model's probabilities ``(N, C)``, with which retraining is compared, and the hash of its
    weights.
    """
    from mpe.experiment import forms_of

    estimates = {form: mpe.estimate(predictions, form) for form in forms_of(class_cov)}
    scores = {form: mpe.sensitivity(found).numpy() for form, found in estimates.items()}
    return {
        "sensitivities": scores[class_cov],
        **{f"sensitivities_{form}": values for form, values in scores.items()},
        "indices": predictions.indices.numpy(),
        "labels": predictions.labels.numpy(),
        "unstable": int(estimates[class_cov].unstable.sum()),
        "probabilities": predictions.probabilities.numpy(),
        "train_acc": predictions.accuracy,
        "train_nll": predictions.nll,
        "base_weights": weights,
    }


def drawn_examples(count: int, number: int, seed: int) -> np.ndarray:
    """Draw ``number`` of ``count`` positions with numpy's legacy generator, like the paper's code."""
    return np.random.RandomState(seed).permutation(count)[:number]


def spread_examples(scores: np.ndarray, number: int, taken: Sequence[int] = ()) -> np.ndarray:
    """Positions of the scores closest to ``number`` values evenly spaced from the highest to the lowest score.

    Each position is used once, and none of ``taken``. Ties are broken by position.
    """
    free = np.ones(len(scores), dtype=bool)
    free[np.asarray(taken, dtype=np.int64)] = False
    chosen = []
    for value in np.linspace(scores.max(), scores.min(), number):
        nearest = int(np.where(free, np.abs(scores - value), np.inf).argmin())
        free[nearest] = False
        chosen.append(nearest)
    return np.array(chosen, dtype=np.int64)


def measure_removed(images: torch.Tensor, removed: np.ndarray) -> Callable:
    """Build the function that measures retrained models. Model 0 is the control; model i + 1 lacks ``removed[i]``.

    Args:
        images: All training images, normalized, on the device.
        removed: Positions ``(R,)`` of the removed examples.

    Returns:
        A function of an ensemble and the numbers of its members. It returns ``probabilities`` ``(m, C)``, each
        model's prediction on its removed example (NaN for the control), and ``control`` ``(1, R, C)``, the control's
        predictions on all removed examples, or ``(0, R, C)`` if the control is not a member.
    """

    def softmax(logits: torch.Tensor) -> np.ndarray:
        return logits.detach().double().softmax(-1).cpu().numpy()

    def measure(ensemble, members: range) -> dict[str, np.ndarray]:
        own = torch.tensor([int(removed[max(member - 1, 0)]) for member in members], device=images.device)
        probabilities = softmax(ensemble.member_logits(images[own].unsqueeze(1)))[:, 0]
        control = np.empty((0, len(removed), probabilities.shape[1]))
        if 0 in members:
            first = members.index(0)
            probabilities[first] = np.nan
            parts = torch.from_numpy(removed).split(max(1, PASS // len(ensemble)))
            of_parts = [softmax(ensemble.logits(images[part.to(images.device)])[first]) for part in parts]
            control = np.concatenate(of_parts)[None]
        return {"probabilities": probabilities, "control": control}

    return measure


def retrain_content(
    rows: dict[str, np.ndarray], removed: np.ndarray, spread: int, base: np.ndarray, indices: np.ndarray
) -> dict:
    """The content of the file of true deviations, for the models retrained so far.

    Args:
        rows: The measurements of ``measure_removed`` for models 0, 1, ...
        removed: Positions ``(R,)`` of the removed examples.
        spread: The number of examples at the end of ``removed`` that are spread over the range of the estimates.
        base: Softmax ``(N, C)`` of the base model.
        indices: Original indices ``(N,)``.
    """
    probabilities = rows["probabilities"][1:]
    done = removed[: len(probabilities)]
    control = rows["control"][0, : len(done)]
    deviations, corrected = probabilities - base[done], probabilities - control
    return {
        "indices_retrain": done.astype(np.int64),
        "softmax_deviations": np.abs(deviations).sum(1),
        "softmax_deviations_corrected": np.abs(corrected).sum(1),
        "probability_deviations": deviations,
        "probability_deviations_corrected": corrected,
        "base_probabilities": base[done],
        "control_probabilities": control,
        "indices_original": indices[done],
        "spread": np.arange(len(done)) >= len(removed) - spread,
    }


def main() -> None:
    """Configure, train, estimate, retrain, save, print."""
    args = parse()
    config = build(ExperimentConfig, args)
    retraining = build(RetrainingConfig, args)
    data, compute, folders = build(DataConfig, args), build(ComputeConfig, args), build(Folders, args)
    from mpe.experiment import Experiment
    from mpe.retraining import check_retraining, retrain_without, retraining_time, weights_hash

    experiment = Experiment(config, data, compute, folders, "retrain", vars(args))
    wanted, count = args.n_retrain + args.n_spread, experiment.count
    if not 0 < wanted <= count:
        raise FlagError(
            f"--n_retrain {args.n_retrain} and --n_spread {args.n_spread}: cannot leave out {wanted} of {count} "
            f"training examples; the sum must be 1 to {count}"
        )
    part = range(args.retrain_part[0], args.retrain_part[1] + 1) if args.retrain_part else None
    if part and part[-1] > wanted:
        raise FlagError(f"--retrain_part {part[0]}-{part[-1]}: the models are 0 to {wanted}; give a part of them")
    check_retraining(experiment, retraining, [count, count - 1])
    experiment.check_variances(config.delta)
    scores, retrained = experiment.result("scores"), experiment.result("retrain")
    if retrained.replaces and not part:
        retrained.path.unlink()  # its settings would not match those of the new scores file

    if part:
        experiment.load_base()
    else:
        experiment.train_base()
    weights = weights_hash(experiment.model)
    found = scores.stored
    if part and found.get("base_weights") != weights:
        raise FileError(f"{scores.path}: has no estimates of this base model; run with --retrain_part none first")
    if found.get("base_weights") == weights:  # computed for these weights
        log.info("reusing the estimates of an earlier run: %s", scores.path)
    else:
        time = retraining_time(experiment, retraining, count - 1)
        found = score_content(experiment.laplace(config.delta, time=time), config.class_cov, weights)
        scores.write(**found)
    print(scores.path)
    print(f"train accuracy {100 * found['train_acc']:.2f} %, NLL {found['train_nll']:.6f}")
    accuracy, loss = experiment.test_metrics()
    print(f"test accuracy {100 * accuracy:.2f} %, NLL {loss:.6f}")

    removed = drawn_examples(count, args.n_retrain, config.seed)
    removed = np.concatenate([removed, spread_examples(found["sensitivities"], args.n_spread, removed)])

    def write(rows: dict[str, np.ndarray]) -> None:
        retrained.write(**retrain_content(rows, removed, args.n_spread, found["probabilities"], found["indices"]))

    if args.retrain_part == []:
        print_next("3_validation_sensitivities.py", retrain_part=f"0-{wanted}", resume=True)
        return
    images = experiment.prepared(experiment.train)
    leave_out = [np.empty(0, np.int64), *removed[:, None]]
    share = partial(retrain_without, experiment, retraining, images, leave_out, measure_removed(images, removed))
    if part:
        share(lambda rows: None, part=part)
        print(f"models {part[0]} to {part[-1]} of {wanted} are retrained; --resume without --retrain_part joins all")
        return
    write(share(write))
    print(retrained.path)
    print_next("plot_validation_sensitivities.py", ["pickles_folder"], name_exp=config.name_exp)


if __name__ == "__main__":
    run_script(main, flags={"batch_size": "bs"})
