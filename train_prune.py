#!/usr/bin/env python3
r"""Choose a part of the training set, and train a fresh network on it.

Reads the data set under --datasets_folder; methods called min_* read a stored score, in --scores_folder and
--metrics_folder where one is given, else in metrics/ or among those that ship with the project; others pre-train
networks, which are kept under {models_folder}/pretrain/ and shared by all methods of the same settings. Writes
selection.npz (indices, weights), checkpoints and results.json (test accuracy per epoch) to
{models_folder}/{coreset_func}_static_coreset_{coreset_mode}_{coreset_fraction}_{model}_over_{dataset}/seed_{seed}/.
With --selection FILE it trains on a selection of anyone's making.

  python train_prune.py --dataset=digits --model=lenet --coreset_func=min_sam-sgd-loss --coreset_fraction=0.5 \
      --coreset_epochs=20 --batch_size=64 --learning_rate=0.1 --lr_sched=const
  python train_prune.py --dataset='cifar100' --data_augmentation --model='resnet50' --seed=1234 --optimizer='sgd' \
      --coreset_mode='large' --coreset_func='min_mem' --coreset_fraction=0.8 --coreset_epochs=80 \
      --coreset_pretrain_epochs=40 --batch_size=256 --per_class=1 --learning_rate=0.1 --lr_sched='step'
"""

from argparse import Namespace

from src.artifacts.locks import lock
from src.cli import DATA_FLAGS, PAPER_FLAGS, Parser, print_next, run_script
from src.settings import (
    add_compute_flags,
    add_data_flags,
    add_downstream_flags,
    add_folder_flags,
    add_method_flags,
    add_model_flags,
    add_run_flags,
    add_selection_flags,
    add_training_flags,
)


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    add_data_flags(parser)
    add_model_flags(parser)
    add_method_flags(parser, file=True)
    add_selection_flags(parser)
    add_downstream_flags(parser)
    add_training_flags(parser, epochs=False)
    add_run_flags(parser)
    add_compute_flags(parser, training=True)
    add_folder_flags(parser, "datasets", "models", "metrics", "log", "resume_ckpts")
    parser.accept_paper_flags()
    args = parser.parse_args()
    args.epochs = args.coreset_epochs
    return args


def main() -> None:
    """Parse, select, train, print."""
    args = parse()
    from src.coresets.runner import CoresetRun, SelectionJob
    from src.session import Session
    from src.training import summary

    with Session(args) as session:
        run = CoresetRun(session, None if args.selection else SelectionJob.of(session), args.selection)
        if not session.group.is_main_process:
            run.train()
            return
        with lock(run.lock, "training this run"):
            history = run.train()
        print(summary(history))
        print(session.files(run.experiment).checkpoints)
        if args.selection:
            keep = (*DATA_FLAGS, "models_folder", "device", "seed")
            print_next("compute_hessian_eigen.py", keep, exp=run.experiment, epochs=args.epochs)
        else:
            print_comparison(args)


def print_comparison(args: Namespace) -> None:
    """Print the command that compares the method with a random choice."""
    share = {"shots": args.shots, "shots_up_to": args.shots_up_to}
    share = {name: [value] for name, value in share.items() if value is not None}
    print_next(
        "compare_pruning.py",
        drop=("coreset_func", "coreset_fraction", "seed", "resume", "distributed_training", "sync_bn", *PAPER_FLAGS),
        funcs=list(dict.fromkeys(["random", args.coreset_func])),
        seeds=[args.seed],
        coreset_epochs=args.coreset_epochs,
        **share or {"fractions": [args.coreset_fraction]},
    )


if __name__ == "__main__":
    run_script(main)
