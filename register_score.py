#!/usr/bin/env python3
r"""Register per-example scores of another project under a new name, which --modes, min_NAME, and Proxy then accept.

Reads FILE: .npy, .npz (one array), .csv (columns index,score, or one column), .json or .pkl (list or dict). A list or
array has one score per training example, in the order of the training set. Reads the data set for its labels. Writes
{metrics_folder}/registered/{mode}/{mode}_{dataset}.pkl and a json file next to it, oriented so that high means
atypical: with --high=typical the scores are negated.

  python register_score.py margins.npy --mode=my_margin --dataset=digits --high=typical
  python register_score.py influence.csv --mode=my_influence --dataset=npz:photos.npz --high=atypical --cost=300
"""

from pathlib import Path

import numpy as np

from src.artifacts.io import file_digest
from src.artifacts.paths import Folders
from src.artifacts.store import check_score_target, write_scores
from src.cli import FULL_DATA_FLAGS, SUBSET_FLAGS, Parser, build, number, print_next, run_script
from src.datasets import DataConfig
from src.datasets.files import write_score_table
from src.errors import FlagError
from src.metrics import SCORES
from src.metrics.external import FORMATS, read_external
from src.metrics.registry import score_entry, score_name


def main() -> None:
    """Parse, read, write, print."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("scores")
    group.add_argument("file", type=Path, metavar="FILE", help=f"scores to register: {FORMATS}")
    group.add_argument(
        "--mode", type=score_name, required=True, metavar="NAME", help="the score's new name: letters, digits, and _"
    )
    group.add_argument(
        "--high", choices=("atypical", "typical"), required=True, help="which examples have high scores in FILE"
    )
    group.add_argument(
        "--cost",
        type=number(float, 0, open_low=True),
        metavar="EPOCHS",
        help="cost of the scores, in forward and backward passes over the training set (default: unknown)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace scores registered from another file")
    parser.add(DataConfig, "data", skip=SUBSET_FLAGS, required=("dataset",))
    parser.add(Folders, "folders", only=("datasets_folder", "metrics_folder"))
    args = parser.parse_args()
    if args.mode in SCORES:
        raise FlagError(f"--mode {args.mode}: is a built-in score; choose another name")
    data = build(DataConfig, args)

    examples = data.examples(args.datasets_folder)
    total = len(examples.labels)
    values = read_external(args.file, total)
    negated = args.high == "typical"
    record = {
        "mode": args.mode,
        "dataset": examples.name,
        "label_hash": examples.label_hash,
        "data_hash": examples.digest,
        "orientation": "high is atypical",
        "negated": negated,
        "source": args.file.name,
        "source_sha256": file_digest(args.file),
        **({} if args.cost is None else {"cost": args.cost}),
    }
    path = score_entry(args.mode).path(args.metrics_folder, examples.name)
    check_score_target(path, record, overwrite=args.overwrite)
    scores = -values if negated else values
    write_scores(path, scores, record)
    write_score_table(path, scores, examples)
    scored = values[~np.isnan(values)]
    print(
        f"{args.mode}: {len(scored)} of {total} examples, {scored.min():.6g} to {scored.max():.6g} in "
        f"{args.file}{', negated' if negated else ''}: {path}"
    )
    keep = [*FULL_DATA_FLAGS, "metrics_folder"]
    print_next("plot_proxies.py", keep, positional=[args.file], modes=[args.mode])


if __name__ == "__main__":
    run_script(main)
