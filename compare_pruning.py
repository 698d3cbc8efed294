#!/usr/bin/env python3
r"""Compare selection methods: a grid of runs of train_prune.py, one table, one figure.

Each cell of the grid (method, fraction, seed) is the run that train_prune.py makes with the same flags, in the same
folders. Finished runs are skipped, interrupted runs continue, and pre-trained models are shared. Writes
{plots_folder}/pruning/{model}_over_{dataset}/{name}.{csv,json,md} after every cell and {name}.{png,pdf} once a minute
and at the end. Resume states of finished cells are removed. The cells are trained one after another; the workflow
trains them in several processes, on one machine or a cluster (workflow/config/pruning_grid.yaml, docs/scaling.md).

  python compare_pruning.py --dataset=digits --model=lenet --funcs random forget min_sam-sgd-loss \
      --fractions 0.1 0.5 --seeds 1 2 3 --coreset_epochs=20 --coreset_pretrain_epochs=10 \
      --batch_size=64 --learning_rate=0.1 --lr_sched=const
  python compare_pruning.py --dataset=cifar100 --data_augmentation --model=resnet18 --funcs random el2n min_mem \
      --fractions 0.1 0.3 0.5 0.7 0.9 --seeds 1 2 3 --full --coreset_epochs=80 --coreset_pretrain_epochs=40 \
      --batch_size=256 --learning_rate=0.1 --lr_sched=step
"""

from src.artifacts.paths import TRAINING_FOLDERS, Folders
from src.cli import Parser, build, run_script
from src.coresets.config import GridConfig, PretrainConfig, add_selection_flags, build_selection
from src.coresets.registry import REFERENCE
from src.datasets import DataConfig
from src.devices import ComputeConfig
from src.errors import TrainingError
from src.models import ModelConfig
from src.training import RunConfig, TrainingConfig

SHARES = ("coreset_fraction", "shots", "shots_up_to")


def main() -> None:
    """Parse flags, run missing cells, draw, print."""
    parser = Parser(__doc__)
    parser.add(GridConfig, "grid", required=("funcs", "share"))
    parser.add(DataConfig, "data")
    parser.add(ModelConfig, "model")
    add_selection_flags(parser, skip=("coreset_func", "selection", *SHARES))
    parser.add(TrainingConfig, "training", skip=("seed", "epochs"))
    parser.add(RunConfig, "run", skip=("resume",), defaults={"save_epochs": "last"})
    parser.add(ComputeConfig, "computing", skip=("distributed_training", "sync_bn"))
    parser.add(Folders, "folders", only=(*TRAINING_FOLDERS, "plots_folder"))
    args = parser.parse_args()
    data, compute, folders = build(DataConfig, args), build(ComputeConfig, args), build(Folders, args)
    grid, pretrain = build(GridConfig, args), build(PretrainConfig, args)
    first = {"shots": next(iter(grid.shots), None), "shots_up_to": next(iter(grid.shots_up_to), None)}
    selections = {
        func: build_selection(args, coreset_func=func, coreset_fraction=None, **first)
        for func in (*grid.funcs, REFERENCE)
    }
    training = build(TrainingConfig, args, seed=grid.seeds[0], epochs=args.coreset_epochs)
    config = build(RunConfig, args, model=build(ModelConfig, args), training=training, resume=True)
    from src.context import RunContext
    from src.coresets.grid import Grid

    with RunContext(data, compute, folders.datasets_folder, seed=training.seed) as context:
        table = Grid(context, grid, selections, pretrain, config, folders)
        table.check()
        failures = {} if grid.table_only else table.run()
        paths = table.write()
    print(table.table())
    for path in paths:
        print(path)
    if failures:
        cell, reason = next(iter(failures.items()))
        raise TrainingError(f"{len(failures)} of {len(table.runs)} cells failed; first failure: {cell}: {reason}")


if __name__ == "__main__":
    run_script(main, {"method": "funcs", "mode": "funcs", "fraction": "fractions"})
