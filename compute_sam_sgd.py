#!/usr/bin/env python3
r"""Score every training example with SAMIS: how much an SGD-trained and a SAM-trained model disagree about it.

Reads the checkpoints of one epoch in --models_folder, written by train_split.py (ten splits: each example is scored
by the pair that was not trained on it) or train_full.py (premature protocol: one pair, in sample). Writes the
unnormalized scores of the seed to {metrics_folder}/{dataset}/{model}/{seed}/nn_{loss,prob}_diff_score.npz, which
average_scores.py reads.

  python compute_sam_sgd.py --dataset=digits --model=lenet --seed=1 --epochs=20 --protocol=full
  python compute_sam_sgd.py --dataset='cifar100' --model='resnet50' --seed=1234 --epochs=160
"""

from __future__ import annotations

import logging
from argparse import Namespace
from contextlib import suppress

import numpy as np
from tqdm import tqdm

from src.artifacts.paths import Folders
from src.artifacts.store import read_record
from src.cli import FULL_DATA_FLAGS, Parser, build, print_next, run_script
from src.datasets import DataConfig
from src.devices import TRAINING_ONLY, ComputeConfig
from src.errors import FileError
from src.metrics import SCORES, Proxy, find_score_file
from src.metrics.compare import half_overlaps, spearman_test
from src.metrics.proxy import ScoreConfig, score_folders
from src.metrics.samis import FIELDS, SamisConfig, SamisRun, save_seed
from src.models import ModelConfig, model_flag

log = logging.getLogger("compute_sam_sgd")


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data")
    parser.add(ModelConfig, "models", only=("model",))
    parser.add(SamisConfig, "models")
    parser.add(ScoreConfig, "scores")
    parser.add(ComputeConfig, "computing", skip=TRAINING_ONLY)
    parser.add(Folders, "folders", only=("datasets_folder", "splits_folder", "models_folder", "metrics_folder"))
    parser.accept_paper_flags()
    return parser.parse_args()


def main() -> None:
    """Parse, find the models, score, print, save."""
    args = parse()
    config, folders = build(SamisConfig, args), build(Folders, args)
    data, compute = build(DataConfig, args), build(ComputeConfig, args)
    from src.context import RunContext

    context = RunContext(data, compute, folders.datasets_folder)
    name = context.entry.name
    checks = {"n": len(context.labels), "label_hash": context.label_hash}
    memorization = read_memorization(args, name, checks)  # read first, so that a damaged file stops the script early
    run = SamisRun(context, config, folders)
    protocol, pairs = run.find_pairs()
    log.info("protocol %s: %d pair(s) of models", protocol, len(pairs))
    settings = run.settings(protocol, pairs)
    run.check_files(settings)

    scores = {field: np.full(len(context.labels), np.nan) for field in FIELDS}
    costs: list[float | None] = []
    for pair in tqdm(pairs, unit="pair", disable=None):
        indices, found, cost = run.score(pair)
        costs.append(cost)
        for field, values in found.items():
            scores[field][indices] = values
        if len(indices):
            parts = [
                f"{optimizer.upper()} loss {found[f'loss_{optimizer}'].mean():.5f} "
                f"accuracy {100 * found[f'correct_{optimizer}'].mean():.2f} %"
                for optimizer in ("sgd", "sam")
            ]
            where = "all examples, in sample" if pair.split is None else f"split {pair.split}, out of sample"
            tqdm.write(f"{where} ({len(indices)}): {', '.join(parts)}")

    digest = context.full_train.digest
    total = None if None in costs else sum(costs)
    written = save_seed(folders.metrics_folder, scores, settings, context.label_hash, digest, total)
    report(scores, memorization)
    print(*written, sep="\n")
    seeds, averaged = run.scored_seeds(settings), set()
    with suppress(FileError, TypeError):  # average_scores.py reports a damaged record
        averaged = set(read_record(SCORES["samis_loss"].path(folders.metrics_folder, name)).get("seeds", ()))
    print_next(
        "average_scores.py",
        [*FULL_DATA_FLAGS, "metrics_folder"],
        model=model_flag(config.model),
        seeds=seeds,
        overwrite=(bool(averaged) and averaged < set(seeds)) or None,
    )


def read_memorization(args: Namespace, dataset: str, checks: dict) -> Proxy | None:
    """Read the memorization scores to compare with.

    If --scores_folder is given, it must contain them. Otherwise, the function searches --metrics_folder, where this
    script writes, and then the default folders, and returns None if there are none. Scores in the default folders,
    such as those that ship with the project, may be of other data with this name; they are then not compared.
    """
    folders = score_folders(args.scores_folder, "mem")
    if folders is not None:
        return Proxy("mem", dataset, folder=folders, **checks)
    for folder in (args.metrics_folder, None):
        with suppress(FileError):
            find_score_file("mem", dataset, folder)
            break
    else:
        return None
    try:
        return Proxy("mem", dataset, folder=folder, **checks)
    except FileError as error:
        if folder is not None:
            raise
        log.info("%s; skipping the comparison with memorization", error)
        return None


def report(scores: dict[str, np.ndarray], memorization: Proxy | None) -> None:
    """Print statistics of the scores and, if memorization scores exist, the agreement with them."""
    scored = np.flatnonzero(~np.isnan(scores["samis_loss"]))
    for title, field in (("SAMIS-L", "samis_loss"), ("SAMIS-P", "samis_prob")):
        values = scores[field][scored]
        print(
            f"{title}: mean {values.mean():.6g}, median {np.median(values):.6g}, "
            f"min {values.min():.6g}, max {values.max():.6g}"
        )
    if memorization is None:
        return
    for title, field in (("SAMIS-L", "samis_loss"), ("SAMIS-P", "samis_prob")):
        a, b = scores[field][scored], memorization.scores[scored]
        rho, p_value = spearman_test(a, b)
        shared = half_overlaps(a, b)
        print(
            f"{title} and memorization: Spearman {rho:.4f} (p = {p_value:.2g}), shared examples: lower half "
            f"{shared.lower} of {shared.lower_size}, upper half {shared.upper} of {shared.upper_size}"
        )


if __name__ == "__main__":
    run_script(main)
