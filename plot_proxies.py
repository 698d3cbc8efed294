#!/usr/bin/env python3
r"""Plot the distributions of stored scores, and compare scores by rank.

Reads score files from --scores_folder and --metrics_folder if given, otherwise from metrics/ or from the scores
shipped with the project. With --reference, compares the selected scores with those in another folder, such as the
published ones. Writes, as PNG and PDF,
{plots_folder}/proxies/{dataset}/{mode}/all_{scores_hist,scores_distribution,prob_dist} and
{plots_folder}/proxies/{dataset}/comparison, and the correlations as correlations.csv and correlations.json.

  python plot_proxies.py --dataset=digits --modes samis_loss samis_prob mean_loss
  python plot_proxies.py --dataset=cifar10 --scores_folder=examples/scores --reference=src/metrics
"""

import logging
from argparse import Namespace
from pathlib import Path

import numpy as np

from src.artifacts.io import label_hash, save_figure, write_json, write_text
from src.artifacts.paths import Folders
from src.cli import Parser, build, restrict, run_script
from src.datasets import DataConfig
from src.errors import FileError, FlagError
from src.metrics import SCORES, Proxy, find_score_file
from src.metrics.compare import against_reference, comparison_table
from src.metrics.proxy import ScoreConfig, score_folders

log = logging.getLogger("plot_proxies")


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data", skip=("subset",))
    parser.add(ScoreConfig, "scores")
    group = parser.add_argument_group("figures")
    names = {"nargs": "+", "choices": tuple(SCORES), "metavar": "MODE"}
    group.add_argument("--modes", **names, help=f"scores to plot: {', '.join(SCORES)} (default: all that exist)")
    group.add_argument(
        "--reference", type=Path, metavar="DIR", help="metrics folder with scores to compare with (default: none)"
    )
    group.add_argument("--reference_modes", **names, help="scores to read from --reference (default: all that exist)")
    restrict(group, {("--reference_modes",): (lambda args: args.reference is not None, "without --reference")})
    group.add_argument(
        "--plot",
        choices=("scatter", "line"),
        default="scatter",
        help="style of the plot of each example's fraction of the total score",
    )
    parser.add(Folders, "folders", only=("datasets_folder", "metrics_folder", "plots_folder"))
    args = parser.parse_args()
    build(DataConfig, args)  # validates the flags
    return args


def main() -> None:
    """Parse, read, plot, compare, print."""
    args = parse()
    from src.metrics.plots import comparison

    if ":" not in args.dataset:
        found_modes(args, args.dataset)  # fails before anything is downloaded
    dataset, labels, checks = read_labels(args)
    proxies = read_proxies(args, dataset, checks)
    references = read_references(args, dataset, checks) if args.reference else proxies
    first = next(iter(proxies.values()))
    for proxy in (*proxies.values(), *references.values()):
        proxy.check(len(first))

    folder = args.plots_folder / "proxies" / dataset
    for mode, proxy in proxies.items():
        proxy.plot_scores_hist(folder=folder / mode)
        if np.ptp(proxy.scores[proxy.indices]):
            proxy.plot_scores_kde(folder=folder / mode)
        proxy.plot_prob_dist(plot=args.plot, folder=folder / mode)

    table = {
        mode: {
            other: against_reference(proxy.scores, reference.scores, labels)
            for other, reference in references.items()
        }
        for mode, proxy in proxies.items()
    }
    headings = {"spearman": "Rank correlation"}
    if labels is not None:
        headings["spearman_within_class"] = "Mean within class"
    matrices = {
        heading: np.array([[cell[key] for cell in row.values()] for row in table.values()])
        for key, heading in headings.items()
    }
    suffix = f" against {args.reference.name}" if args.reference else ""
    figure = comparison(
        [proxy.scores for proxy in proxies.values()],
        [proxy.label for proxy in proxies.values()],
        [reference.label for reference in references.values()],
        matrices,
        f"{dataset}: scores compared{suffix}",
    )
    other, reference = next(iter(references.items()))
    for mode, proxy in proxies.items():
        if proxy is not reference:
            cell = table[mode][other]
            within = f" (within class {cell['spearman_within_class']:.3f})" if labels is not None else ""
            print(f"{SCORES[mode].title} and {SCORES[other].title}: Spearman {cell['spearman']:.3f}{within}")
    print(f"{folder}: distributions of {len(proxies)} score{'s' * (len(proxies) > 1)}, PNG and PDF")
    print(*save_figure(figure, folder / "comparison"), sep="\n")
    write_json(folder / "correlations.json", table)
    print(write_text(folder / "correlations.csv", comparison_table(table)))


def read_labels(args: Namespace) -> tuple[str, np.ndarray | None, dict]:
    """The data set's name in paths and, if it can be loaded, its training labels and the facts to compare."""
    try:
        train, _ = build(DataConfig, args).load(args.datasets_folder)
    except FileError as error:
        if ":" in args.dataset:
            raise
        log.warning("%s; skipping correlations within classes", error)
        return args.dataset, None, {}
    labels = train.labels.numpy()
    checks = {"n": len(labels), "label_hash": label_hash(labels), "data_hash": train.digest}
    return train.entry.name, labels, checks


def found_modes(args: Namespace, dataset: str) -> dict[str, list[Path] | None]:
    """The selected scores, or all that exist, with the folders to search."""
    found = {}
    for mode in args.modes or SCORES:
        folders = score_folders(args.scores_folder, mode, args.metrics_folder)
        try:
            find_score_file(mode, dataset, folders)
        except FileError:
            if args.modes or any(given.startswith(f"{mode}=") for given in args.scores_folder):
                raise
            continue
        found[mode] = folders
    if not found:
        # The error lists the searched folders and the command that creates scores.
        find_score_file("samis_loss", dataset, score_folders(args.scores_folder, "samis_loss", args.metrics_folder))
    return found


def read_proxies(args: Namespace, dataset: str, checks: dict) -> dict[str, Proxy]:
    """The selected scores, or all that exist."""
    return {
        mode: Proxy(mode, dataset, folder=folders, **checks) for mode, folders in found_modes(args, dataset).items()
    }


def read_references(args: Namespace, dataset: str, checks: dict) -> dict[str, Proxy]:
    """The selected scores in the reference folder, or all that exist there. No other folder is searched."""
    if not args.reference.is_dir():
        raise FlagError(f"--reference {args.reference}: folder does not exist; give a metrics folder")
    paths = {mode: SCORES[mode].path(args.reference, dataset) for mode in args.reference_modes or SCORES}
    missing = [path for path in paths.values() if not path.exists()]
    if args.reference_modes and missing:
        raise FileError(f"{missing[0]}: score file not found; choose other scores with --reference_modes")
    if len(missing) == len(paths):
        raise FlagError(f"--reference {args.reference}: has no scores of {dataset}; give a metrics folder that does")
    return {
        mode: Proxy(mode, dataset, folder=args.reference, **checks) for mode, path in paths.items() if path.exists()
    }


if __name__ == "__main__":
    run_script(main, {"mode": "modes"})
