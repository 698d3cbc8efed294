"""Graph cut's greedy choice: running gains, and gains summed anew at each pick.

    python -m benchmarks.bench_graph_cut [--quick]

30 % of 5,000 examples of one group (embeddings of 512 numbers, 10 and 100 classes). The rows with a target time the
greedy picks alone, both ways on the same dense similarities; the others our whole choice without ("plain") and with
the dense similarities. All ways must pick the same. What takes more than a second runs once, without a warm-up.
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.common import Row, run, seconds
from src.coresets.graph_cut import Similarities, choose, greedy_graph_cut
from src.coresets.material import LastLayer

TARGET = 500.0
MEMORY = 2048  # MiB


def random_layer(count: int, classes: int, size: int) -> LastLayer:
    """Logits, labels and embeddings such as a ReLU network's."""
    draw = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(count, classes, generator=draw)
    embeddings = torch.randn(count, size, generator=draw).relu()
    return LastLayer(logits, torch.randint(classes, (count,), generator=draw), embeddings)


def plain_greedy(similarities: np.ndarray, budget: int) -> np.ndarray:
    """All gains at each pick, as sums over the rows of what is chosen."""
    sums = similarities.sum(axis=0)
    taken = np.zeros(len(sums), dtype=bool)
    picks: list[int] = []
    for _ in range(budget):
        gains = sums - 2.0 * similarities[picks].sum(axis=0)
        gains[taken] = -np.inf
        picks.append(int(gains.argmax()))
        taken[picks[-1]] = True
    return np.array(picks)


def timed(way: Callable[[], np.ndarray], repeats: int) -> tuple[float, np.ndarray]:
    """The smallest processor seconds of a way, and what it picks."""
    picks: list[np.ndarray] = []
    return min(seconds(lambda: picks.append(way()), time.process_time) for _ in range(repeats)), picks[-1]


def measure(quick: bool = False) -> list[Row]:
    """Time the greedy choice both ways, and ours as a whole.

    Raises:
        RuntimeError: Two ways pick differently.
    """
    torch.set_num_threads(1)
    count, size, repeats = (200, 16, 1) if quick else (5_000, 512, 5)
    budget = 3 * count // 10
    rows = []
    for classes in (10, 100):
        network = random_layer(count, classes, size)
        factors = Similarities.of(network)
        dense, sums = factors.matrix(), factors.sums()
        plain, expected = timed(lambda dense=dense: plain_greedy(dense, budget), 1)
        greedy, picks = timed(
            lambda sums=sums, dense=dense: greedy_graph_cut(sums, dense.__getitem__, budget), repeats
        )
        whole, by_matrix = timed(lambda network=network: choose(network, budget, MEMORY), 1)
        factored, by_columns = timed(lambda network=network: choose(network, budget, 0), 1)
        if not all(np.array_equal(found, expected) for found in (picks, by_matrix, by_columns)):
            raise RuntimeError(f"graph cut, {classes} classes: two ways pick differently")
        what = f"graph cut, {count} x 30 %, {classes} classes"
        rows.append(Row(f"{what}: picks", plain, greedy, "s", TARGET))
        rows.append(Row(f"{what}: columns / dense, whole", factored, whole, "s"))
    return rows


def main() -> None:
    run(measure, __doc__)


if __name__ == "__main__":
    main()
