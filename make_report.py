#!/usr/bin/env python3
r"""Write one self-contained HTML page about a data set and its stored scores, to open in any browser.

Reads the data set, its score files from --scores_folder and --metrics_folder if given, otherwise from metrics/ or
from the scores shipped with the project, and whatever else exists for it: recorded dynamics, out-of-sample
probabilities, audits of labels, duplicates, a selection, a sensitivity experiment, Hessian spectra and kernel
velocities. Nothing is trained or scored. Writes --out; if the data set has more than --examples examples, also a
table of all of them next to it, as csv.gz and, if pyarrow is installed, as parquet.

  python make_report.py --dataset=digits --out=report.html
  python make_report.py --dataset=cifar10 --scores_folder=examples/scores --modes samis_loss aum csl --out=report.html
"""

import logging
import time
from argparse import Namespace

from src.artifacts.io import require_writable
from src.artifacts.paths import Folders, report_path
from src.cli import SUBSET_FLAGS, Parser, build, run_script
from src.datasets import DataConfig
from src.errors import FileError
from src.formatting import duration, gib
from src.metrics import get_score
from src.metrics.proxy import ScoreConfig, score_folders
from src.report.collect import ReportConfig, collect
from src.report.page import library, require_page, write_page


def parse() -> Namespace:
    """Parse the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data", skip=SUBSET_FLAGS, required=("dataset",))
    parser.add(ScoreConfig, "scores")
    parser.add(ReportConfig, "page")
    parser.add(
        Folders,
        "folders",
        only=("datasets_folder", "metrics_folder", "models_folder", "hessian_folder", "ntk_folder", "plots_folder"),
    )
    args = parser.parse_args()
    build(DataConfig, args)  # validates the flags
    for mode in args.modes or ():
        get_score(mode, score_folders(args.scores_folder, mode, args.metrics_folder))
    return args


def main() -> None:
    """Parse, read, write, print."""
    args = parse()
    started = time.perf_counter()
    library()  # fails before anything is read
    config, data = build(ReportConfig, args), build(DataConfig, args)
    for path in filter(None, (config.selection, config.planted)):
        if not path.exists():
            raise FileError(f"{path}: file not found")
    if config.out is not None:
        require_page(config.out, config.overwrite)
        require_writable(config.out.parent)
    reading = logging.getLogger("src.metrics.proxy")
    reading.setLevel(logging.WARNING)  # the page lists the scores
    try:
        found = collect(data, args.scores_folder, args.metrics_folder, build(Folders, args), config)
    finally:
        reading.setLevel(logging.NOTSET)
    out = config.out or report_path(args.plots_folder, found.train.entry.name)
    require_page(out, config.overwrite)
    page, *tables = write_page(out, found, config)
    size, seconds = gib(page.stat().st_size), duration(time.perf_counter() - started)
    print(
        f"{min(config.examples, len(found.used)):,} of {len(found.used):,} examples, {len(found.scores)} "
        f"score{'s' * (len(found.scores) != 1)}, {size}, {seconds}"
    )
    print(*tables, page, sep="\n")


if __name__ == "__main__":
    run_script(main, {"mode": "modes"})
