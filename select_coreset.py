#!/usr/bin/env python3
r"""Select a subset of the training set, without training on it.

Reads the same inputs as train_prune.py and pre-trains the same models unless they are on disk. Writes an npz file
with indices (int64, original), weights (float64), label_hash, total, settings (json) and seconds. By default it is
written where train_prune.py looks for it when run with the same flags.

  python select_coreset.py --dataset=digits --model=lenet --coreset_func=craig --coreset_fraction=0.3 \
      --coreset_pretrain_epochs=10 --coreset_pretrain_lr=0.05 --out=craig.npz
  python train_prune.py --dataset=digits --model=lenet --selection=craig.npz --coreset_epochs=20 --batch_size=64 \
      --learning_rate=0.05 --lr_sched=const
"""

from pathlib import Path

import numpy as np

from src.artifacts.paths import TRAINING_FOLDERS, Folders
from src.cli import DATA_FLAGS, Parser, build, print_next, run_script
from src.coresets.config import PretrainConfig, add_selection_flags, build_selection
from src.datasets import DataConfig
from src.devices import ComputeConfig
from src.errors import ArgumentError
from src.models import ModelConfig
from src.training import RunConfig, TrainingConfig

AUGMENTATION = ("data_augmentation", "cutout_holes", "cutout_length")


def main() -> None:
    """Parse, select, write, print."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data")
    parser.add(ModelConfig, "model")
    add_selection_flags(parser, skip=("selection", "coreset_epochs"), required=("method",))
    parser.add(TrainingConfig, "run", only=("seed",))
    parser.add(RunConfig, "run", only=(*AUGMENTATION, "overwrite"))
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="FILE", help="output file (default: train_prune.py's path)")
    parser.add(ComputeConfig, "computing", skip=("distributed_training", "sync_bn"))
    parser.add(Folders, "folders", only=TRAINING_FOLDERS)
    args = parser.parse_args()
    data, compute, folders = build(DataConfig, args), build(ComputeConfig, args), build(Folders, args)
    selection, pretrain = build_selection(args), build(PretrainConfig, args)
    config = build(RunConfig, args, model=build(ModelConfig, args), training=build(TrainingConfig, args))
    if selection.method.dynamic:
        raise ArgumentError(
            "coreset_func", f"{args.coreset_func}: selects again in each training epoch; use train_prune.py"
        )
    from src.context import RunContext
    from src.coresets.runner import CoresetRun

    with RunContext(data, compute, folders.datasets_folder, seed=args.seed) as context:
        run = CoresetRun(context, selection, pretrain, config, folders, args.out)
        chosen, seconds = run.select()
    print(
        f"{len(chosen.indices)} of {len(context.train)} examples selected by {args.coreset_func} in {seconds:.2f} s"
    )
    labels = context.train.labels.cpu().numpy()[chosen.indices]
    counts = np.bincount(labels, minlength=context.entry.num_classes)
    print(f"per class: {counts.min()} to {counts.max()}")
    print(run.path)
    training = (
        *DATA_FLAGS,
        *("model", "pretrained", "seed", *AUGMENTATION),
        *("models_folder", "metrics_folder", "log_folder", "resume_ckpts_folder"),
        *("device", "precision", "deterministic", "compile"),
    )
    print_next("train_prune.py", training, selection=run.path)


if __name__ == "__main__":
    run_script(main, {"method": "coreset_func", "mode": "coreset_func", "fraction": "coreset_fraction"})
