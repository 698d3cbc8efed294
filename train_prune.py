#!/usr/bin/env python3
r"""Select a subset of the training set and train a new model on it.

Reads the data set under --datasets_folder. Methods named min_* read a stored score from --scores_folder or
--metrics_folder if given, otherwise from metrics/ or from the scores that ship with the project. Other methods
pre-train models, which are stored under {models_folder}/pretrain/ and shared by all methods with the same settings.
Writes selection.npz (indices, weights), checkpoints and results.json (test accuracy per epoch) to
{models_folder}/{coreset_func}_static_coreset_{coreset_mode}_{coreset_fraction}_{model}_over_{dataset}/seed_{seed}/.
With --selection FILE, it trains on the examples listed in that file.

  python train_prune.py --dataset=digits --model=lenet --coreset_func=min_sam-sgd-loss --coreset_fraction=0.5 \
      --coreset_epochs=20 --batch_size=64 --learning_rate=0.1 --lr_sched=const
  python train_prune.py --dataset='cifar100' --data_augmentation --model='resnet50' --seed=1234 --optimizer='sgd' \
      --coreset_mode='large' --coreset_func='min_mem' --coreset_fraction=0.8 --coreset_epochs=80 \
      --coreset_pretrain_epochs=40 --batch_size=256 --per_class=1 --learning_rate=0.1 --lr_sched='step'
"""

from contextlib import nullcontext

from src.artifacts.locks import lock
from src.artifacts.paths import TRAINING_FOLDERS, Folders
from src.cli import DATA_FLAGS, PAPER_FLAGS, Parser, build, print_next, run_script
from src.coresets.config import PretrainConfig, add_selection_flags, build_selection
from src.datasets import DataConfig
from src.devices import ComputeConfig
from src.models import ModelConfig
from src.training import RunConfig, TrainingConfig


def main() -> None:
    """Parse, select, train, print."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data")
    parser.add(ModelConfig, "model")
    add_selection_flags(parser, required=("method",))
    parser.add(TrainingConfig, "training", skip=("epochs",))
    parser.add(RunConfig, "run")
    parser.add(ComputeConfig, "computing")
    parser.add(Folders, "folders", only=TRAINING_FOLDERS)
    parser.accept_paper_flags()
    args = parser.parse_args()
    data, compute, folders = build(DataConfig, args), build(ComputeConfig, args), build(Folders, args)
    selection, pretrain = build_selection(args), build(PretrainConfig, args)
    training = build(TrainingConfig, args, epochs=args.coreset_epochs)
    config = build(RunConfig, args, model=build(ModelConfig, args), training=training)
    from src.context import RunContext
    from src.coresets.runner import CoresetRun
    from src.training import summary

    with RunContext(data, compute, folders.datasets_folder, seed=args.seed) as context:
        run = CoresetRun(context, selection, pretrain, config, folders)
        main_process = context.group.is_main_process
        with lock(run.lock, "training this run") if main_process else nullcontext():
            history = run.train()
        if not main_process:
            return
    print(summary(history))
    print(run.files.checkpoints)
    if args.selection:
        keep = (*DATA_FLAGS, "models_folder", "device", "seed")
        print_next("compute_hessian_eigen.py", keep, exp=run.experiment, epochs=args.coreset_epochs)
        return

    # suggest a comparison with random selection, which shows whether the method is worth its cost
    share = {name: [getattr(args, name)] for name in ("shots", "shots_up_to") if getattr(args, name) is not None}
    print_next(
        "compare_pruning.py",
        drop=("coreset_func", "coreset_fraction", "seed", "resume", "distributed_training", "sync_bn", *PAPER_FLAGS),
        funcs=list(dict.fromkeys(["random", args.coreset_func])),
        seeds=[args.seed],
        coreset_epochs=args.coreset_epochs,
        **share or {"fractions": [args.coreset_fraction]},
    )


if __name__ == "__main__":
    run_script(main, {"method": "coreset_func", "mode": "coreset_func", "fraction": "coreset_fraction"})
