"""CRAIG's choice in a class: a textbook lazy greedy and ours; and ours for groups whose distances do not fit.

    python -m benchmarks.bench_craig [--quick]

A tenth of 5,000 examples (embeddings of 512 numbers, 10 and 100 classes), drawn at random or in clusters, where the
lazy greedy works harder. The textbook way holds the matrix of similarities, keeps gains in a heap and evaluates one
column at a time. "picks" starts from the matrices of both, "whole" from errors and embeddings and ends with the
weights. Both must reach the same objective. Other rows compare the way of large groups with the exact one: as it is
where the matrix just does not fit, and pressed, with a smaller sample and one pair in 300 kept, so that crowded
gradients must be drawn (of objectives, larger is better, so the large way stands first). The last row is the memory
of the large way beside that of a matrix.

A group of 100,000 takes minutes: its seconds and the process's peak in MiB, 10,000 examples chosen, by

    python -c "from benchmarks.bench_craig import large; print(large())"
"""

import heapq
import math
import time

import numpy as np
import torch

from benchmarks.bench_memory import peak
from benchmarks.common import Row, in_fresh_process, in_turn, run
from src import rng
from src.coresets.craig import Distances, choose_weighted, greedy_by_sample, greedy_on_matrix, weigh
from src.coresets.material import LastLayer

OFFSET = 1e-3
MEMORY = 2048  # MiB
SAMPLED, KEPT = 5, 300  # when pressed: one in 5 examples is sampled, one in 300 pairs kept


def random_class(count: int, classes: int, size: int) -> LastLayer:
    """Random logits and embeddings as after a ReLU: all gradients far from each other."""
    draw = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(count, classes, generator=draw)
    embeddings = torch.randn(count, size, generator=draw).relu()
    return LastLayer(logits, torch.randint(classes, (count,), generator=draw), embeddings)


def clustered_class(count: int, classes: int, size: int) -> LastLayer:
    """A class of eight clusters in a few dimensions, seen by a random network: many gradients are alike."""
    draw = torch.Generator().manual_seed(0)
    centres = 2.0 * torch.randn(8, 12, generator=draw)
    latent = torch.randn(count, 12, generator=draw) + centres[torch.randint(8, (count,), generator=draw)]
    hidden = torch.tanh(latent @ torch.randn(12, 64, generator=draw) / 3.0)
    embeddings = hidden @ torch.randn(64, size, generator=draw) / 8.0
    embeddings = (embeddings + 0.3 * torch.randn(count, size, generator=draw)).relu()
    logits = 3.0 * embeddings @ torch.randn(size, classes, generator=draw) / math.sqrt(size)
    logits[:, 0] += 3.0
    return LastLayer(logits, torch.zeros(count, dtype=torch.int64), embeddings)


def plain_similarities(network: LastLayer) -> np.ndarray:
    """``max d - d_ij + 1e-3``, in float64 as ours."""
    errors, embeddings = network.errors.double().numpy(), network.embeddings.double().numpy()
    products = embeddings @ embeddings.T
    products += 1.0
    products *= errors @ errors.T
    squares = products.diagonal().copy()
    products *= -2.0
    products += squares
    products += squares[:, None]
    np.sqrt(np.maximum(products, 0.0, out=products), out=products)
    np.fill_diagonal(products, 0.0)
    return np.subtract(products.max() + OFFSET, products, out=products)


def plain_picks(similarities: np.ndarray, budget: int) -> np.ndarray:
    """The textbook's lazy greedy."""
    best = np.zeros(len(similarities))
    heap = [(-value, place) for place, value in enumerate(similarities.sum(axis=0))]
    heapq.heapify(heap)
    fresh = [0] * len(best)
    picks: list[int] = []
    while len(picks) < budget:
        place = heap[0][1]
        if fresh[place] == len(picks):
            heapq.heappop(heap)
            picks.append(place)
            best = np.maximum(best, similarities[place])
        else:
            fresh[place] = len(picks)
            heapq.heapreplace(heap, (-np.maximum(similarities[place] - best, 0.0).sum(), place))
    return np.array(picks)


