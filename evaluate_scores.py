#!/usr/bin/env python3
r"""Evaluate scores against a reference: rank agreement with intervals, overlap at the top, and cost, in one table.

The reference is a score (by default memorization), a file with one number per training example such as C-scores, or,
with --planted, the known positions of wrong labels. Reads score files from --scores_folder and --metrics_folder if
given, otherwise from metrics/ or from the scores shipped with the project. Writes
{plots_folder}/scores/{dataset}/against_{reference}.{csv,json,md} and, as PNG and PDF, a figure of agreement against
cost with the Pareto front. With --members, also writes {plots_folder}/scores/{dataset}/lds.{csv,json,md}: the linear
datamodeling score of attributions, on the models that compute_memorization.py trained on random subsets.

  python evaluate_scores.py --dataset=cifar100 --scores_folder=src/metrics --orient
  python evaluate_scores.py --dataset=digits --reference=samis_loss --examples=odd
  python evaluate_scores.py --dataset=digits --members=metrics/memorization/members/digits/small_mlp/seed_1 \
      --mpe_checkpoint=ckpts/standard_small_mlp_over_digits_with_sgd_sched_cosine/seed_1/last.pt
"""

import logging
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np

from src.artifacts.io import save_figure
from src.artifacts.paths import Folders, evaluation_stem, lds_stem
from src.cli import FULL_DATA_FLAGS, SUBSET_FLAGS, Parser, build, print_next, restrict, run_script
from src.datasets import DataConfig
from src.devices import ComputeConfig
from src.errors import FileError, FlagError
from src.metrics import SCORES, Proxy, get_score
from src.metrics.evaluation import (
    EvaluationConfig,
    evaluate,
    find_scores,
    is_score,
    load_labels,
    markdown,
    planted_mask,
    write_rows,
    wrong_signs,
)
from src.metrics.external import read_external
from src.metrics.lds import LdsConfig, lds_markdown, lds_row, read_attribution, read_subsets
from src.metrics.proxy import ScoreConfig, score_folders

log = logging.getLogger("evaluate_scores")


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data", skip=SUBSET_FLAGS)
    parser.add(ScoreConfig, "scores")
    parser.add(EvaluationConfig, "evaluation")
    parser.add(LdsConfig, "linear datamodeling score")
    parser.add(ComputeConfig, "computing", only=("device",))
    restrict(parser, {("--device",): (lambda args: args.mpe_checkpoint is not None, "without --mpe_checkpoint")})
    parser.add(Folders, "folders", only=("datasets_folder", "metrics_folder", "plots_folder"))
    args = parser.parse_args()
    folders = (args.scores_folder, args.metrics_folder)
    if args.planted is None and not (is_score(args.reference, *folders) or Path(args.reference).exists()):
        raise FlagError(
            f"--reference {args.reference}: is neither a score nor a file; choose from {', '.join(SCORES)}, or a "
            "registered score"
        )
    for mode in args.modes or ():
        get_score(mode, score_folders(args.scores_folder, mode, args.metrics_folder))
    return args


