#!/usr/bin/env python3
r"""Score every training example with SAMIS: how differently an SGD-trained and a SAM-trained network treat it.

Reads the checkpoints of one epoch that train_split.py (ten splits: each example is scored by the pair that never saw
it) or train_full.py (premature protocol: one pair, in sample) wrote under --models_folder. Writes the un-normalised
scores of the seed to {metrics_folder}/{dataset}/{model}/{seed}/nn_{loss,prob}_diff_score.npz; average_scores.py reads
them.

  python compute_sam_sgd.py --dataset=digits --model=lenet --seed=1 --epochs=20 --protocol=full
  python compute_sam_sgd.py --dataset='cifar100' --model='resnet50' --seed=1234 --epochs=160
"""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from src.artifacts.io import label_hash
from src.artifacts.paths import samis_path
from src.artifacts.store import read_record
from src.cli import DATA_FLAGS, Parser, print_next, run_script
from src.datasets import load_dataset, parse_subset, validation_indices
from src.devices import PRECISIONS
from src.errors import FileError
from src.metrics import SCORES, Proxy, find_score_file
from src.metrics.compare import half_overlaps, spearman_test
from src.models import MODELS
from src.optimizers import SCHEDULES
from src.settings import (
    SEED,
    add_compute_flags,
    add_data_flags,
    add_folder_flags,
    add_model_choice,
    add_overwrite_flag,
    add_score_flags,
    number,
    score_folders,
    splits_folder,
)

if TYPE_CHECKING:
    from src.datasets import ImageSet
    from src.metrics.pairs import Pair, Query

log = logging.getLogger("compute_sam_sgd")


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    add_data_flags(parser)
    add_model_choice(parser)
    group = parser.add_argument_group("networks")
    group.add_argument("--seed", type=SEED, default=1, help="seed of both networks")
    group.add_argument("--epochs", type=number(int, 1), default=160, help="epoch whose checkpoints are compared")
    group.add_argument(
        "--protocol",
        choices=("auto", "split", "full"),
        default="auto",
        help="split: ten validation splits, out of sample; full: one pair trained on everything, in sample; "
        "auto: split if all its checkpoints exist, else full",
    )
    group.add_argument(
        "--lr_sched",
        choices=tuple(SCHEDULES),
        help="schedule in the runs' names (default: the only one there is)",
    )
    group.add_argument("--batch_size", type=number(int, 1), default=512, help="examples scored at a time")
    add_overwrite_flag(group)
    add_score_flags(parser)
    add_compute_flags(parser)
    add_folder_flags(parser, "datasets", "splits", "models", "metrics")
    parser.accept_paper_flags()
    return parser.parse_args()


def main() -> None:
    """Parse, find the networks, score, print, save."""
    args = parse()
    from src.devices import prepare, resolve_device
    from src.metrics.pairs import Query, find_pairs, training_settings
    from src.metrics.samis import FIELDS, STORED, load_seed, save_seed
    from src.training import image_facts

    device = resolve_device(args.device)
    prepare(device, PRECISIONS[args.precision], args.deterministic)
    train, _ = load_dataset(args.dataset, args.datasets_folder, image_size=args.image_size, channels=args.channels)
    whole_labels = train.labels.numpy()
    name = train.entry.name
    query = Query(args.models_folder, args.model, name, args.seed, args.epochs, args.lr_sched, args.dataset)
    memorization = read_memorization(args, name, whole_labels)
    protocol, pairs = find_pairs(query, args.protocol)
    log.info("protocol %s: %d pair(s) of networks", protocol, len(pairs))
    facts = {
        "dataset": name,
        "model": args.model,
        "seed": args.seed,
        "epoch": args.epochs,
        "protocol": protocol,
        "precision": args.precision,
        "subset": None,
        **image_facts(train),
        **training_settings(pairs),
    }
    chosen = train.to(device)
    if args.subset is not None:
        chosen = chosen.subset(parse_subset(args.subset, train.total, train.labels))
        facts["subset"] = label_hash(chosen.indices.cpu().numpy())
    settings = {**facts, "labels": label_hash(whole_labels)}
    for score in STORED.values():
        path = samis_path(args.metrics_folder, name, args.model, args.seed, score.seed_file)
        load_seed(path, settings, overwrite=args.overwrite)  # refuses one that was made otherwise
    scores = {field: np.full(train.total, np.nan) for field in FIELDS}
    for pair in tqdm(pairs, unit="pair", disable=None):
        score_one(args, query, pair, chosen, train, facts, scores)
    written = save_seed(
        args.metrics_folder,
        name,
        args.model,
        args.seed,
        scores,
        epoch=args.epochs,
        protocol=protocol,
        label_hash=label_hash(whole_labels),
        data_hash=train.digest,
        settings=json.dumps(facts, sort_keys=True),
    )
    report(scores, memorization)
    print(*written, sep="\n")
    seeds = scored_seeds(args.metrics_folder, name, args.model, settings)
    averaged = set()
    with suppress(FileError, TypeError):  # a damaged record is for average_scores.py to refuse
        averaged = set(read_record(SCORES["samis_loss"].path(args.metrics_folder, name)).get("seeds", ()))
    print_next(
        "average_scores.py",
        [name for name in (*DATA_FLAGS, "metrics_folder") if name != "subset"],
        model=args.model,
        seeds=seeds,
        overwrite=(bool(averaged) and averaged < set(seeds)) or None,
    )


