#!/usr/bin/env python3
r"""Train a model on 90% of the training set, with one of ten validation splits held out.

Creates the splits for a data set and seed on first use, and reuses them afterwards:
{datasets_folder}/splits/{dataset}/seed_{seed}/val_{1..10}.txt (--splits_folder selects another folder).
Writes checkpoints and results.json to
{models_folder}/split_{model}_over_{dataset}_with_{optimizer}_sched_{lr_sched}_val_split_{i}/seed_{seed}/.
With --samis_validation_split_index=all, trains the ten models in turn and skips finished runs; with none, only
creates the splits, which downloads the data set if needed.

  python train_split.py --dataset=digits --model=lenet --optimizer=sgd --samis_validation_split_index=all \
      --epochs=20 --batch_size=128 --learning_rate=0.1 --lr_sched=step --resume
  python train_split.py --dataset='cifar100' --data_augmentation --model='resnet50' --seed=1234 --optimizer='sgd' \
      --samis_validation_split_index=1 --epochs=160 --batch_size=128 --learning_rate=0.1 --lr_sched='step' --resume
"""

import argparse
from dataclasses import replace

import numpy as np

from src.artifacts.io import label_hash
from src.artifacts.paths import TRAINING_FOLDERS, Folders, split_experiment, splits_folder
from src.cli import DATA_FLAGS, Parser, build, print_next, run_script
from src.datasets import DataConfig, validation_indices
from src.devices import ComputeConfig
from src.errors import FileError, FlagError
from src.metrics.dynamics import EndConfig
from src.models import ModelConfig, model_flag
from src.training import RunConfig, TrainingConfig, add_recipes

SPLITS = range(1, 11)


def split_index(text: str) -> list[int]:
    """Parse the value of ``--samis_validation_split_index``."""
    if text in ("all", "none"):
        return list(SPLITS) if text == "all" else []
    if not text.isdigit() or int(text) not in SPLITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a split; give 1 to 10, all, or none")
    return [int(text)]


def main() -> None:
    """Parse the flags, create the splits, train, and print the results and the next command."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data")
    parser.add(ModelConfig, "model")
    parser.add(TrainingConfig, "training")
    parser.add_argument_group("splits").add_argument(
        "--samis_validation_split_index",
        type=split_index,
        default="1",
        metavar="1..10|all|none",
        help="the validation split to hold out, all ten in turn, or none to create the splits and train nothing",
    )
    parser.add(RunConfig, "run")
    parser.add(EndConfig, "run")
    parser.add(ComputeConfig, "computing")
    parser.add(Folders, "folders", only=(*TRAINING_FOLDERS, "splits_folder"))
    add_recipes(parser)
    parser.accept_paper_flags("split")
    args = parser.parse_args()
    data, compute, folders = build(DataConfig, args), build(ComputeConfig, args), build(Folders, args)
    config = build(RunConfig, args, model=build(ModelConfig, args), training=build(TrainingConfig, args))
    import torch

    from src.context import RunContext, TrainingRun
    from src.training import summary

    with RunContext(data, compute, folders.datasets_folder, seed=args.seed) as context:
        name, indices = context.entry.name, context.train.indices.cpu().numpy()
        if not args.samis_validation_split_index:
            validation_indices(folders.splits, name, args.seed, 10, context.labels, context.entry.num_classes)
            print(splits_folder(folders.splits, name, args.seed))
            print_next("train_split.py", samis_validation_split_index="all")
            return
        for split in args.samis_validation_split_index:
            held_out = validation_indices(
                folders.splits, name, args.seed, split, context.labels, context.entry.num_classes
            )
            keep = np.flatnonzero(~np.isin(indices, held_out))
            if not len(keep):
                raise FlagError(
                    f"--samis_validation_split_index {split}: leaves no training examples; choose another split or "
                    "use more data"
                )
            run = TrainingRun(
                context,
                config,
                folders,
                split_experiment(args.model, name, args.optimizer, args.lr_sched, split),
                context.train.subset(torch.from_numpy(keep)),
                {"validation_split": split, "held_out": label_hash(held_out)},
                args.end_scores,
            )
            done = len(args.samis_validation_split_index) > 1 and run.is_done()
            if not done:
                history = run.fit()
            if context.group.is_main_process and done:
                print(f"split {split}: already done")
            elif context.group.is_main_process:
                print(f"split {split}: {summary(history)}")
                print(run.files.checkpoints)
        if not context.group.is_main_process:
            return

    # SAMIS needs ten pairs of models, each with one trained with SGD and one with SAM.
    optimizers = [args.optimizer, "sam" if args.optimizer == "sgd" else "sgd"]
    for optimizer in optimizers:
        for split in SPLITS:
            experiment = split_experiment(args.model, name, optimizer, args.lr_sched, split)
            try:
                finished = replace(run, experiment=experiment).files.read_results().get("finished")
            except FileError:  # running it reports the damage
                finished = False
            if not finished:
                drop = (
                    () if optimizer == args.optimizer else ("rho", "adaptive", "delta", "hess_init", "iblr_backend")
                )
                print_next("train_split.py", drop=drop, optimizer=optimizer, samis_validation_split_index="all")
                return
    if set(optimizers) == {"sgd", "sam"}:
        print_next(
            "compute_sam_sgd.py",
            (*DATA_FLAGS, "splits_folder", "models_folder", "metrics_folder", "device", "precision"),
            model=model_flag(args.model),
            seed=args.seed,
            epochs=args.epochs,
            lr_sched=args.lr_sched,
            protocol="split",
        )


if __name__ == "__main__":
    run_script(main)