def main() -> None:
    """Parse, read, evaluate, write, print."""
    args = parse()
    config, lds, data = build(EvaluationConfig, args), build(LdsConfig, args), build(DataConfig, args)
    from src.metrics.plots import agreement_figure

    selected = (config.modes, args.scores_folder, args.metrics_folder)
    if ":" not in data.dataset:
        find_scores(data.dataset, *selected)  # fails before anything is downloaded
    dataset, labels, checks = load_labels(data, args.datasets_folder)
    found = find_scores(dataset, *selected)
    if config.modes is None and config.planted is None and len(found) > 1:
        found.pop(config.reference, None)
    proxies = {mode: Proxy(mode, dataset, folder=folders, **checks) for mode, folders in found.items()}
    checks.setdefault("n", len(next(iter(proxies.values()))))
    reference, name, source = read_reference(args, config, dataset, labels, checks)
    for proxy in proxies.values():
        proxy.check(len(reference))
    paths = [] if lds.members is None else measure_lds(args, config, lds, dataset, checks)
    rows = evaluate(
        {mode: proxy.scores for mode, proxy in proxies.items()},
        reference,
        labels,
        {mode: proxy.record.get("cost") for mode, proxy in proxies.items()},
        config,
    )
    shared = max(row["examples"] for row in rows)
    which = f"{shared:,} examples" + (f" ({config.examples})" if config.examples != "all" else "")
    caption = f"{dataset}: agreement with {name}, {which}"
    stem = evaluation_stem(args.plots_folder, dataset, name.replace(" ", "_"))
    facts = {"dataset": dataset, "reference_file": source, "files": {m: proxy.path for m, proxy in proxies.items()}}
    figure = agreement_figure(rows, caption)
    table = markdown(rows, caption, config.confidence)
    paths += [*write_rows(stem, rows, {**asdict(config), **facts}, table), *save_figure(figure, stem)]
    print(table)
    if config.orient:
        for mode in wrong_signs(rows):
            log.warning(
                "%s: its sign disagrees with %s (Spearman below 0); high values may be typical here, for example "
                "because the model was not trained to the end",
                mode,
                name,
            )
    print(*paths, sep="\n")
    keep = [*FULL_DATA_FLAGS, "scores_folder", "metrics_folder"]
    print_next("plot_images.py", keep, modes=[rows[0]["score"]])


def measure_lds(args: Namespace, config: EvaluationConfig, lds: LdsConfig, dataset: str, checks: dict) -> list[Path]:
    """Measure the linear datamodeling score of all attributions, print the table, and write it."""
    members = read_subsets(lds.members, **checks)
    chosen = lds.chosen(members.test_correct.shape[1])
    bootstrap = {"resamples": config.resamples, "confidence": config.confidence, "seed": config.bootstrap_seed}
    rows = []
    for text in lds.attribution:
        name, attribution = read_attribution(text, members)
        rows.append(lds_row(name, attribution[chosen], members, chosen, bootstrap))
    if lds.mpe_checkpoint is not None:
        from mpe.attribution import contributions_from_checkpoint
        from src.context import RunContext

        context = RunContext(build(DataConfig, args), build(ComputeConfig, args), args.datasets_folder)
        attribution, cost = contributions_from_checkpoint(context, lds.mpe_checkpoint, chosen, lds.mpe_delta)
        rows.append(lds_row("MPE", attribution, members, chosen, bootstrap, cost))
    caption = f"{dataset}: linear datamodeling score on {len(members.numbers)} models trained on subsets"
    text = lds_markdown(rows, caption, config.confidence)
    print(text)
    settings = {**asdict(lds), **bootstrap, "confidence": config.confidence, "dataset": dataset}
    return write_rows(lds_stem(args.plots_folder, dataset), rows, settings, text)


def read_reference(
    args: Namespace, config: EvaluationConfig, dataset: str, labels: np.ndarray | None, checks: dict
) -> tuple[np.ndarray, str, Path]:
    """Read the reference: its values (bool for wrong labels), its name, and its file."""
    if config.planted is not None:
        if labels is None:
            raise FileError(f"{config.planted}: needs the labels of {dataset}, which could not be loaded")
        return planted_mask(config.planted, labels), "planted noise", config.planted
    if is_score(config.reference, args.scores_folder, args.metrics_folder):
        folders = score_folders(args.scores_folder, config.reference, args.metrics_folder)
        proxy = Proxy(config.reference, dataset, folder=folders, **checks)
        return proxy.scores, config.reference, proxy.path
    path = Path(config.reference)
    values = read_external(path, checks["n"])
    return (values if config.reference_high == "atypical" else -values), path.stem, path


if __name__ == "__main__":
    run_script(main, {"mode": "modes"})