def scored_seeds(metrics_folder: Path, dataset: str, model: str, settings: dict) -> list[int]:
    """The seeds that are scored with the settings of this one."""
    from src.metrics.samis import load_seed

    seeds = []
    for folder in samis_path(metrics_folder, dataset, model, 0, "loss").parents[1].iterdir():
        path = samis_path(metrics_folder, dataset, model, folder.name, "loss")
        if folder.name.isdigit() and load_seed(path, settings, overwrite=True, ignore=("seed",)):
            seeds.append(int(folder.name))
    return sorted(seeds)


def read_memorization(args: Namespace, dataset: str, labels: np.ndarray) -> Proxy | None:
    """The memorization scores to compare with; a bad file is found before the work.

    None where there are none, unless --scores_folder is given, which must have them. --metrics_folder is where this
    script writes, so that the default folders are searched after it.
    """
    checks = {"n": len(labels), "label_hash": label_hash(labels)}
    folders = score_folders(args.scores_folder, "mem")
    if folders is not None:
        return Proxy("mem", dataset, folder=folders, **checks)
    for folder in (args.metrics_folder, None):
        with suppress(FileError):
            find_score_file("mem", dataset, folder)
            break
    else:
        return None
    return Proxy("mem", dataset, folder=folder, **checks)


def score_one(
    args: Namespace, query: Query, pair: Pair, chosen: ImageSet, whole: ImageSet, facts: dict, scores: dict
) -> None:
    """Score the examples that belong to one pair, and print how good its networks are on them."""
    import torch

    from src.datasets import Batches
    from src.metrics.pairs import load_pair, score_pair

    entry = chosen.entry
    images, held_out = chosen, None
    if pair.split is not None:
        held_out = validation_indices(
            splits_folder(args), entry.name, args.seed, pair.split, whole.labels.numpy(), entry.num_classes
        )
        images = chosen.subset(torch.from_numpy(np.flatnonzero(np.isin(chosen.indices.cpu().numpy(), held_out))))
    sgd, sam, state = load_pair(pair, query, whole, held_out, facts["subset"])
    if state["differing"]:
        log.warning("the two models differ in more than the optimizer: %s", ", ".join(state["differing"]))
    if not len(images):
        return
    layout = torch.channels_last if MODELS[args.model].channels_last else torch.contiguous_format
    dtype = PRECISIONS[args.precision].dtype
    networks = [network.to(images.labels.device, dtype, memory_format=layout) for network in (sgd, sam)]
    batches = Batches(
        images,
        args.batch_size,
        normalization=state["normalisation"],
        device=images.labels.device,
        dtype=dtype,
        channels_last=MODELS[args.model].channels_last,
    )
    indices, fields = score_pair(*networks, batches, precision=args.precision)
    for optimizer, path in (("sgd", pair.sgd), ("sam", pair.sam)):
        if not np.isfinite(fields[f"loss_{optimizer}"]).all():
            raise FileError(f"{path}: gives losses that are not finite; train it again with a lower --learning_rate")
    for field, values in fields.items():
        scores[field][indices] = values
    where = "all examples, in sample" if pair.split is None else f"split {pair.split}, out of sample"
    parts = [
        f"{optimizer.upper()} loss {fields[f'loss_{optimizer}'].mean():.5f} "
        f"accuracy {100 * fields[f'correct_{optimizer}'].mean():.2f} %"
        for optimizer in ("sgd", "sam")
    ]
    tqdm.write(f"{where} ({len(indices)}): {', '.join(parts)}")


def report(scores: dict[str, np.ndarray], memorization: Proxy | None) -> None:
    """Print the scores' statistics and, where memorisation is known, how well they agree with it."""
    scored = np.flatnonzero(~np.isnan(scores["samis_loss"]))
    for title, field in (("SAMIS-L", "samis_loss"), ("SAMIS-P", "samis_prob")):
        values = scores[field][scored]
        print(
            f"{title}: mean {values.mean():.6g}, median {np.median(values):.6g}, "
            f"smallest {values.min():.6g}, largest {values.max():.6g}"
        )
    if memorization is None:
        return
    for title, field in (("SAMIS-L", "samis_loss"), ("SAMIS-P", "samis_prob")):
        a, b = scores[field][scored], memorization.scores[scored]
        rho, p_value = spearman_test(a, b)
        shared = half_overlaps(a, b)
        print(
            f"{title} and memorisation: Spearman {rho:.4f} (p = {p_value:.2g}), in both lower halves "
            f"{shared.lower} of {shared.lower_size}, in both upper halves {shared.upper} of {shared.upper_size}"
        )


if __name__ == "__main__":
    run_script(main)
