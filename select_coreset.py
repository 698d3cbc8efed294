#!/usr/bin/env python3
r"""Choose a part of the training set, without training on it.

Reads what the method needs as train_prune.py does, and pre-trains the same networks where they are not on disk.
Writes an npz file: indices (int64, original), weights (float64), label_hash, total, settings (json), seconds; by
default to where train_prune.py of the same flags looks for it.

  python select_coreset.py --dataset=digits --model=lenet --coreset_func=craig --coreset_fraction=0.3 \
      --coreset_pretrain_epochs=10 --coreset_pretrain_lr=0.05 --out=craig.npz
  python train_prune.py --dataset=digits --model=lenet --selection=craig.npz --coreset_epochs=20 --batch_size=64 \
      --learning_rate=0.05 --lr_sched=const
"""

from argparse import Namespace
from pathlib import Path

import numpy as np

from src.cli import DATA_FLAGS, Parser, print_next, run_script
from src.coresets import METHODS
from src.errors import FlagError
from src.settings import (
    add_augmentation_flags,
    add_compute_flags,
    add_data_flags,
    add_folder_flags,
    add_method_flags,
    add_model_flags,
    add_overwrite_flag,
    add_seed_flag,
    add_selection_flags,
)


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    add_data_flags(parser)
    add_model_flags(parser)
    add_method_flags(parser)
    add_selection_flags(parser)
    group = parser.add_argument_group("run")
    add_seed_flag(group)
    add_augmentation_flags(group)
    group.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: train_prune.py's)")
    add_overwrite_flag(group)
    add_compute_flags(parser, training=True, distributed=False)
    add_folder_flags(parser, "datasets", "models", "metrics", "log", "resume_ckpts")
    parser.set_defaults(save_epochs="last", epochs=1)
    args = parser.parse_args()
    if METHODS[args.coreset_func].dynamic:
        raise FlagError(
            f"--coreset_func {args.coreset_func}: chooses again in each epoch of training; use train_prune.py"
        )
    return args


def main() -> None:
    """Parse, select, write, print."""
    args = parse()
    from src.coresets.runner import SelectionJob, select
    from src.session import Session

    with Session(args) as session:
        choice = SelectionJob.of(session, args.out)
        selection, seconds = select(choice, overwrite=args.overwrite)
        print(f"{len(selection.indices)} of {len(session.train)} examples by {args.coreset_func} in {seconds:.2f} s")
        labels = session.train.labels.cpu().numpy()[selection.indices]
        counts = np.bincount(labels, minlength=session.entry.num_classes)
        print(f"per class: {counts.min()} to {counts.max()}")
        print(choice.path)
        training = (
            *DATA_FLAGS,
            *("model", "pretrained", "seed", "data_augmentation", "cutout_holes", "cutout_length"),
            *("models_folder", "metrics_folder", "log_folder", "resume_ckpts_folder"),
            *("device", "precision", "deterministic", "compile"),
        )
        print_next("train_prune.py", training, selection=choice.path)


if __name__ == "__main__":
    run_script(main)
