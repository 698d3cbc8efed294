#!/usr/bin/env python3
r"""Average per-example scores over seeds, in the format that Proxy and the other scripts read.

Reads {metrics_folder}/{dataset}/{model}/{seed}/nn_{loss,prob}_diff_score.npz of compute_sam_sgd.py (SAMIS-L, SAMIS-P
and, beside them, the plain mean loss of both networks), or those of the SAMIS authors' code (the score alone), or
{metrics_folder}/{exp}/seed_{seed}/ of a training run with --measure_proxies (all other scores). Writes
{metrics_folder}/{sub}/{mode}_{dataset}.pkl and a json beside it that says how it was made. Seeds of different epochs,
protocols, data or settings are refused.

  python average_scores.py --dataset=digits --model=lenet --seeds 1 2 3
  python average_scores.py --dataset=cifar10 --model=resnet8 --seeds 1 2 3 --optimizer=sgd --modes forg etl flat eps
"""

from argparse import Namespace
from collections.abc import Sequence

from src.artifacts.store import check_score_target, write_scores
from src.cli import DATA_FLAGS, Parser, print_next, restrict, run_script
from src.datasets import load_dataset
from src.errors import FlagError
from src.metrics import SCORES, scores_from
from src.metrics.dynamics import WINDOW, Windows
from src.optimizers import OPTIMIZERS, SCHEDULES
from src.settings import SEED, add_data_flags, add_folder_flags, add_model_choice, add_overwrite_flag, number

PAIR_MODES, RUN_MODES = scores_from("pair"), scores_from("dynamics", "end")


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    add_data_flags(parser, subset=False)
    add_model_choice(parser)
    group = parser.add_argument_group("scores")
    group.add_argument("--seeds", type=SEED, nargs="+", required=True, help="the seeds to average")
    group.add_argument(
        "--modes",
        nargs="+",
        choices=PAIR_MODES + RUN_MODES,
        metavar="MODE",
        help=f"of a pair of networks: {', '.join(PAIR_MODES)} (the default); of a training run: "
        f"{', '.join(RUN_MODES)} (the default where a flag below chooses a run)",
    )
    group.add_argument("--optimizer", choices=tuple(OPTIMIZERS), help="only runs of this optimiser (default: any)")
    group.add_argument("--lr_sched", choices=tuple(SCHEDULES), help="only runs of this schedule (default: any)")
    group.add_argument(
        "--exp",
        metavar="NAME",
        help="the run's name, its folder under --metrics_folder (default: the only one there is)",
    )
    of_window = [score.name for score in SCORES.values() if "window" in score.options]
    group.add_argument(
        "--window", type=number(int, 2), default=WINDOW, help=f"epochs in a window of {', '.join(of_window)}"
    )
    group.add_argument(
        "--el2n_epochs",
        type=number(int, 1),
        nargs=2,
        default=[1, WINDOW],
        metavar=("FIRST", "LAST"),
        help="the epochs that el2n averages over",
    )
    restrict(
        group,
        {
            ("--optimizer", "--lr_sched", "--exp"): (
                lambda args: bool(set(wanted_modes(args)) & set(RUN_MODES)),
                f"on {', '.join(PAIR_MODES)}: it chooses a training run",
            ),
            ("--optimizer", "--lr_sched"): (lambda args: args.exp is None, "beside --exp, which names the run"),
            ("--window",): (
                lambda args: bool(set(wanted_modes(args)) & set(of_window)),
                f"without {', '.join(of_window)}",
            ),
            ("--el2n_epochs",): (lambda args: "el2n" in wanted_modes(args), "without el2n"),
        },
    )
    add_overwrite_flag(group)
    add_folder_flags(parser, "datasets", "metrics")
    args = parser.parse_args()
    if len(set(args.seeds)) < len(args.seeds):
        raise FlagError(f"--seeds: {' '.join(map(str, args.seeds))} names a seed twice; name each once")
    return args


def wanted_modes(args: Namespace) -> Sequence[str]:
    """The scores to average: those asked for, or all of the run, or of the pair."""
    of_run = any(choice is not None for choice in (args.optimizer, args.lr_sched, args.exp))
    return args.modes or (RUN_MODES if of_run else PAIR_MODES)


def main() -> None:
    """Parse, read, average, write, print."""
    args = parse()
    from src.metrics.average import average, find_run, read_pair_seed, read_run_seed

    modes, dataset = wanted_modes(args), args.dataset
    if ":" in dataset:  # own data are named by their content
        train, _ = load_dataset(dataset, args.datasets_folder, image_size=args.image_size, channels=args.channels)
        dataset = train.entry.name

    origin = {"dataset": dataset, "model": args.model}
    per_seed: dict[str, list] = {mode: [] for mode in modes}
    pair_modes, run_modes = ([mode for mode in modes if mode in kind] for kind in (PAIR_MODES, RUN_MODES))
    if run_modes:
        run = find_run(args.metrics_folder, dataset, args.model, args.optimizer, args.lr_sched, args.exp)
    windows = Windows(args.window, tuple(args.el2n_epochs))
    for seed in args.seeds:
        scores = {}
        if pair_modes:
            scores |= read_pair_seed(pair_modes, args.metrics_folder, dataset, args.model, seed)
        if run_modes:
            scores |= read_run_seed(run_modes, args.metrics_folder, run, seed, windows)
        for mode, values in scores.items():
            per_seed[mode].append(values)

    averages = {}
    for mode in modes:
        values, record = average(mode, per_seed[mode])
        sources = [str(seed.source.relative_to(args.metrics_folder)) for seed in per_seed[mode]]
        record = {**origin, **record, "sources": sources}
        if mode in run_modes:
            record["model"] = check_run(args.exp, dataset, record)
        path = SCORES[mode].path(args.metrics_folder, dataset)
        check_score_target(path, record, overwrite=args.overwrite)
        averages[mode] = path, values, record
    for mode, (path, values, record) in averages.items():
        write_scores(path, values, record)
        print(
            f"{SCORES[mode].title}: mean of {len(args.seeds)} seed{'s' * (len(args.seeds) > 1)}, "
            f"before scaling {record['raw_min']:.6g} to {record['raw_max']:.6g}: {path}"
        )
    keep = [name for name in (*DATA_FLAGS, "metrics_folder") if name != "subset"]
    print_next("plot_images.py", keep, modes=list(averages))


def check_run(experiment: str | None, dataset: str, record: dict) -> str:
    """The model of the run, whose name alone may have chosen it; stop if it is of other data."""
    settings = record["settings"]
    if settings.get("dataset", dataset) != dataset:
        raise FlagError(f"--exp {experiment}: is a run on {settings['dataset']}; give it as --dataset, not {dataset}")
    return settings.get("model", record["model"])


if __name__ == "__main__":
    run_script(main, {"mode": "modes"})
