"""Selection of examples.

    python -m benchmarks.selection [last_layer ranked graph_cut gradmatch craig k_center] [--quick]

All ways start from the same scores, logits and embeddings, and must choose the same examples, or equally good ones.
Larger cases run alone, for minutes: CRAIG's 10,000 of 100,000 examples; the growth of the peak memory at 200,000
examples of 1,000 classes:

    python -c "from benchmarks.selection import large; print(large())"
    python -c "from benchmarks.selection import many_classes; print(many_classes())"
"""

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import orthogonal_mp_gram
from torch import Tensor

from benchmarks.common import Row, Work, in_fresh_process, in_turn, peak, run, seconds
from src import rng
from src.coresets.craig import Distances, choose_weighted, greedy_by_sample, greedy_on_matrix, weigh
from src.coresets.embeddings import farthest_first
from src.coresets.gradmatch import pursue
from src.coresets.graph_cut import Similarities, graph_cut_picks, greedy_graph_cut
from src.coresets.inputs import (
    CandidateGroup,
    LastLayer,
    SelectionInputs,
    errors_of,
    gradient_norms,
    gradient_sum,
    inner_products,
    make_groups,
)
from src.coresets.ranked import keep_by_rank
from src.coresets.registry import find_method

# name, ours, from gradients (authors), from their factors (strongest alternative), target
LAST_LAYER: tuple[
    tuple[str, Callable[..., Tensor], Callable[[Tensor], Tensor], Callable[..., Tensor], float], ...
] = (
    ("inner products", inner_products, lambda g: g @ g.T, lambda e, h: e @ e.T * (1 + h @ h.T), 0.9),
    (
        "norms",
        gradient_norms,
        lambda g: g.norm(dim=1),
        lambda e, h: e.norm(dim=1) * (1 + h.square().sum(dim=1)).sqrt(),
        0.9,
    ),
)


def materialized(errors: Tensor, embeddings: Tensor) -> Tensor:
    """The gradients ``[e, e (x) h]``, ``(n, C (d + 1))``."""
    return torch.cat([errors, (errors[:, :, None] * embeddings[:, None, :]).flatten(1)], dim=1)


