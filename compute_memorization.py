#!/usr/bin/env python3
r"""Estimate how much a model memorizes each training example, by training models on random subsets.

Memorization of an example (Feldman and Zhang 2020) is the accuracy on it of models that were trained on it, minus the
accuracy of models that were not. Trains --members models on a random share of every class and writes what they
predict to {metrics_folder}/memorization/members/{dataset}/{model}/seed_{seed}/. An interrupted run continues where it
stopped. With --folds K, member k is trained on all but fold k of a cross-validation. With --members FIRST-LAST
--train_only, trains a part of the members, and with --merge, joins parts; with --from_splits, uses the models of
train_split.py. Writes {metrics_folder}/memorization/:
mem_{dataset}.pkl (from correctness), mem_prob_{dataset}.pkl (from the probability of the label) and
out_prob_{dataset}.pkl (minus its out-of-sample mean), each with a json and a csv file; estimates_{dataset}.npz with
standard errors and counts; out_of_sample_{dataset}.npz with class probabilities; and, with --influence,
influence_{dataset}.npy.

  python compute_memorization.py --dataset=digits --model=small_mlp --members=2000 --epochs=20 --batch_size=32 \
      --learning_rate=0.1 --lr_sched=cosine
  python compute_memorization.py --dataset=cifar100 --recipe=fast --members=200 --target_se=0.05
"""

from __future__ import annotations

import numpy as np

from src.artifacts.paths import Folders
from src.cli import FULL_DATA_FLAGS, Parser, build, print_next, restrict, run_script
from src.datasets import DataConfig
from src.devices import TRAINING_ONLY, ComputeConfig
from src.metrics.memorization import MemorizationConfig
from src.models import ModelConfig
from src.training import RunConfig, TrainingConfig, add_recipes

OF_TRAINING = (
    "learning_rate", "lr_min", "weight_decay", "rho", "adaptive", "delta", "hess_init", "iblr_backend", "seed",
    "data_augmentation", "alternate_flips", "cutout_holes", "cutout_length", "pretrained", "init", "nesterov",
)  # fmt: skip


def main() -> None:
    """Parse, train members or find trained models, estimate, write, print."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data")
    parser.add(ModelConfig, "model")
    parser.add(MemorizationConfig, "members")
    parser.add(TrainingConfig, "training")
    parser.add(RunConfig, "run", skip=("resume", "save_epochs", "measure_proxies"))
    parser.add(ComputeConfig, "computing", skip=TRAINING_ONLY)
    parser.add(Folders, "folders", only=("datasets_folder", "splits_folder", "models_folder", "metrics_folder"))
    trained = (lambda args: args.from_splits is None, "with --from_splits, which trains no models")
    restrict(parser, {tuple(f"--{name}" for name in OF_TRAINING): trained})
    reads = (lambda args: args.from_splits is not None, "without --from_splits")
    restrict(parser, {("--models_folder", "--splits_folder"): reads})
    add_recipes(parser)
    args = parser.parse_args()
    config, folders = build(MemorizationConfig, args), build(Folders, args)
    data, compute = build(DataConfig, args), build(ComputeConfig, args)
    run_config = build(RunConfig, args, model=build(ModelConfig, args), training=build(TrainingConfig, args))
    from src.context import RunContext
    from src.metrics.members import MemorizationRun

    with RunContext(data, compute, folders.datasets_folder, seed=args.seed) as context:
        run = MemorizationRun(context, run_config, config, folders)
        last = config.members[1]
        if config.from_splits is None:
            last = run.train()
            missing = run.files.missing(last)
            before = len(missing) and missing[-1] < config.members[0]
            if config.train_only or (before and config.merge is None):
                print(f"members {config.members[0]} to {last} are in {run.files.folder}")
                print_next(
                    "compute_memorization.py",
                    drop=("members", "merge", "train_only"),
                    members=last,
                    merge=["FOLDERS"],
                )
                return
        results = run.results(last)
        written = run.write(results)
        if config.influence:
            written.append(run.write_influence(last))
    for title, found in (("memorization", results.correct), ("memorization of the probability", results.probability)):
        high, total = np.count_nonzero(found.value > 0.5), len(found.value)
        median = found.median_error
        error = "no standard error" if median is None else f"median standard error {median:.4f}"
        print(f"{title}: mean {found.value.mean():.4f}, {high} of {total} examples above 0.5, {error}")
    print(*written, sep="\n")
    keep = [*FULL_DATA_FLAGS, "metrics_folder"]
    if config.folds is None:
        print_next("plot_images.py", keep, modes=["mem"])
    else:
        print_next("audit_labels.py", keep)


if __name__ == "__main__":
    run_script(main)
