#!/usr/bin/env python3
r"""Plot the examples of each class with the lowest and the highest scores, one row per score.

Reads the data set and its score files from --scores_folder and --metrics_folder if given, otherwise from metrics/ or
from the scores shipped with the project. Writes to {plots_folder}/images/{dataset}/, as PNG and PDF:
lowest_{modes}_{n}/{class} and highest_{modes}_{n}/{class}, and an overview of all classes by the first score,
overview_{mode}_{n}.

  python plot_images.py --dataset=digits --modes samis_loss samis_prob mean_loss
  python plot_images.py --dataset=cifar100 --modes mem samis_loss samis_prob --n=5 --classes apple bed
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from src.artifacts.io import label_hash, save_figure
from src.artifacts.paths import Folders
from src.cli import FULL_DATA_FLAGS, Parser, build, number, print_next, run_script
from src.datasets import DataConfig, training_indices
from src.errors import FlagError
from src.formatting import literal
from src.metrics import SCORES, Proxy, get_score
from src.metrics.proxy import ScoreConfig, score_folders
from src.metrics.registry import score_name

if TYPE_CHECKING:
    from src.datasets import ImageSet

ENDS = ("lowest", "highest")


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data")
    parser.add(ScoreConfig, "scores")
    group = parser.add_argument_group("figures")
    group.add_argument(
        "--modes",
        nargs="+",
        type=score_name,
        default=["samis_loss", "samis_prob"],
        metavar="MODE",
        help=f"scores to plot, one row each: {', '.join(SCORES)}, or registered ones",
    )
    group.add_argument(
        "--n", type=number(int, 1, 50), default=5, help="number of lowest and of highest examples per class"
    )
    group.add_argument(
        "--classes", nargs="+", metavar="NAME", help="only these classes, by name or number (default: all)"
    )
    group.add_argument(
        "--only_overview", action="store_true", help="plot only the overview, not the figures of single classes"
    )
    parser.add(Folders, "folders", only=("datasets_folder", "metrics_folder", "plots_folder"))
    args = parser.parse_args()
    build(DataConfig, args)  # validates the flags
    for mode in args.modes:
        get_score(mode, score_folders(args.scores_folder, mode, args.metrics_folder))
    return args


def main() -> None:
    """Parse, read, sort, plot, print."""
    args = parse()
    from src.metrics.plots import extremes

    images, _ = build(DataConfig, args).load(args.datasets_folder)
    checks = {"n": images.total, "label_hash": label_hash(images.labels), "data_hash": images.digest}
    dataset = images.entry.name
    proxies = {
        mode: Proxy(mode, dataset, folder=score_folders(args.scores_folder, mode, args.metrics_folder), **checks)
        for mode in args.modes
    }
    chosen = training_indices(build(DataConfig, args), images.examples)
    if chosen is not None:
        images = images.subset(chosen)
    labels, indices = images.labels.numpy(), images.indices.numpy()
    ends = {mode: extremes(proxy.scores, labels, indices, args.n) for mode, proxy in proxies.items()}
    classes = chosen_classes(args.classes, images.class_names)
    folder = args.plots_folder / "images" / dataset
    draw_overview(images, proxies[args.modes[0]], ends[args.modes[0]], classes, args.n, folder)
    if not args.only_overview:
        for label in tqdm(classes, unit="class", disable=None):
            draw_class(images, proxies, {mode: end.get(label) for mode, end in ends.items()}, label, args.n, folder)
        modes = "_".join(args.modes)
        print(
            *(f"{folder / f'{end}_{modes}_{args.n}'}: {len(classes)} classes, PNG and PDF" for end in ENDS), sep="\n"
        )
    for proxy in proxies.values():
        order = np.argsort(-proxy.scores[indices], kind="stable")[: args.n]  # NaN sorts last
        named = (
            f"{indices[k]} ({images.class_names[labels[k]] if images.files is None else images.files[indices[k]]})"
            for k in order
        )
        what = "class" if images.files is None else "file"
        print(f"highest {proxy.title.split(',')[0]}, index ({what}): {', '.join(named)}")
    keep = {*FULL_DATA_FLAGS, "scores_folder", "metrics_folder", "plots_folder"}
    print_next("plot_proxies.py", keep, modes=args.modes)


def chosen_classes(wanted: list[str] | None, names: list[str]) -> list[int]:
    """The labels of the selected classes; all labels by default."""
    if wanted is None:
        return list(range(len(names)))
    known = {str(label): label for label in range(len(names))} | {name: label for label, name in enumerate(names)}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise FlagError(
            f"--classes: unknown class {unknown[0]!r}; choose from {', '.join(names[:20])}, or give a number"
        )
    return [known[name] for name in wanted]


def fetch(images: ImageSet, positions: np.ndarray) -> np.ndarray:
    """Return uint8 images ``(m, c, h, w)`` at these positions of the set."""
    import torch

    return images.fetch(torch.from_numpy(positions)).cpu().numpy()


def draw_overview(images: ImageSet, proxy: Proxy, ends: dict, classes: list[int], n: int, folder: Path) -> None:
    """Plot the overview of all classes by one score."""
    from src.metrics.plots import overview

    rows = [
        (literal(images.class_names[label]), *(fetch(images, positions) for positions in ends[label]))
        for label in classes
        if label in ends
    ]
    title = f"{images.entry.name}: {proxy.title.split(',')[0]}, {n} lowest and {n} highest of each class"
    figures = overview(rows, n, proxy.label, title)
    for page, figure in enumerate(figures, 1):
        suffix = f"_{page}" if len(figures) > 1 else ""
        print(*save_figure(figure, folder / f"overview_{proxy.mode}_{n}{suffix}"), sep="\n")


def draw_class(images: ImageSet, proxies: dict[str, Proxy], ends: dict, label: int, n: int, folder: Path) -> None:
    """Plot one class: one figure of the lowest and one of the highest scores, one row per score."""
    from src.metrics.plots import class_grids

    rows = {mode: end for mode, end in ends.items() if end is not None and len(end[0])}
    if not rows:
        return
    name = images.class_names[label]
    stem = re.sub(r"[^\w.-]+", "_", name)
    if [re.sub(r"[^\w.-]+", "_", other) for other in images.class_names].count(stem) > 1:
        stem = f"{label}_{stem}"
    indices = images.indices.numpy()
    for k, end in enumerate(ENDS):
        figure = class_grids(
            lambda positions: fetch(images, positions),
            [both[k] for both in rows.values()],
            [indices[both[k]] for both in rows.values()],
            [proxies[mode].scores[indices[both[k]]] for mode, both in rows.items()],
            [proxies[mode].label for mode in rows],
            f"{literal(name)}: {end} {n}",
            images.files,
        )
        save_figure(figure, folder / f"{end}_{'_'.join(proxies)}_{n}" / stem)


if __name__ == "__main__":
    run_script(main, {"mode": "modes"})
