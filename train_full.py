#!/usr/bin/env python3
r"""Train a network on the whole training part of a data set (the premature protocol trains it for few epochs).

Reads the data set (downloaded if need be) under --datasets_folder. Writes checkpoints and results.json to
{models_folder}/standard_{model}_over_{dataset}_with_{optimizer}_sched_{lr_sched}/seed_{seed}/, resume states under
--resume_ckpts_folder and, with --measure_proxies, per-example dynamics and scores under --metrics_folder.

  python train_full.py --dataset=digits --model=lenet --optimizer=sam --epochs=20 --batch_size=128 \
      --learning_rate=0.1 --lr_sched=const --data_augmentation --resume
  python train_full.py --dataset='cifar100' --data_augmentation --model='resnet50' --seed=1234 --optimizer='sgd' \
      --epochs=20 --batch_size=128 --learning_rate=0.1 --lr_sched='const' --resume
"""

from argparse import Namespace

from src.artifacts import standard_experiment
from src.cli import DATA_FLAGS, Parser, print_next, run_script
from src.settings import (
    add_compute_flags,
    add_data_flags,
    add_folder_flags,
    add_model_flags,
    add_run_flags,
    add_training_flags,
)


def main() -> None:
    """Parse, train, print."""
    parser = Parser(__doc__)
    add_data_flags(parser)
    add_model_flags(parser)
    add_training_flags(parser)
    add_run_flags(parser)
    add_compute_flags(parser, training=True)
    add_folder_flags(parser, "datasets", "models", "metrics", "log", "resume_ckpts")
    parser.accept_paper_flags("full")
    args = parser.parse_args()
    from src.session import Session
    from src.training import summary

    with Session(args) as session:
        experiment = standard_experiment(args.model, session.entry.name, args.optimizer, args.lr_sched)
        history = session.run(experiment, session.train)
        if session.group.is_main_process:
            print(summary(history))
            print(session.files(experiment).checkpoints)
            print_next_step(args, session.entry.name)


def print_next_step(args: Namespace, dataset: str) -> None:
    """SAMIS needs a pair, one trained with SGD and one with SAM; of a model on its own, the curvature."""
    from src.training import find_checkpoint

    optimizer = {"sgd": "sam", "sam": "sgd"}.get(args.optimizer)
    run = {"model": args.model, "seed": args.seed, "epochs": args.epochs, "lr_sched": args.lr_sched}
    keep = (*DATA_FLAGS, "models_folder", "device")
    if optimizer is None:
        print_next("compute_hessian_eigen.py", keep, **run, optimizer=args.optimizer)
    elif find_checkpoint(
        args.models_folder,
        standard_experiment(args.model, dataset, optimizer, args.lr_sched),
        args.seed,
        args.epochs,
    ):
        print_next("compute_sam_sgd.py", (*keep, "metrics_folder", "precision"), **run, protocol="full")
    else:
        print_next("train_full.py", drop=("rho", "adaptive"), optimizer=optimizer)


if __name__ == "__main__":
    run_script(main)
