#!/usr/bin/env python3
r"""Find exact and near duplicates in a data set, within the training set and between training and test set.

Compares pixels and perceptual hashes; with --checkpoint, also the features of a trained model. Writes
{metrics_folder}/duplicates/{dataset}/duplicates.csv: every training example that duplicates an earlier training
example or a test example, which one that is, how it was found, and how similar they are. --exclude reads this file in
the training and selection scripts. duplicates.json has the counts and the duplicates within the test set.
duplicates.png shows the least similar pairs.

  python find_duplicates.py --dataset=cifar10
  python find_duplicates.py --dataset=folder:photos --image_size=64 \
      --checkpoint=ckpts/standard_fastnet_over_photos-0123abcd_with_sgd_sched_onecycle/seed_1/last.pt
  python train_full.py --dataset=cifar10 --model=resnet18 --exclude=metrics/duplicates/cifar10/duplicates.csv
"""

import logging
from dataclasses import asdict, replace

from src.artifacts.io import file_digest, save_figure, write_csv, write_json
from src.artifacts.paths import Folders, duplicates_stem
from src.artifacts.store import check_score_target
from src.cli import FULL_DATA_FLAGS, Parser, build, print_next, run_script
from src.datasets import DataConfig
from src.devices import TRAINING_ONLY, ComputeConfig
from src.metrics.duplicates import (
    COLUMNS,
    FEATURES,
    PIXELS,
    SHOWN,
    TESTS,
    DuplicateConfig,
    centered_features,
    duplicate_rows,
    find_duplicates,
    fingerprints,
    pairs_figure,
)

log = logging.getLogger("find_duplicates")

MANY = 0.05  # share of near duplicates above which the thresholds are probably too low for the data


def main() -> None:
    """Parse, compare, write, print."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data", skip=("subset", "exclude"), required=("dataset",))
    parser.add(DuplicateConfig, "duplicates")
    parser.add(ComputeConfig, "computing", skip=TRAINING_ONLY)
    parser.add(Folders, "folders", only=("datasets_folder", "metrics_folder"))
    args = parser.parse_args()
    config, data = build(DuplicateConfig, args), build(DataConfig, args)
    from src.context import RunContext

    context = RunContext(data, build(ComputeConfig, args), args.datasets_folder)
    train, test = context.train, context.test  # without examples of the training set that are drawn for testing
    parts = (test, train)  # test examples come first: a training example that equals one is the duplicate
    stem, name = duplicates_stem(args.metrics_folder, train.entry.name), train.entry.name
    thresholds = {
        key: value for key, value in asdict(config).items() if key not in ("checkpoint", "model", "overwrite")
    }
    settings = {
        **thresholds,
        "checkpoint": config.checkpoint and file_digest(config.checkpoint),
        "images": train.digest,
        "subset": context.data_settings["subset"],
    }
    table = stem.with_suffix(".csv")
    check_score_target(table, {"settings": settings}, overwrite=config.overwrite, only=("settings",))

    features = None
    if config.checkpoint is not None:
        features = centered_features(context, config.checkpoint, config.model, parts)
    found = find_duplicates(replace(fingerprints(parts), features=features), config)
    rows = duplicate_rows(found, train, test)
    rows.sort(key=lambda row: -float(row["similarity"]))
    listed, within_test = ([row for row in rows if row["part"] == part] for part in ("train", "test"))

    counts = {test: sum(row["found by"] == test for row in listed) for test in TESTS}
    leaked = sum(row["in"] == "test" for row in listed)
    relabeled = sum(row["class"] != row["its class"] for row in listed)
    facts = {
        "dataset": name,
        "label_hash": context.label_hash,
        "data_hash": train.digest,
        "settings": settings,
        "training_duplicates": {**counts, "of_a_test_example": leaked, "with_another_label": relabeled},
        "within_the_test_set": within_test,
    }
    for suffix in (".png", ".pdf"):  # of an earlier run
        stem.with_suffix(suffix).unlink(missing_ok=True)
    written = [write_csv(table, listed, COLUMNS), write_json(stem.with_suffix(".json"), facts)]
    if rows:
        shown = rows[-SHOWN:][::-1]
        title = f"{name}: {len(shown)} of {len(rows):,} duplicates, the least similar"
        written += save_figure(pairs_figure(shown, parts, title), stem)

    found_by = ", ".join(f"{count:,} by {test}" for test, count in counts.items())
    print(
        f"{len(listed):,} of {len(train):,} training examples duplicate another example ({found_by}); {leaked:,} of "
        f"them a test example; {relabeled:,} have another label than the example that they duplicate"
    )
    print(f"{len(within_test):,} of {len(test):,} test examples duplicate another test example")
    if counts[PIXELS] + counts[FEATURES] > MANY * len(train):
        log.warning(
            "more than %.0f %% of the training examples have a near duplicate: these images resemble one another too "
            "much for the thresholds; look at %s.png and raise --pixel_similarity or --feature_similarity",
            100 * MANY,
            stem,
        )
    print(*written, sep="\n")
    if listed:
        print_next("train_full.py", FULL_DATA_FLAGS, exclude=written[0])


if __name__ == "__main__":
    run_script(main, {})
