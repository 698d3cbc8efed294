"""Run all benchmarks in turn, each in its own process, and print one table.

    python -m benchmarks.run_all [--quick]

Writes the table to ``runs/bench.json``.
"""

import argparse
import importlib
import math
import platform
import time
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import Row, in_fresh_process, table
from src.artifacts.io import write_json
from src.artifacts.paths import ROOT

MODULES = ("training", "files", "selection", "jacobians", "curvature")


def benchmarks_of(module: str) -> dict:
    """Return a module's benchmarks by name."""
    return importlib.import_module(f"benchmarks.{module}").BENCHMARKS


def run_one(module: str, name: str, quick: bool) -> list[Row]:
    """Run one benchmark and return its rows."""
    return benchmarks_of(module)[name](quick)


def _plain_values(row: Row) -> dict[str, Any]:
    """Convert a row to JSON values. NaN, for a plain implementation that was not run, becomes None."""
    values = {**asdict(row), "ratio": row.ratio, "met": row.met}
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def main() -> None:
    """Run the benchmarks, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="use toy sizes, to test that the benchmarks run")
    quick = parser.parse_args().quick
    started = time.perf_counter()
    rows = []
    with tqdm([(module, name) for module in MODULES for name in benchmarks_of(module)], unit="benchmark") as bar:
        for module, name in bar:
            bar.set_description(name)
            rows += in_fresh_process(run_one, module, name, quick)
    seconds = time.perf_counter() - started
    print("CPU seconds on one thread unless the unit says otherwise; ratio = plain / ours, higher is better.")
    print(table(rows))
    machine = {"processor": platform.machine(), "torch": torch.__version__, "python": platform.python_version()}
    content = {
        "quick": quick,
        "seconds": seconds,
        "machine": machine,
        "rows": [_plain_values(row) for row in rows],
    }
    print(f"{write_json(ROOT / 'runs' / 'bench.json', content)} ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
