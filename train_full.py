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

from src.artifacts import standard_experiment
from src.scripting import Parser, run_script
from src.settings import (
    add_compute_flags,
    add_data_flags,
    add_folder_flags,
    add_model_flags,
    add_run_flags,
    add_training_flags,
)
from src.settings.papers import add_dead_flags, add_fixed_func_flag


def main() -> None:
    """Parse, train, print."""
    parser = Parser(__doc__)
    add_data_flags(parser)
    add_model_flags(parser)
    add_training_flags(parser)
    add_run_flags(parser)
    add_compute_flags(parser, training=True)
    add_folder_flags(parser, "datasets", "models", "metrics", "log", "resume_ckpts")
    add_fixed_func_flag(parser, "full")
    add_dead_flags(parser)
    args = parser.parse_args()
    from src.session import Session

    with Session(args) as session:
        experiment = standard_experiment(args.model, session.entry.name, args.optimizer, args.lr_sched)
        history = session.run(experiment, session.train)
        if session.group.leads:
            print(f"test accuracy {100 * history[-1]['test_accuracy']:.2f} % after epoch {len(history)}")
            print(session.files(experiment).checkpoints)


if __name__ == "__main__":
    run_script(main)
