"""Run every benchmark in its own process, one after another, and print one table.

    python -m benchmarks.run_all [--quick] [--runs N]

Writes the table to ``runs/bench.json``.
"""

import argparse
import importlib
import platform
import time
from dataclasses import asdict

import torch
from tqdm import tqdm

from benchmarks.common import LEGEND, Row, in_fresh_process, median_run, table
from src.artifacts.io import write_json
from src.artifacts.paths import ROOT

MODULES = ("training", "files", "selection", "subsampling", "jacobians", "curvature")


def benchmarks_of(module: str) -> dict:
    """The benchmarks of a module by name."""
    return importlib.import_module(f"benchmarks.{module}").BENCHMARKS


def run_one(module: str, name: str, quick: bool) -> list[Row]:
    """Run one benchmark and return its rows."""
    return benchmarks_of(module)[name](quick)


def main() -> None:
    """Measure, print the table, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes: check that everything runs; the times are meaningless"
    )
    parser.add_argument(
        "--runs", type=int, default=1, help="runs of each benchmark; rows with the median ratio count"
    )
    args = parser.parse_args()
    if args.runs < 1:
        parser.error(f"--runs {args.runs}: must be at least 1")
    started = time.perf_counter()
    found: dict[str, list[Row]] = {}
    with tqdm([(module, name) for module in MODULES for name in benchmarks_of(module)], unit="benchmark") as bar:
        for module, name in bar:
            bar.set_description(name)
            runs = [in_fresh_process(run_one, module, name, args.quick) for _ in range(args.runs)]
            found[f"{module} {name}"] = median_run(runs)
    seconds = time.perf_counter() - started
    print(LEGEND)
    print(table(found))
    content = {
        "quick": args.quick,
        "runs": args.runs,
        "seconds": seconds,
        "machine": {"processor": platform.machine(), "torch": torch.__version__, "python": platform.python_version()},
        "rows": [
            {
                "benchmark": benchmark,
                **asdict(row),
                "ratio": row.ratio,
                "authors_ratio": row.authors_ratio,
                "met": row.met,
            }
            for benchmark, rows in found.items()
            for row in rows
        ],
    }
    print(f"\n{write_json(ROOT / 'runs' / 'bench.json', content)} ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