def last_layer(quick: bool = False) -> list[Row]:
    """Norms and inner products of last-layer gradients.

    1,000 examples, 100 classes, embeddings of 512 numbers: a gradient has 51,300. Authors: all gradients are built
    (205 MB). Strongest alternative: one line from their factors, as in this project, so a ratio of 1 is
    the best possible.

    Raises:
        RuntimeError: Two implementations disagree.
    """
    count, classes, size, repeats = (20, 5, 8, 1) if quick else (1_000, 100, 512, 5)
    draw = torch.Generator().manual_seed(0)
    errors = torch.softmax(3.0 * torch.randn(count, classes, generator=draw), dim=1)
    errors -= torch.eye(classes)[torch.randint(classes, (count,), generator=draw)]
    embeddings = torch.randn(count, size, generator=draw).relu()
    rows = []
    for name, ours, from_gradients, from_factors, target in LAST_LAYER:
        found: dict[str, Tensor] = {}
        ways = (
            lambda found=found, way=from_gradients: found.update(authors=way(materialized(errors, embeddings))),
            lambda found=found, way=from_factors: found.update(strongest=way(errors, embeddings)),
            lambda found=found, way=ours: found.update(ours=way(errors, embeddings)),
        )
        times = in_turn(ways, repeats)
        for other in (found["authors"], found["strongest"]):
            expected = other.to(found["ours"])
            if not torch.allclose(found["ours"], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
                raise RuntimeError(f"{name}: two implementations disagree")
        rows.append(
            Row(
                f"{name} of last-layer gradients, {classes} classes",
                *(1e3 * t for t in times),
                "ms per 1,000 examples",
                target,
            )
        )
    return rows


def each_class_sorted(scores: np.ndarray, labels: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """The papers' code: the highest scores of each class, sorted class by class."""
    kept = []
    for label, budget in enumerate(budgets):
        members = np.flatnonzero(labels == label)
        kept.append(members[np.argsort(scores[members], kind="stable")[len(members) - budget :]])
    return np.sort(np.concatenate(kept))


def each_class_partitioned(scores: np.ndarray, labels: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """The same without a full sort of a class."""
    kept = []
    for label, budget in enumerate(budgets):
        members = np.flatnonzero(labels == label)
        first = len(members) - budget
        kept.append(members[np.argpartition(scores[members], first)[first:]])
    return np.sort(np.concatenate(kept))


def sorted_once(scores: np.ndarray, labels: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """One sort by class and score, and the end of each class."""
    order = np.lexsort((scores, labels))
    ends = np.cumsum(np.bincount(labels, minlength=len(budgets)))
    return np.sort(np.concatenate([order[end - budget : end] for end, budget in zip(ends, budgets, strict=True)]))


def ranked(quick: bool = False) -> list[Row]:
    """The highest 30 % of 50,000 scores in each of 100 classes.

    Authors: each class sorted alone. Strongest alternative: the faster of ``argpartition`` in each class and one sort
    by class and score. Unlike these, ours breaks ties by index and reports them.

    Raises:
        RuntimeError: Two implementations select different examples.
    """
    count, classes, repeats = (500, 10, 1) if quick else (50_000, 100, 20)
    generator = np.random.default_rng(0)
    scores, labels = generator.standard_normal(count), generator.integers(classes, size=count)
    groups = make_groups(labels, classes, fraction=0.3)
    budgets = np.array([group.budget for group in groups])
    found: dict[str, np.ndarray] = {}
    ways = (
        lambda: found.update(authors=each_class_sorted(scores, labels, budgets)),
        lambda: found.update(partitioned=each_class_partitioned(scores, labels, budgets)),
        lambda: found.update(once=sorted_once(scores, labels, budgets)),
        lambda: found.update(ours=keep_by_rank(scores, groups, highest=True, what="scores").indices),
    )
    authors, *others, ours = (1e3 * taken for taken in in_turn(ways, repeats))
    if not all(np.array_equal(choice, found["ours"]) for choice in found.values()):
        raise RuntimeError("choice by rank: two implementations select different examples")
    return [Row(f"selection by rank, {count:,} scores, {classes} classes", authors, min(others), ours, "ms", 0.9)]


def random_class(count: int, classes: int, size: int) -> LastLayer:
    """Random logits and labels, and embeddings as after a ReLU."""
    draw = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(count, classes, generator=draw)
    embeddings = torch.randn(count, size, generator=draw).relu()
    return LastLayer(logits, torch.randint(classes, (count,), generator=draw), embeddings)


def naive_greedy(similarities: np.ndarray, budget: int) -> np.ndarray:
    """The papers' code: all gains at each pick, as sums over the rows of the picks."""
    sums = similarities.sum(axis=0)
    taken = np.zeros(len(sums), dtype=bool)
    picks: list[int] = []
    for _ in range(budget):
        gains = sums - 2.0 * similarities[picks].sum(axis=0)
        gains[taken] = -np.inf
        picks.append(int(gains.argmax()))
        taken[picks[-1]] = True
    return np.array(picks)


def running_greedy(sums: np.ndarray, similarities: np.ndarray, budget: int) -> np.ndarray:
    """The strongest alternative: running gains."""
    gains, picks = sums / 2.0, np.empty(budget, dtype=np.int64)  # halves of the gains
    for pick in range(budget):
        picks[pick] = gains.argmax()
        gains -= similarities[picks[pick]]
        gains[picks[pick]] = -np.inf
    return picks


def cut_by_matrix(network: LastLayer, budget: int) -> np.ndarray:
    """The strongest alternative for a whole selection: similarities by two products in numpy, and running gains."""
    errors, embeddings = network.errors.double().numpy(), network.embeddings.double().numpy()
    errors /= (np.linalg.norm(errors, axis=1) * np.sqrt(1.0 + np.square(embeddings).sum(axis=1)))[:, None]
    similarities = embeddings @ embeddings.T
    similarities += 1.0
    similarities *= errors @ errors.T
    similarities += 1.0
    similarities /= 2.0
    return running_greedy(similarities.sum(axis=0), similarities, budget)


def graph_cut(quick: bool = False) -> list[Row]:
    """Graph cut: greedily select 30 % of one group of 5,000 examples, with embeddings of 512 numbers.

    The first row of each group times only the picks, from the same dense similarities. Authors: gains summed again at
    each pick, run once without a warm-up. Strongest alternative: gains updated incrementally in five lines of numpy.
    Ours does the same and also gives ties within rounding to the lower index, so it is slower. The second row times
    the whole selection in float64, from errors and embeddings, which is a hundred times as long; ours computes only
    half of the symmetric matrix. The third row compares our two ways: columns computed when needed, and the matrix.

    Raises:
        RuntimeError: Two ways pick different examples.
    """
    count, size, repeats = (200, 16, 1) if quick else (5_000, 512, 5)
    budget = 3 * count // 10
    rows = []
    for classes in (10, 100):
        network = random_class(count, classes, size)
        factors = Similarities.of(network)
        dense, sums = factors.matrix(), factors.sums()
        found: dict[str, np.ndarray] = {}

        def keep(name: str, way: Callable[..., np.ndarray], *arguments: Any, found: dict = found) -> Work:
            """The work of computing and keeping the picks of one way."""
            return lambda: found.update({name: way(*arguments, budget)})

        authors = seconds(keep("authors", naive_greedy, dense), time.process_time)
        picking = in_turn(
            [
                keep("running gains", running_greedy, sums, dense),
                keep("our picks", greedy_graph_cut, sums, dense.__getitem__),
            ],
            repeats,
        )
        ways = [
            keep("by columns", lambda layer, budget: graph_cut_picks(layer, budget, 0), network),
            keep("numpy", cut_by_matrix, network),
            keep("ours", lambda layer, budget: graph_cut_picks(layer, budget, MEMORY), network),
        ]
        columns, numpy, ours = in_turn(ways, 1 if quick else 2)
        if not all(np.array_equal(picks, found["authors"]) for picks in found.values()):
            raise RuntimeError(f"graph cut, {classes} classes: two implementations pick different examples")
        what = f"{budget:,} of {count:,}, {classes} classes"
        rows += [
            Row(f"graph cut: {what}, picks alone", authors, *picking, "s", 0.6),
            Row(f"graph cut: {what}", None, numpy, ours, "s", 1.0),
            Row(f"graph cut: {what}: columns / matrix", None, columns, ours, "s", variant=True),
        ]
    return rows


MEMORY = 2048  # MiB
RIDGE = 1.0


@dataclass(frozen=True)
class GradMatchCase:
    """A class of ``count`` examples, the picks, whether the papers' code is timed too, and the repeats."""

    classes: int
    count: int
    picks: int
    authors: bool
    repeats: int
    width: int = 512


GRADMATCH = (
    GradMatchCase(10, 1_000, 150, True, 3),
    GradMatchCase(100, 1_000, 150, True, 1),
    GradMatchCase(10, 5_000, 1_500, False, 1),
    GradMatchCase(100, 5_000, 1_500, False, 1),
)


def one_class(case: GradMatchCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors ``(n, C)`` of random logits that favor the label, and embeddings ``(n, d)`` as after a ReLU."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(case.count, case.classes, dtype=torch.float64, generator=generator)
    logits[:, 0] += 2
    embeddings = torch.randn(case.count, case.width, dtype=torch.float64, generator=generator).clamp_min(0)
    return errors_of(logits, torch.zeros(case.count, dtype=torch.int64)), embeddings


def plain_pursuit(errors: Tensor, embeddings: Tensor, picks: int) -> tuple[np.ndarray, np.ndarray]:
    """The published algorithm: gradients materialized, the normal equations solved from scratch at each pick."""
    gradients = materialized(errors, embeddings).numpy().T  # (C (d + 1), n), each gradient contiguous
    target = gradients.sum(axis=1)
    residual, chosen = target, []
    while len(chosen) < picks and np.linalg.norm(residual) >= 1e-4 * np.linalg.norm(target):
        products = gradients.T @ residual
        products[chosen] = -np.inf
        chosen.append(int(products.argmax()))
        columns = gradients[:, chosen]
        solution = np.linalg.solve(columns.T @ columns + RIDGE * np.eye(len(chosen)), columns.T @ target)
        residual = target - columns @ solution
    return np.array(chosen), solution


def sklearn_pursuit(errors: Tensor, embeddings: Tensor, picks: int) -> tuple[np.ndarray, np.ndarray]:
    """The strongest alternative: scikit-learn's Gram-based pursuit on products from the factors."""
    gram = (errors @ errors.T * (1 + embeddings @ embeddings.T)).numpy()
    target = gram.sum(axis=1)  # <g_j, sum_i g_i>
    gram.flat[:: len(gram) + 1] += RIDGE
    weights = orthogonal_mp_gram(gram, target, n_nonzero_coefs=picks, copy_Gram=False, copy_Xy=False)
    chosen = np.flatnonzero(weights)
    return chosen, weights[chosen]


def objective(errors: Tensor, embeddings: Tensor, picks: np.ndarray, weights: np.ndarray) -> float:
    """GradMatch's ridged objective of the weighted picks, relative to the squared norm of the target."""
    chosen, w = torch.from_numpy(picks), torch.from_numpy(weights)
    bias, weight = gradient_sum(errors, embeddings)
    near_bias, near_weight = gradient_sum(errors[chosen] * w[:, None], embeddings[chosen])
    missed = (bias - near_bias).square().sum() + (weight - near_weight).square().sum() + RIDGE * w.square().sum()
    return float(missed / (bias.square().sum() + weight.square().sum()))


def gradmatch_row(case: GradMatchCase) -> Row:
    """Time one case.

    Raises:
        RuntimeError: Ours picks differently from the published algorithm, or worse than scikit-learn.
    """
    data = one_class(case)
    name, found = f"GradMatch: {case.picks:,} of {case.count:,}, {case.classes} classes", {}
    ways = [
        lambda: found.update(strongest=sklearn_pursuit(*data, case.picks)),
        lambda: found.update(ours=pursue(*data, case.picks, RIDGE)),
    ]
    if case.authors:
        ways.insert(0, lambda: found.update(authors=plain_pursuit(*data, case.picks)))
    *others, strongest, ours = in_turn(ways, case.repeats)
    if case.authors and found["ours"][0].tolist() != found["authors"][0].tolist():
        raise RuntimeError(f"{name}: two implementations pick different examples")
    reached = {way: objective(*data, *choice) for way, choice in found.items()}
    if reached["ours"] > 1.01 * reached["strongest"]:
        raise RuntimeError(f"{name}: ours is worse: {reached}")
    return Row(name, others[0] if others else None, strongest, ours, "s", 1.0)


def gradmatch(quick: bool = False) -> list[Row]:
    """GradMatch: the picks of a class by orthogonal matching pursuit, from errors and embeddings in float64.

    The authors' code lacks the method, so its column times the published algorithm, which stores the C (d + 1) x n
    matrix of last-layer gradients and solves the normal equations from scratch at each pick. It is not run for the
    larger cases, which need 0.2 GB and 1e13 operations for 10 classes and ten times as much for 100. Strongest
    alternative: scikit-learn's ``orthogonal_mp_gram``, which allows negative weights; this project's does not.

    Raises:
        RuntimeError: Two implementations disagree.
    """
    if not quick:
        return [gradmatch_row(case) for case in GRADMATCH]
    toys = (replace(case, count=case.count // 20, picks=case.picks // 20, width=16, repeats=1) for case in GRADMATCH)
    return [gradmatch_row(case) for case in toys]


OFFSET = 1e-3
SAMPLED, KEPT = 5, 300  # "sparsely sampled" case: one in 5 examples is sampled, and one in 300 pairs is kept


def clustered_class(count: int, classes: int, size: int) -> LastLayer:
    """A class of eight clusters in a few dimensions, embedded by a random network: many gradients are similar."""
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
    """Return ``max d - d_ij + 1e-3``, in float64 like ours."""
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
    """Textbook lazy greedy."""
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
    """Picks and weights of textbook lazy greedy."""
    similarities = plain_similarities(network)
    picks = np.sort(plain_picks(similarities, budget))
    return picks, np.bincount(similarities[:, picks].argmax(axis=1), minlength=budget)


def our_choice(network: LastLayer, budget: int, memory: int) -> tuple[np.ndarray, np.ndarray]:
    """Picks and weights of this project's selection."""
    return choose_weighted(Distances.of(network), budget, memory, rng.numpy_generator(1, 0, "craig"))


def sparse_choice(network: LastLayer, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Picks and weights of this project's sampled algorithm, with few pairs."""
    distances, count = Distances.of(network), len(network.labels)
    generator = rng.numpy_generator(1, 0, "craig")
    sample = np.sort(generator.choice(count, count // SAMPLED, replace=False))
    picks = np.sort(greedy_by_sample(distances, budget, sample, count**2 // KEPT, generator))
    return picks, weigh(distances, picks)


def craig_rows(name: str, network: LastLayer, repeats: int) -> list[Row]:
    """Compare textbook lazy greedy with this project's exact and sampled algorithms.

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
        sparse_choice(network, budget),
    ]
    values = [float(similarities[:, picks].max(axis=1).sum()) for picks, _ in chosen]
    worse = abs(values[1] - values[0]) > 1e-6 * values[0] or min(values[2:]) < 0.95 * values[1]
    if worse or any(weights.sum() != count for _, weights in chosen):
        raise RuntimeError(f"{name}: objectives {values}, weights {[weights.sum() for _, weights in chosen]}")
    far = [float(matrix[:, picks].min(axis=1).mean()) for picks, _ in chosen]
    return [
        Row(f"{name}, picks alone", None, *picking, "s", 1.0),
        Row(name, None, *whole, "s", 1.0),
        Row(f"{name}, distance to the nearest pick: exact / sampled", None, far[1], far[2], "mean", variant=True),
        Row(
            f"{name}, distance to the nearest pick: exact / sparsely sampled",
            None,
            far[1],
            far[3],
            "mean",
            variant=True,
        ),
    ]


def large(count: int = 100_000, budget: int | None = None, classes: int = 10, size: int = 512) -> dict[str, float]:
    """Return the CPU seconds and peak memory in MiB of a selection from a large group, on one thread."""
    return in_fresh_process(_large, count, budget or count // 10, classes, size)


def _large(count: int, budget: int, classes: int, size: int) -> dict[str, float]:
    network = clustered_class(count, classes, size)
    before, start = peak(), time.process_time()
    picks, weights = our_choice(network, budget, min(MEMORY, 8 * count**2 // 2**20 - 1))
    seconds = time.process_time() - start
    if len(np.unique(picks)) != budget or weights.sum() != count:
        raise RuntimeError(f"craig, {count} examples: {len(picks)} picks, sum of weights {weights.sum():g}")
    return {"seconds": seconds, "peak": peak(), "peak before": before}


def craig(quick: bool = False) -> list[Row]:
    """CRAIG: select a tenth of 5,000 examples of one class, with embeddings of 512 numbers.

    Random and clustered examples; lazy greedy evaluates more gains on clusters. The only sensible alternative is
    the textbook lazy greedy, as in the papers' code: a dense matrix of similarities, here from the gradients'
    factors, with gains in a heap and one column evaluated at a time. "picks alone" starts from the matrices; the
    other rows start from errors and embeddings and end with the weights. Both must reach the same objective, and
    this project's sampled algorithm for large groups 95 % of it. Two rows compare the mean distance to the nearest
    pick with that of the exact algorithm: "sampled" when the matrix just exceeds the memory limit, and "sparsely
    sampled" with a smaller sample and one pair in 300 kept. The last row compares the size of a full matrix with
    the peak memory of the sampled algorithm.

    Raises:
        RuntimeError: A selection is worse than the textbook's.
    """
    count, size, repeats, many = (300, 16, 1, 1_500) if quick else (5_000, 512, 3, 20_000)
    rows = []
    for classes in (10, 100):
        for kind, layer in (("random", random_class), ("clustered", clustered_class)):
            name = f"CRAIG: 10 % of {count:,} {kind}, {classes} classes"
            rows += craig_rows(name, layer(count, classes, size), repeats)
    found = _large(many, many // 10, 10, size) if quick else large(many, size=size)
    rows.append(
        Row(
            f"memory of CRAIG on {many:,}, compared with a float64 matrix",
            None,
            many**2 / 2**17,
            found["peak"],
            "MiB",
        )
    )
    return rows


def farthest_by_differences(embeddings: Tensor, budget: int) -> np.ndarray:
    """Exact farthest-first: distances to each pick by differences in float64."""
    points = embeddings.double()

    def distances(point: Tensor) -> Tensor:
        return torch.cdist(points, point[None], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]

    picks, nearest = [int(distances(points.mean(dim=0)).argmin())], torch.full((len(points),), math.inf).double()
    while len(picks) < budget:
        nearest = torch.minimum(nearest, distances(points[picks[-1]]))
        nearest[picks] = -math.inf
        picks.append(int(nearest.argmax()))
    return np.array(picks)


def farthest_by_products(embeddings: Tensor, budget: int) -> np.ndarray:
    """The strongest alternative: squared distances from a float32 product with each pick."""
    squares = embeddings.square().sum(dim=1)
    middle = embeddings.mean(dim=0)
    picks = [int((squares - 2 * embeddings @ middle).argmin())]
    nearest = torch.full((len(embeddings),), math.inf)
    while len(picks) < budget:
        pick = embeddings[picks[-1]]
        nearest = torch.minimum(nearest, squares - 2 * embeddings @ pick + squares[picks[-1]])
        nearest[picks[-1]] = -math.inf
        picks.append(int(nearest.argmax()))
    return np.array(picks)


def k_center(quick: bool = False) -> list[Row]:
    """k-center: select 10 and 30 % of 5,000 examples, with embeddings of 512 numbers.

    The authors' code lacks the method. Strongest alternative: running minima of float32 distances by matrix-vector
    products, whose picks may differ in near ties. This project must pick the same examples as exact
    distances in float64.

    Raises:
        RuntimeError: The picks differ from those of exact distances.
    """
    count, size, repeats = (300, 16, 1) if quick else (5_000, 512, 2)
    rows = []
    for kind, layer in (("random", random_class), ("clustered", clustered_class)):
        embeddings = layer(count, 10, size).embeddings
        for percent in (10, 30):
            budget = count * percent // 100
            picks: dict[str, np.ndarray] = {}
            ways = (
                lambda e=embeddings, b=budget: farthest_by_products(e, b),
                lambda e=embeddings, b=budget, picks=picks: picks.update(ours=farthest_first(e, b)),
            )
            times = in_turn(ways, repeats)
            if not np.array_equal(picks["ours"], farthest_by_differences(embeddings, budget)):
                raise RuntimeError(f"k-center, {kind}: ours picks differently from exact distances")
            rows.append(Row(f"k-center: {percent} % of {count:,} {kind}", None, *times, "s", 1.0))
    return rows


def many_classes(count: int = 200_000, classes: int = 1_000, size: int = 512, picks: int = 400) -> dict[str, float]:
    """Return the growth of a process's peak memory, in MiB, during CRAIG's exact selection from all classes at once.

    There are only a few picks: more picks would take hours, but no more memory.
    """
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=draw)
    embeddings = torch.randn(count, size, generator=draw).relu_()
    network = LastLayer(torch.randn(count, classes, generator=draw).mul_(3.0), labels, embeddings)
    inputs = SelectionInputs(labels.numpy(), classes, layers=[network])
    Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak, to exclude input checks
    method, before, start = find_method("craig"), peak(), time.process_time()
    options = method.options(selection_memory=MEMORY, selection_subsample="exact")
    method.select(inputs, [CandidateGroup(np.arange(count), picks)], options)
    return {"seconds": time.process_time() - start, "growth": peak() - before, "before": before}


BENCHMARKS = {
    "last_layer": last_layer,
    "ranked": ranked,
    "graph_cut": graph_cut,
    "gradmatch": gradmatch,
    "craig": craig,
    "k_center": k_center,
}

if __name__ == "__main__":
    run(BENCHMARKS, __doc__)
