#!/usr/bin/env python3
r"""Train a model on the full training set (for few epochs in the premature protocol).

Reads the data set from --datasets_folder and downloads it if needed. Writes checkpoints and results.json to
{models_folder}/standard_{model}_over_{dataset}_with_{optimizer}_sched_{lr_sched}/seed_{seed}/ and resume states to
--resume_ckpts_folder. With --measure_proxies, also writes per-example dynamics and scores to --metrics_folder.

  python train_full.py --dataset=digits --model=lenet --optimizer=sam --epochs=20 --batch_size=128 \
      --learning_rate=0.1 --lr_sched=const --data_augmentation --resume
  python train_full.py --dataset='cifar100' --data_augmentation --model='resnet50' --seed=1234 --optimizer='sgd' \
      --epochs=20 --batch_size=128 --learning_rate=0.1 --lr_sched='const' --resume
"""

from src.artifacts.paths import TRAINING_FOLDERS, Folders, standard_experiment
from src.cli import DATA_FLAGS, Parser, build, print_next, run_script
from src.datasets import DataConfig
from src.devices import ComputeConfig
from src.metrics.dynamics import EndConfig
from src.models import ModelConfig, model_flag
from src.training import RunConfig, TrainingConfig, add_recipes


def main() -> None:
    """Parse the flags, train, and print the result and the next command."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data")
    parser.add(ModelConfig, "model")
    parser.add(TrainingConfig, "training")
    parser.add(RunConfig, "run")
    parser.add(EndConfig, "run")
    parser.add(ComputeConfig, "computing")
    parser.add(Folders, "folders", only=TRAINING_FOLDERS)
    add_recipes(parser)
    parser.accept_paper_flags("full")
    args = parser.parse_args()
    data, compute, folders = build(DataConfig, args), build(ComputeConfig, args), build(Folders, args)
    config = build(RunConfig, args, model=build(ModelConfig, args), training=build(TrainingConfig, args))
    from src.context import RunContext, TrainingRun
    from src.training import find_checkpoint, summary

    with RunContext(data, compute, folders.datasets_folder, seed=args.seed) as context:
        name = context.entry.name
        experiment = standard_experiment(args.model, name, args.optimizer, args.lr_sched)
        run = TrainingRun(context, config, folders, experiment, context.train, end_scores=args.end_scores)
        history = run.fit()
        if not context.group.is_main_process:
            return
    print(summary(history))
    print(run.files.checkpoints)

    # SAMIS needs a pair of models, one trained with SGD and one with SAM; curvature needs only one model.
    keep = (*DATA_FLAGS, "models_folder", "device")
    flags = {"model": model_flag(args.model), "seed": args.seed, "epochs": args.epochs, "lr_sched": args.lr_sched}
    other = {"sgd": "sam", "sam": "sgd"}.get(args.optimizer)
    if other is None:
        print_next("compute_hessian_eigen.py", keep, **flags, optimizer=args.optimizer)
        return
    experiment = standard_experiment(args.model, name, other, args.lr_sched)
    if find_checkpoint(args.models_folder, experiment, args.seed, args.epochs):
        print_next("compute_sam_sgd.py", (*keep, "metrics_folder", "precision"), **flags, protocol="full")
    else:
        print_next("train_full.py", drop=("rho", "adaptive"), optimizer=other)


if __name__ == "__main__":
    run_script(main)
