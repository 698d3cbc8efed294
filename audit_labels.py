#!/usr/bin/env python3
r"""Find probably wrong labels in a training set, from class probabilities of models not trained on the example.

Reads out_of_sample_{dataset}.npz, which compute_memorization.py writes (quickest with --folds 5 --members 5), or the
probabilities in any file given with --probabilities. With --combine, averages the ranks with those of stored scores,
such as aum of an ordinary training run. Writes {metrics_folder}/label_errors/{dataset}/label_issues.csv, most
suspicious first, and label_issues.json; and the score of every example, {metrics_folder}/label_errors/
label_error_{dataset}.pkl, which plot_images.py, train_prune.py and evaluate_scores.py read, and .csv.

  python compute_memorization.py --dataset=digits --model=small_mlp --members=5 --folds=5 --epochs=20 \
      --batch_size=32 --learning_rate=0.05 --lr_sched=cosine
  python audit_labels.py --dataset=digits
  python audit_labels.py --dataset=folder:photos --image_size=32 --probabilities=probabilities.npy --top=100
"""

import logging

import numpy as np

from src.artifacts.io import file_digest, write_csv, write_json
from src.artifacts.paths import Folders, label_issues_path, memorization_path
from src.artifacts.store import check_score_target, read_record, write_scores
from src.cli import FULL_DATA_FLAGS, SUBSET_FLAGS, Parser, build, print_next, run_script
from src.datasets import DataConfig, dataset_flag
from src.datasets.files import write_score_table
from src.errors import FileError
from src.metrics import SCORES, Proxy, get_score
from src.metrics.label_errors import (
    AuditConfig,
    audit,
    cleanlab_issues,
    common_mistakes,
    mean_rank,
    read_probabilities,
)
from src.metrics.proxy import ScoreConfig, score_folders

log = logging.getLogger("audit_labels")

MOST_SUSPICIOUS = 5
RELIABLE = 0.7  # out-of-sample accuracy below which mistakes of the models are taken for wrong labels


def main() -> None:
    """Parse, read, audit, write, print."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data", skip=SUBSET_FLAGS, required=("dataset",))
    parser.add(AuditConfig, "audit")
    parser.add(ScoreConfig, "scores")
    parser.add(Folders, "folders", only=("datasets_folder", "metrics_folder"))
    args = parser.parse_args()
    config, data = build(AuditConfig, args), build(DataConfig, args)
    for mode in config.combine:
        get_score(mode, score_folders(args.scores_folder, mode, args.metrics_folder))
    examples = data.examples(args.datasets_folder)
    name, labels, names = examples.name, examples.labels, examples.class_names
    checks = {"n": len(labels), "label_hash": examples.label_hash, "data_hash": examples.digest}

    source = config.probabilities or memorization_path(args.metrics_folder, f"out_of_sample_{name}.npz")
    if config.probabilities is None and not source.exists():
        raise FileError(
            f"{source}: file not found; create it with compute_memorization.py --dataset {dataset_flag(name)} "
            "--folds 5 --members 5, or give --probabilities FILE"
        )
    probabilities = read_probabilities(source, len(labels), len(names), checks["label_hash"])
    combined = {
        mode: Proxy(mode, name, folder=score_folders(args.scores_folder, mode, args.metrics_folder), **checks)
        for mode in config.combine
    }
    settings = {
        "probabilities": file_digest(source),
        "combine": {m: file_digest(p.path) for m, p in combined.items()},
    }
    path, score_path = (
        label_issues_path(args.metrics_folder, name),
        SCORES["label_error"].path(args.metrics_folder, name),
    )
    check_score_target(score_path, {"settings": settings}, overwrite=config.overwrite, only=("settings",))

    if config.cleanlab:
        ranks, issues = cleanlab_issues(probabilities, labels)
    found = audit(probabilities, labels)
    score = mean_rank([found.score, *(proxy.scores for proxy in combined.values())]) if combined else found.score
    order = np.argsort(-score, kind="stable")[: np.count_nonzero(~np.isnan(score))]
    listed = order[: config.top or max(1, round(found.errors))]
    files = examples.files
    rows = [
        {
            "index": i,
            "file": "" if files is None else files[i],
            "given label": names[labels[i]],
            "suggested label": names[found.suggested[i]],
            "probability": f"{found.probability[i]:.4f}",
            "score": f"{score[i]:.6g}",
            "rank": rank,
        }
        for rank, i in enumerate(listed.tolist(), start=1)
    ]
    for row in rows if config.cleanlab else ():
        row |= {"cleanlab rank": ranks[row["index"]], "cleanlab issue": int(issues[row["index"]])}
    costs = [read_record(memorization_path(args.metrics_folder, f"out_prob_{name}.pkl")).get("cost")]
    costs = [None] if config.probabilities else costs + [proxy.record.get("cost") for proxy in combined.values()]
    mistakes = [
        {"suggested label": names[suggested], "given label": names[given], "examples": count}
        for suggested, given, count in common_mistakes(found, labels)
    ]
    facts = {
        "dataset": name,
        "mode": "label_error",
        "label_hash": checks["label_hash"],
        "data_hash": examples.digest,
        "settings": settings,
        "source": str(source),
        "orientation": "high is atypical",
        "negated": False,
        **({} if None in costs else {"cost": sum(costs)}),
    }
    audited = {
        "examples": len(order),
        "estimated_errors": round(found.errors, 2),
        "expected_count": round(found.expected, 2),
        "confident_count": round(found.confident, 2),
        "exponent": found.exponent,
        "strength": found.strength,
        "most_common": mistakes,
        **({"cleanlab_issues": int(issues.sum())} if config.cleanlab else {}),
    }
    written = [write_csv(path, rows), write_json(path.with_suffix(".json"), {**facts, **audited})]
    written += [write_scores(score_path, score, facts)[0], write_score_table(score_path, score, examples)]

    low, high = sorted((found.expected, found.confident))
    print(
        f"about {found.errors:.0f} of {len(order)} labels are probably wrong ({found.errors / len(order):.1%}); "
        f"two estimates: {low:.0f} and {high:.0f}"
    )
    accuracy = np.mean(probabilities[order].argmax(axis=1) == labels[order])
    if accuracy < RELIABLE:
        log.warning(
            "the models predict only %.0f %% of the labels that they were not trained on, so the number of wrong "
            "labels is overestimated, while the order remains useful; give --top, or train better models",
            100 * accuracy,
        )
    if config.cleanlab:
        both = np.count_nonzero(issues[order[: issues.sum()]])
        print(f"cleanlab selects {issues.sum()}, of which {both} are among the {issues.sum()} most suspicious here")
    for pair in mistakes[:3]:
        print(f"{pair['examples']} labeled {pair['given label']} look like {pair['suggested label']}")
    print(f"most suspicious: index{'' if files is None else ', file'}, given label, suggested label (probability)")
    for row in rows[:MOST_SUSPICIOUS]:
        where = f"{row['index']}{'' if files is None else ', ' + row['file']}"
        print(f"  {where}, {row['given label']}, {row['suggested label']} ({row['probability']})")
    print(*written, sep="\n")
    print_next("plot_images.py", [*FULL_DATA_FLAGS, "metrics_folder"], modes=["label_error"])


if __name__ == "__main__":
    run_script(main, {"mode": "combine"})
