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

from argparse import Namespace
from pathlib import Path

import numpy as np

from src.artifacts.io import save_figure, write_json, write_text
from src.artifacts.paths import Folders
from src.cli import SUBSET_FLAGS, Parser, build, restrict, run_script
from src.datasets import DataConfig
from src.errors import FileError, FlagError
from src.metrics import SCORES, Proxy, get_score
from src.metrics.compare import against_reference, comparison_table
from src.metrics.evaluation import find_scores, load_labels
from src.metrics.proxy import ScoreConfig, published_datasets, recipe, score_folders
from src.metrics.registry import registered_scores, score_entry, score_name


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data", skip=SUBSET_FLAGS)
    parser.add(ScoreConfig, "scores")
    group = parser.add_argument_group("figures")
    names = {"nargs": "+", "type": score_name, "metavar": "MODE"}
    group.add_argument(
        "--modes",
        **names,
        help=f"scores to plot: {', '.join(SCORES)}, or registered ones (default: all that exist)",
    )
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
    for mode in args.modes or ():
        get_score(mode, score_folders(args.scores_folder, mode, args.metrics_folder))
    return args


def main() -> None:
    """Parse, read, plot, compare, print."""
    args = parse()
    from src.metrics.plots import comparison

    selected = (args.modes, args.scores_folder, args.metrics_folder)
    if ":" not in args.dataset:
        find_scores(args.dataset, *selected)  # fails before anything is downloaded
    dataset, labels, checks = load_labels(build(DataConfig, args), args.datasets_folder)
    found = find_scores(dataset, *selected)
    proxies = {mode: Proxy(mode, dataset, folder=folders, **checks) for mode, folders in found.items()}
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
            titles = f"{score_entry(mode).title} and {score_entry(other).title}"
            print(f"{titles}: Spearman {cell['spearman']:.3f}{within}")
    print(f"{folder}: distributions of {len(proxies)} score{'s' * (len(proxies) > 1)}, PNG and PDF")
    print(*save_figure(figure, folder / "comparison"), sep="\n")
    write_json(folder / "correlations.json", table)
    print(write_text(folder / "correlations.csv", comparison_table(table)))


def read_references(args: Namespace, dataset: str, checks: dict) -> dict[str, Proxy]:
    """The selected scores in the reference folder, or all that exist there. No other folder is searched."""
    if not args.reference.is_dir():
        raise FlagError(f"--reference {args.reference}: folder does not exist; give a metrics folder")
    modes = args.reference_modes or [*SCORES, *registered_scores(args.reference)]
    paths = {mode: score_entry(mode).path(args.reference, dataset) for mode in modes}
    missing = [path for path in paths.values() if not path.exists()]
    if args.reference_modes and missing:
        mode = next(mode for mode, path in paths.items() if path == missing[0])
        how = recipe(score_entry(mode), dataset, args.reference)
        raise FileError(f"{missing[0]}: score file not found; choose other scores with --reference_modes, or {how}")
    if len(missing) == len(paths):
        published = dataset in published_datasets()
        fetch = f", or run fetch_scores.py --dataset {dataset} --folder={args.reference}" if published else ""
        raise FlagError(
            f"--reference {args.reference}: has no scores of {dataset}; give a metrics folder that does{fetch}"
        )
    return {
        mode: Proxy(mode, dataset, folder=args.reference, **checks) for mode, path in paths.items() if path.exists()
    }


if __name__ == "__main__":
    run_script(main, {"mode": "modes"})
