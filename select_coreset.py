#!/usr/bin/env python3
r"""Select a subset of the training set, without training on it.

Reads the same inputs as train_prune.py and pre-trains the same models unless they are on disk. Writes an npz file
with indices (int64, original), weights (float64), label_hash, total, settings (json) and seconds, and a csv file next
to it with index, file, class and weight. By default they are written where train_prune.py looks for the npz file when
run with the same flags. With --materialize, also writes the selected images as a folder with one folder per class.

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
from src.datasets.files import materialize, require_new_folder, write_selection_table
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
    output.add_argument("--out", type=Path, metavar="FILE.npz", help="output file (default: train_prune.py's path)")
    output.add_argument(
        "--materialize",
        type=Path,
        metavar="DIR",
        help="also write the selected images to DIR/CLASS/, a new folder: hard links to the files of folder:DIR "
        "(copies on another file system), PNG files for other data sets (default: not written)",
    )
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
    if args.out is not None and args.out.suffix != ".npz":
        raise ArgumentError("out", f"{args.out}: must end with .npz")
    if args.materialize is not None:
        require_new_folder(args.materialize)
    from src.context import RunContext
    from src.coresets.runner import CoresetRun

    with RunContext(data, compute, folders.datasets_folder, seed=args.seed) as context:
        run = CoresetRun(context, selection, pretrain, config, folders, args.out)
        chosen, seconds = run.select()
        selected = context.train.subset(chosen.indices)
        written = [run.path, write_selection_table(run.path, selected, chosen.weights)]
        if args.materialize is not None:
            written.append(materialize(selected, args.materialize))
    print(
        f"{len(chosen.indices)} of {len(context.train)} examples selected by {args.coreset_func} in {seconds:.2f} s"
    )
    counts = np.bincount(selected.labels.cpu().numpy(), minlength=context.entry.num_classes)
    print(f"per class: {counts.min()} to {counts.max()}")
    print(*written, sep="\n")
    training = (
        *DATA_FLAGS,
        *("model", "pretrained", "init", "seed", *AUGMENTATION),
        *("models_folder", "metrics_folder", "log_folder", "resume_ckpts_folder"),
        *("device", "precision", "deterministic", "compile"),
    )
    print_next("train_prune.py", training, selection=run.path)


if __name__ == "__main__":
    run_script(main, {"method": "coreset_func", "mode": "coreset_func", "fraction": "coreset_fraction"})
