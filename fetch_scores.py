#!/usr/bin/env python3
r"""Download the published score files of a data set from the authors' repository and verify their size and hash.

Reads --base_url (by default, the SAMIS authors' repository at a fixed commit). Writes
{folder}/{sub}/{mode}_{dataset}.pkl and, for cifar100, {folder}/memorization/cifar100_infl_matrix.npz, which is large.
Skips files that already exist and are correct. Does not write a file that differs from the published one. After a
failed file it continues with the next one, reports the failures at the end, and exits with status 1.

  python fetch_scores.py --dataset=cifar100
  python fetch_scores.py --dataset=cifar10 --modes forg etl --folder=metrics
"""

import logging
from pathlib import Path

from src.artifacts.paths import PACKAGED_SCORES
from src.cli import Parser, print_next, run_script
from src.errors import FileError, FlagError
from src.metrics import SCORES
from src.metrics.proxy import BASE_URL, fetch, published_files, published_summary

log = logging.getLogger("fetch_scores")


def main() -> None:
    """Parse, fetch, print."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--dataset", default="cifar100", metavar="NAME", help=f"data set; published scores: {published_summary()}"
    )
    group.add_argument(
        "--modes",
        nargs="+",
        choices=tuple(SCORES),
        metavar="MODE",
        help="scores to download (default: all published ones)",
    )
    group.add_argument(
        "--folder", type=Path, default=PACKAGED_SCORES, metavar="DIR", help="metrics folder to write to"
    )
    group.add_argument("--base_url", default=BASE_URL, metavar="URL", help="URL that contains the published folders")
    group.add_argument("--overwrite", action="store_true", help="replace files with different content")
    args = parser.parse_args()
    if "://" not in args.base_url:
        raise FlagError(f"--base_url {args.base_url}: is not a URL; give one such as {BASE_URL}")
    files, failed = published_files(args.dataset, args.modes), {}
    for file in files:
        try:
            fresh = fetch(file, args.folder, args.base_url, args.overwrite)
        except FileError as error:
            log.info("failed: %s", error)
            failed[file.mode] = str(error)
        else:
            print(f"{file.path(args.folder)}: {'downloaded and verified' if fresh else 'already up to date'}")
    if failed:
        raise FileError(
            f"{len(failed)} of {len(files)} files failed ({', '.join(failed)}); the same command tries only these "
            f"again; last error: {list(failed.values())[-1]}"
        )
    given = None if args.folder == PACKAGED_SCORES else args.folder
    print_next("plot_proxies.py", ["modes"], dataset=args.dataset, scores_folder=given)


if __name__ == "__main__":
    run_script(main, {"mode": "modes"})
