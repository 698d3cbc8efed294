#!/usr/bin/env python3
r"""Compare selection methods: a grid of runs of train_prune.py, one table, one figure.

Every cell of the grid (method, fraction, seed) is the run that train_prune.py makes of the same flags, in the same
folders; what is done is skipped, what was interrupted goes on, and pre-trained networks are shared. Any number of
processes may work on one grid at the same time, on one machine or on a file system that they share: start the same
command several times. Writes {plots_folder}/pruning/{model}_over_{dataset}/{name}.{csv,json,md,png,pdf} after every
cell; resume states of finished cells are removed.

  python compare_pruning.py --dataset=digits --model=lenet --funcs random forget min_sam-sgd-loss \
      --fractions 0.1 0.5 --seeds 1 2 3 --coreset_epochs=20 --coreset_pretrain_epochs=10 \
      --batch_size=64 --learning_rate=0.1 --lr_sched=const
  python compare_pruning.py --dataset=cifar100 --data_augmentation --model=resnet18 --funcs random el2n min_mem \
      --fractions 0.1 0.3 0.5 0.7 0.9 --seeds 1 2 3 --full --coreset_epochs=80 --coreset_pretrain_epochs=40 \
      --batch_size=256 --learning_rate=0.1 --lr_sched=step
"""

import logging
from argparse import Namespace

from src.cli import Parser, run_script
from src.settings import (
    SEED,
    add_compute_flags,
    add_data_flags,
    add_downstream_flags,
    add_folder_flags,
    add_model_flags,
    add_run_flags,
    add_selection_flags,
    add_training_flags,
    file_name,
    fraction,
    method_name,
    number,
)

log = logging.getLogger("compare_pruning")


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    grid = parser.add_argument_group("grid")
    add = grid.add_argument
    add("--funcs", type=method_name, nargs="+", required=True, metavar="NAME", help="methods, see train_prune.py")
    share = grid.add_mutually_exclusive_group(required=True)
    share.add_argument(
        "--fractions", type=fraction, nargs="+", metavar="SHARE", help="shares to keep, in (0, 1] (default: none)"
    )
    share.add_argument(
        "--shots", type=number(int, 1), nargs="+", metavar="N", help="examples to keep of each class (default: none)"
    )
    share.add_argument(
        "--shots_up_to",
        type=number(int, 1),
        nargs="+",
        metavar="N",
        help="examples to keep of each class, all of a smaller one (default: none)",
    )
    add("--seeds", type=SEED, nargs="+", default=[1, 2, 3], metavar="SEED", help="seeds of selection and training")
    add("--full", action="store_true", help="train on everything too, as the reference")
    add("--name", type=file_name, default="comparison", help="name of table and figure")
    add("--table_only", action="store_true", help="train nothing: table and figure of what is done")
    add_data_flags(parser)
    add_model_flags(parser)
    add_selection_flags(parser, share=False)
    add_downstream_flags(parser)
    add_training_flags(parser, epochs=False, seed=False)
    add_run_flags(parser, resume=False)
    add_compute_flags(parser, training=True, distributed=False)
    add_folder_flags(parser, "datasets", "models", "metrics", "plots", "log", "resume_ckpts")
    parser.set_defaults(save_epochs="last")
    args = parser.parse_args()
    for name in ("funcs", "fractions", "shots", "shots_up_to", "seeds"):  # each once, in the order given
        setattr(args, name, list(dict.fromkeys(getattr(args, name) or [])))
    args.epochs, args.seed, args.resume = args.coreset_epochs, args.seeds[0], True
    return args


def main() -> None:
    """Parse, run what is missing, draw, print."""
    args = parse()
    from src.coresets.grid import Grid
    from src.session import Session

    with Session(args) as session:
        grid = Grid(session, args)
        grid.check()
        failures = [] if args.table_only else grid.run(after_cell=lambda: grid.write())
        paths = grid.write()
        print(grid.table())
        for path in paths:
            print(path)
        grid.report(failures)


if __name__ == "__main__":
    run_script(main)