def plain_choice(network: LastLayer, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """The textbook's picks and weights."""
    similarities = plain_similarities(network)
    picks = np.sort(plain_picks(similarities, budget))
    return picks, np.bincount(similarities[:, picks].argmax(axis=1), minlength=budget)


def our_choice(network: LastLayer, budget: int, memory: int) -> tuple[np.ndarray, np.ndarray]:
    """Our picks and weights."""
    return choose_weighted(Distances.of(network), budget, memory, rng.numpy_generator(1, 0, "craig"))


def pressed_choice(network: LastLayer, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """The picks and weights by the way of large groups with few pairs."""
    distances, count = Distances.of(network), len(network.labels)
    generator = rng.numpy_generator(1, 0, "craig")
    sample = np.sort(generator.choice(count, count // SAMPLED, replace=False))
    picks = np.sort(greedy_by_sample(distances, budget, sample, count**2 // KEPT, generator))
    return picks, weigh(distances, picks)


def compare(name: str, network: LastLayer, repeats: int) -> list[Row]:
    """Textbook and ours, and ours for large groups.

    Raises:
        RuntimeError: The objectives or the sums of the weights differ.
    """
    count = len(network.labels)
    budget = count // 10
    similarities, matrix = plain_similarities(network), Distances.of(network).matrix()
    picking = in_turn([lambda: plain_picks(similarities, budget), lambda: greedy_on_matrix(matrix, budget)], repeats)
    whole = in_turn([lambda: plain_choice(network, budget), lambda: our_choice(network, budget, MEMORY)], repeats)
    too_small = max(0, matrix.nbytes // 2**20 - 1)
    chosen = [
        plain_choice(network, budget),
        our_choice(network, budget, MEMORY),
        our_choice(network, budget, too_small),
        pressed_choice(network, budget),
    ]
    values = [float(similarities[:, picks].max(axis=1).sum()) for picks, _ in chosen]
    if abs(values[1] - values[0]) > 1e-6 * values[0] or any(weights.sum() != count for _, weights in chosen):
        raise RuntimeError(f"{name}: objectives {values}, weights {[weights.sum() for _, weights in chosen]}")
    far = [float(matrix[:, picks].min(axis=1).mean()) for picks, _ in chosen]
    return [
        Row(f"{name}: picks", *picking, "s", 1.0),
        Row(f"{name}: whole", *whole, "s", 1.0),
        Row(f"{name}: objective, large / exact", values[2], values[1], "sum of similarities", 0.99),
        Row(f"{name}: objective, pressed / exact", values[3], values[1], "sum of similarities", 0.99),
        Row(f"{name}: distance to picks, exact / large", far[1], far[2], "mean distance"),
        Row(f"{name}: distance to picks, exact / pressed", far[1], far[3], "mean distance"),
    ]


def large(count: int = 100_000, budget: int | None = None, classes: int = 10, size: int = 512) -> dict[str, float]:
    """Processor seconds of a choice from a group that large, and the peak of its process in MiB, on one thread."""
    return in_fresh_process(_large, count, budget or count // 10, classes, size)


def _large(count: int, budget: int, classes: int, size: int) -> dict[str, float]:
    torch.set_num_threads(1)
    network = clustered_class(count, classes, size)
    before, start = peak(), time.process_time()
    picks, weights = our_choice(network, budget, min(MEMORY, 8 * count**2 // 2**20 - 1))
    seconds = time.process_time() - start
    if len(np.unique(picks)) != budget or weights.sum() != count:
        raise RuntimeError(f"craig, {count} examples: {len(picks)} picks, weights of {weights.sum():g}")
    return {"seconds": seconds, "peak": peak(), "peak before": before}


def measure(quick: bool = False) -> list[Row]:
    """Time and compare on one thread."""
    torch.set_num_threads(1)
    count, size, repeats, many = (300, 16, 1, 1_500) if quick else (5_000, 512, 3, 20_000)
    rows = []
    for classes in (10, 100):
        for kind, layer in (("random", random_class), ("clustered", clustered_class)):
            name = f"craig, {count} x 10 %, {classes} classes, {kind}"
            rows += compare(name, layer(count, classes, size), repeats)
    found = large(many, size=size)
    rows.append(
        Row(f"craig, {many} at once: float64 matrix / all of ours", many**2 / 2**17, found["peak"], "MiB at the peak")
    )
    return rows


def main() -> None:
    run(measure, __doc__)


if __name__ == "__main__":
    main()
