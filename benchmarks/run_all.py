"""Every benchmark, one after another, each in a process of its own, and one table at the end.

    python -m benchmarks.run_all [--quick]

Writes the table to ``runs/bench.json``.
"""

import importlib
import math
import platform
import time
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import Row, in_fresh_process, quick_flag, table
from src import artifacts

MODULES = (
    "bench_batches",
    "bench_scoring",
    "bench_flatness",
    "bench_training",
    "bench_memory",
    "bench_last_layer",
    "bench_ranked",
    "bench_graph_cut",
    "bench_gradmatch",
    "bench_craig",
    "bench_variances",
    "bench_ensemble",
    "bench_hessian",
    "bench_ntk",
)


def measure_module(name: str, quick: bool) -> list[Row]:
    """The rows of one benchmark."""
    return importlib.import_module(f"benchmarks.{name}").measure(quick)


def measure(quick: bool = False) -> list[Row]:
    """The rows of all benchmarks."""
    rows = []
    with tqdm(MODULES, unit="benchmark") as bar:
        for name in bar:
            bar.set_description(name)
            rows += in_fresh_process(measure_module, name, quick)
    return rows


def _plain_values(row: Row) -> dict[str, Any]:
    """A row as json, in which NaN (a plain way that was not run) has no place."""
    values = {**asdict(row), "ratio": row.ratio, "met": row.met}
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def main() -> None:
    """Measure, print the table, and write it."""
    quick = quick_flag(__doc__)
    started = time.perf_counter()
    rows = measure(quick)
    seconds = time.perf_counter() - started
    print("Processor seconds on one thread unless the unit says otherwise; ratio = plain / ours, larger is better.")
    print(table(rows))
    machine = {"processor": platform.machine(), "torch": torch.__version__, "python": platform.python_version()}
    content = {
        "quick": quick,
        "seconds": seconds,
        "machine": machine,
        "rows": [_plain_values(row) for row in rows],
    }
    print(f"{artifacts.write_json(artifacts.ROOT / 'runs' / 'bench.json', content)} ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
