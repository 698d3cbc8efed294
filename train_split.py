#!/usr/bin/env python3
r"""Train a network on 90 % of the training part, leaving one of ten validation splits out.

Makes the splits of a data set and seed at the first call, and reuses them afterwards:
{datasets_folder}/splits/{dataset}/seed_{seed}/val_{1..10}.txt (--splits_folder moves them).
Writes checkpoints and results.json to
{models_folder}/split_{model}_over_{dataset}_with_{optimizer}_sched_{lr_sched}_val_split_{i}/seed_{seed}/.
With --samis_validation_split_index all, the ten are trained in turn; what is done is skipped.

  python train_split.py --dataset=digits --model=lenet --optimizer=sgd --samis_validation_split_index=all \
      --epochs=20 --batch_size=128 --learning_rate=0.1 --lr_sched=step --resume
  python train_split.py --dataset='cifar100' --data_augmentation --model='resnet50' --seed=1234 --optimizer='sgd' \
      --samis_validation_split_index=1 --epochs=160 --batch_size=128 --learning_rate=0.1 --lr_sched='step' --resume
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import numpy as np

from src.artifacts import label_hash, split_experiment
from src.cli import DATA_FLAGS, Parser, print_next, run_script
from src.datasets import validation_indices
from src.errors import FileError, FlagError
from src.settings import (
    add_compute_flags,
    add_data_flags,
    add_folder_flags,
    add_model_flags,
    add_run_flags,
    add_training_flags,
    splits_folder,
)

if TYPE_CHECKING:
    from src.session import Session

SPLITS = range(1, 11)


def split_index(text: str) -> list[int]:
    """The splits that the flag asks for."""
    if text == "all":
        return list(SPLITS)
    if not text.isdigit() or int(text) not in SPLITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a split; give 1 to 10, or all")
    return [int(text)]


def main() -> None:
    """Parse, make the splits, train, print."""
    parser = Parser(__doc__)
    add_data_flags(parser)
    add_model_flags(parser)
    add_training_flags(parser)
    parser.add_argument_group("splits").add_argument(
        "--samis_validation_split_index",
        type=split_index,
        default="1",
        metavar="1..10|all",
        help="the validation split that is left out, or all ten in turn",
    )
    add_run_flags(parser)
    add_compute_flags(parser, training=True)
    add_folder_flags(parser, "datasets", "splits", "models", "metrics", "log", "resume_ckpts")
    parser.accept_paper_flags("split")
    args = parser.parse_args()
    from src.session import Session

    with Session(args) as session:
        for index in args.samis_validation_split_index:
            train_one(session, index, skip_done=len(args.samis_validation_split_index) > 1)
        if session.group.is_main_process:
            print_next_step(session)


def train_one(session: Session, index: int, skip_done: bool) -> None:
    """Train without split ``index``."""
    import torch

    from src.training import summary

    args, name = session.args, session.entry.name
    experiment = split_experiment(args.model, name, args.optimizer, args.lr_sched, index)
    held_out = validation_indices(
        splits_folder(args),
        name,
        args.seed,
        index,
        session.whole_train.labels.cpu().numpy(),
        session.entry.num_classes,
    )
    keep = ~np.isin(session.train.indices.cpu().numpy(), held_out)
    train = session.train.subset(torch.from_numpy(np.flatnonzero(keep)))
    if not len(train):
        raise FlagError(
            f"--samis_validation_split_index {index}: leaves no training example; take another split, or more data"
        )
    more = {"validation_split": index, "held_out": label_hash(held_out)}
    if skip_done and session.is_done(experiment, train, more):
        if session.group.is_main_process:
            print(f"split {index}: done already")
        return
    history = session.run(experiment, train, more_settings=more)
    if session.group.is_main_process:
        print(f"split {index}: {summary(history)}")
        print(session.files(experiment).checkpoints)


def is_finished(session: Session, experiment: str) -> bool:
    """Whether another run is finished; one with damaged files is not, and says so when it is run."""
    try:
        return bool(session.files(experiment).read_results().get("finished"))
    except FileError:
        return False


def print_next_step(session: Session) -> None:
    """SAMIS needs ten pairs, each trained with SGD and with SAM."""
    args = session.args
    optimizers = [args.optimizer, "sam" if args.optimizer == "sgd" else "sgd"]
    for optimizer in optimizers:
        runs = [split_experiment(args.model, session.entry.name, optimizer, args.lr_sched, index) for index in SPLITS]
        if not all(is_finished(session, run) for run in runs):
            drop = () if optimizer == args.optimizer else ("rho", "adaptive", "delta", "hess_init")
            print_next("train_split.py", drop=drop, optimizer=optimizer, samis_validation_split_index="all")
            return
    if set(optimizers) == {"sgd", "sam"}:
        print_next(
            "compute_sam_sgd.py",
            (*DATA_FLAGS, "splits_folder", "models_folder", "metrics_folder", "device", "precision"),
            model=args.model,
            seed=args.seed,
            epochs=args.epochs,
            lr_sched=args.lr_sched,
            protocol="split",
        )


if __name__ == "__main__":
    run_script(main)
