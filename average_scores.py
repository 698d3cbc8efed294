#!/usr/bin/env python3
r"""Average per-example scores over seeds, in the format that Proxy and the other scripts read.

Reads {metrics_folder}/{dataset}/{model}/{seed}/nn_{loss,prob}_diff_score.npz, written by compute_sam_sgd.py (SAMIS-L,
SAMIS-P, and the mean loss of both models) or by the SAMIS authors' code (the score only), or
{metrics_folder}/{exp}/seed_{seed}/, written by a training run with --measure_proxies (all other scores). Writes
{metrics_folder}/{sub}/{mode}_{dataset}.pkl, a json file next to it that records how it was made, and a csv file with
index, file, class, score, rank (1 is the most atypical example) and rank within class. Seeds with different epochs,
protocols, data, or settings are refused. Scores that need more epochs than the run has are left out unless --modes
names them.

  python average_scores.py --dataset=digits --model=lenet --seeds 1 2 3
  python average_scores.py --dataset=cifar10 --model=resnet8 --seeds 1 2 3 --optimizer=sgd --modes forg etl flat eps
"""

import logging
from argparse import Namespace
from functools import partial

import numpy as np

from src.artifacts.paths import Folders
from src.artifacts.store import check_score_target, write_scores
from src.cli import FULL_DATA_FLAGS, SUBSET_FLAGS, Parser, build, print_next, restrict, run_script
from src.datasets import DataConfig
from src.datasets.files import Examples, write_score_table
from src.errors import FlagError
from src.metrics import SCORES
from src.metrics.average import (
    PAIR_MODES,
    RUN_MODES,
    AverageConfig,
    average,
    find_run,
    read_pair_seed,
    read_run_seed,
    wanted_modes,
)
from src.metrics.dynamics import Windows
from src.metrics.score import warn_if_not_learned
from src.models import ModelConfig

log = logging.getLogger("average_scores")


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data", skip=SUBSET_FLAGS)
    parser.add(ModelConfig, "model", only=("model",))
    parser.add(AverageConfig, "scores", required=("seeds",))
    parser.add(Windows, "scores")
    for name in ("window", "el2n_epochs", "etl_never_learned", "late_epochs"):
        direct = {score.name for score in SCORES.values() if name in score.options}
        readers = [score.name for score in SCORES.values() if {score.name, *score.combines} & direct]
        acts = partial(averages_any, readers)
        restrict(parser, {(f"--{name}",): (acts, f"without {', '.join(readers)}")})
    parser.add(Folders, "folders", only=("datasets_folder", "metrics_folder"))
    return parser.parse_args()


def averages_any(scores: list[str], args: Namespace) -> bool:
    """Whether any of these scores is averaged."""
    return bool(set(wanted_modes(args)) & set(scores))


def main() -> None:
    """Parse, read, average, write, print."""
    args = parse()
    config, windows, data = build(AverageConfig, args), build(Windows, args), build(DataConfig, args)
    modes, dataset = list(wanted_modes(config)), data.dataset
    examples = data.examples_at_hand(args.datasets_folder)
    if examples is not None:  # the name of the user's own data contains a hash of its content
        dataset = examples.name

    origin = {"dataset": dataset, "model": config.model}
    per_seed: dict[str, list] = {mode: [] for mode in modes}
    pair_modes, run_modes = ([mode for mode in modes if mode in kind] for kind in (PAIR_MODES, RUN_MODES))
    if run_modes:
        run = find_run(args.metrics_folder, dataset, config)
    for seed in config.seeds:
        scores = {}
        if pair_modes:
            scores |= read_pair_seed(pair_modes, args.metrics_folder, dataset, config.model, seed)
        if run_modes:
            by_default = config.modes is None
            scores |= read_run_seed(run_modes, args.metrics_folder, run, seed, windows, skip_missing=by_default)
        for mode, values in scores.items():
            per_seed[mode].append(values)
    if missing := [mode for mode in modes if len(per_seed[mode]) < len(config.seeds)]:
        log.info("left out %s: a run is too short for it or did not record what it needs", ", ".join(missing))
        modes = [mode for mode in modes if mode not in missing]

    averages = {}
    for mode in modes:
        values, record = average(mode, per_seed[mode])
        sources = [str(seed.source.relative_to(args.metrics_folder)) for seed in per_seed[mode]]
        record = {**origin, **record, "sources": sources}
        if mode in run_modes:
            record["model"] = check_run(config.exp, dataset, record)
        path = SCORES[mode].path(args.metrics_folder, dataset)
        check_score_target(path, record, overwrite=config.overwrite)
        averages[mode] = path, values, record
    accuracies: list[float] = []
    for mode, (path, values, record) in averages.items():
        write_scores(path, values, record)
        write_score_table(path, values, matching(examples, values, record))
        accuracies += [known for known in record.get("training_accuracy", ()) if known is not None]
        print(
            f"{SCORES[mode].title}: mean of {len(config.seeds)} seed{'s' * (len(config.seeds) > 1)}, "
            f"range before scaling {record['raw_min']:.6g} to {record['raw_max']:.6g}: {path}"
        )
    warn_if_not_learned([SCORES[mode] for mode in averages], min(accuracies, default=None), args.metrics_folder)
    keep = [*FULL_DATA_FLAGS, "metrics_folder"]
    print_next("plot_images.py", keep, modes=list(averages))


def matching(examples: Examples | None, values: np.ndarray, record: dict) -> Examples | None:
    """Return the training examples if the scores are theirs. The file of a catalog data set may have changed."""
    if examples is None:
        log.info("the csv files have no classes, because %s is not in --datasets_folder", record["dataset"])
        return None
    known = record.get("label_hash", examples.label_hash)
    if len(values) == len(examples.labels) and known == examples.label_hash:
        return examples
    log.warning("the csv files have no classes, because %s in --datasets_folder has other labels", record["dataset"])
    return None


def check_run(experiment: str | None, dataset: str, record: dict) -> str:
    """Return the run's model, since --exp may select a run with any model. Refuse a run on another data set."""
    settings = record["settings"]
    if settings.get("dataset", dataset) != dataset:
        raise FlagError(
            f"--exp {experiment}: is a run on {settings['dataset']}, not {dataset}; give that as --dataset"
        )
    return settings.get("model", record["model"])


if __name__ == "__main__":
    run_script(main, {"mode": "modes"})
