"""Coreset selection, compared with a textbook implementation of each method.

    python -m benchmarks.selection [last_layer ranked graph_cut gradmatch craig grid k_center subsample] [--quick]

Both implementations start from the same scores, logits and embeddings. They must select the same examples, or an
equally good subset. Three measurements take minutes and run separately: CRAIG on 100,000 examples in one group, its
memory growth on 200,000 examples of 1,000 classes, and subsampled selection from 20,000 examples of 100 classes::

    python -c "from benchmarks.selection import large; print(large())"
    python -c "from benchmarks.selection import many_classes; print(many_classes())"
    python -c "from benchmarks.selection import whole_set; print(whole_set())"
"""

import heapq
import logging
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import Row, in_fresh_process, in_turn, peak, run, seconds
from src import rng
from src.artifacts.paths import TRAINING_FOLDERS, Folders
from src.context import RunContext
from src.coresets.config import GridConfig, PretrainConfig, SelectionConfig
from src.coresets.craig import Distances, choose_weighted, greedy_by_sample, greedy_on_matrix, weigh
from src.coresets.embeddings import farthest_first
from src.coresets.glister import GlisterOptions, Validation, held_out
from src.coresets.gradmatch import pursue
from src.coresets.graph_cut import Similarities, graph_cut_picks, greedy_graph_cut
from src.coresets.grid import Grid
from src.coresets.inputs import (
    GREEDY_EPSILON,
    CandidateGroup,
    LastLayer,
    Selection,
    SelectionInputs,
    errors_of,
    gradient_norms,
    gradient_sum,
    inner_products,
    make_groups,
)
from src.coresets.ranked import keep_by_rank
from src.coresets.registry import find_method
from src.datasets import DataConfig
from src.devices import ComputeConfig
from src.models import ModelConfig
from src.training import RunConfig, TrainingConfig

LAST_LAYER: tuple[tuple[str, Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor], float], ...] = (
    ("inner products", inner_products, lambda gradients: gradients @ gradients.T, 30.0),
    ("norms", gradient_norms, lambda gradients: gradients.norm(dim=1), 100.0),
)


def materialised(errors: Tensor, embeddings: Tensor) -> Tensor:
    """Return the gradients ``[e, e (x) h]``, ``(n, C (d + 1))``."""
    return torch.cat([errors, (errors[:, :, None] * embeddings[:, None, :]).flatten(1)], dim=1)


def last_layer(quick: bool = False) -> list[Row]:
    """Compute norms and inner products of last-layer gradients, from the gradients and from their factors.

    Uses 1,000 examples, 100 classes and 512-dimensional embeddings, so a gradient has 51,300 entries. The plain
    implementation builds the gradients (205 MB). The results of both are compared.

    Raises:
        RuntimeError: The two implementations disagree.
    """
    count, classes, size, repeats = (20, 5, 8, 1) if quick else (1_000, 100, 512, 5)
    draw = torch.Generator().manual_seed(0)
    errors = torch.softmax(3.0 * torch.randn(count, classes, generator=draw), dim=1)
    errors -= torch.eye(classes)[torch.randint(classes, (count,), generator=draw)]
    embeddings = torch.randn(count, size, generator=draw).relu()
    rows = []
    for name, factored, from_gradients, target in LAST_LAYER:
        found: dict[str, Tensor] = {}
        ways = (
            lambda found=found, plain=from_gradients: found.update(plain=plain(materialised(errors, embeddings))),
            lambda found=found, ours=factored: found.update(ours=ours(errors, embeddings)),
        )
        plain, ours = in_turn(ways, repeats)
        expected = found["plain"].to(found["ours"])
        if not torch.allclose(found["ours"], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
            raise RuntimeError(f"{name}: the two implementations disagree")
        rows.append(Row(f"last-layer gradients: {name}", 1e3 * plain, 1e3 * ours, "ms per 1,000 examples", target))
    return rows


def class_by_class(scores: np.ndarray, groups: list[CandidateGroup]) -> np.ndarray:
    """Select by sorting each class separately; return positions in ascending order."""
    kept = [g.positions[np.argsort(scores[g.positions], kind="stable")[-g.budget :]] for g in groups]
    return np.sort(np.concatenate(kept))


def ranked(quick: bool = False) -> list[Row]:
    """Select by rank within classes, compared with one stable sort of the scores.

    Selects 30% of each class from 50,000 scores in 100 classes. The target is at most three times the time of the
    sort. The selection is checked by sorting each class.

    Raises:
        RuntimeError: The selection is wrong.
    """
    count, classes, repeats = (500, 10, 1) if quick else (50_000, 100, 20)
    generator = np.random.default_rng(0)
    scores = generator.standard_normal(count)
    groups = make_groups(generator.integers(classes, size=count), classes, fraction=0.3)
    found: dict[str, Selection] = {}
    ways = (
        lambda: np.argsort(scores, kind="stable"),
        lambda: found.update(ours=keep_by_rank(scores, groups, highest=True, what="scores")),
    )
    plain, ours = in_turn(ways, repeats)
    if not np.array_equal(found["ours"].indices, class_by_class(scores, groups)):
        raise RuntimeError("selection by rank: the selection is wrong")
    name = f"choice by rank, {count} in {classes} classes / one sort"
    return [Row(name, 1e3 * plain, 1e3 * ours, "ms", 1 / 3)]


def random_class(count: int, classes: int, size: int) -> LastLayer:
    """Return random logits, labels and ReLU embeddings."""
    draw = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(count, classes, generator=draw)
    embeddings = torch.randn(count, size, generator=draw).relu()
    return LastLayer(logits, torch.randint(classes, (count,), generator=draw), embeddings)


def plain_greedy(similarities: np.ndarray, budget: int) -> np.ndarray:
    """Recompute all gains at each pick, as sums over the rows of the selected examples."""
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
    """Return the minimum CPU seconds of a function, and its picks."""
    picks = []
    return min(seconds(lambda: picks.append(way()), time.process_time) for _ in range(repeats)), picks[-1]


def graph_cut(quick: bool = False) -> list[Row]:
    """Time graph cut's greedy selection with gains recomputed at each pick and with gains updated incrementally.

    Selects 30% of 5,000 examples in one group (512-dimensional embeddings, 10 and 100 classes). The rows with a
    target time only the greedy picks, with both implementations on the same dense similarities. The other rows time
    our full selection without ("plain") and with dense similarities. All must pick the same examples. Anything that
    takes more than a second runs once, without a warm-up.

    Raises:
        RuntimeError: Two implementations pick different examples.
    """
    count, size, repeats = (200, 16, 1) if quick else (5_000, 512, 5)
    budget = 3 * count // 10
    rows = []
    for classes in (10, 100):
        network = random_class(count, classes, size)
        factors = Similarities.of(network)
        dense, sums = factors.matrix(), factors.sums()
        plain, expected = timed(lambda dense=dense: plain_greedy(dense, budget), 1)
        greedy, picks = timed(
            lambda sums=sums, dense=dense: greedy_graph_cut(sums, dense.__getitem__, budget), repeats
        )
        whole, by_matrix = timed(lambda network=network: graph_cut_picks(network, budget, MEMORY), 1)
        factored, by_columns = timed(lambda network=network: graph_cut_picks(network, budget, 0), 1)
        if not all(np.array_equal(found, expected) for found in (picks, by_matrix, by_columns)):
            raise RuntimeError(f"graph cut, {classes} classes: two implementations pick different examples")
        what = f"graph cut, {count} x 30 %, {classes} classes"
        rows.append(Row(f"{what}: picks", plain, greedy, "s", 500.0))
        rows.append(Row(f"{what}: columns / dense, whole", factored, whole, "s"))
    return rows


MEMORY = 2048  # MiB
RIDGE = 1.0
Solve = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class GradMatchCase:
    """A class of ``count`` examples, the number of picks, the plain solver, the repeats and the target ratio."""

    classes: int
    count: int
    picks: int
    plain: str | None
    repeats: int
    target: float | None = None
    width: int = 512


GRADMATCH = (
    GradMatchCase(10, 1_000, 150, "least squares", 2, 50.0),
    GradMatchCase(10, 1_000, 150, "normal equations", 3),
    GradMatchCase(100, 1_000, 150, "normal equations", 1, 50.0),
    GradMatchCase(10, 5_000, 1_500, None, 1),
    GradMatchCase(100, 5_000, 1_500, None, 1),
)


def one_class(case: GradMatchCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Return errors ``(n, C)`` of random logits that favor the label, and ReLU embeddings ``(n, d)``."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(case.count, case.classes, dtype=torch.float64, generator=generator)
    logits[:, 0] += 2
    embeddings = torch.randn(case.count, case.width, dtype=torch.float64, generator=generator).clamp_min(0)
    return errors_of(logits, torch.zeros(case.count, dtype=torch.int64)), embeddings


def least_squares(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Solve the ridge regression with NumPy's least-squares solver."""
    size = columns.shape[1]
    stacked = np.vstack([columns, math.sqrt(RIDGE) * np.eye(size)])
    return np.linalg.lstsq(stacked, np.concatenate([target, np.zeros(size)]), rcond=None)[0]


def normal_equations(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Solve the ridge regression with its normal equations."""
    return np.linalg.solve(columns.T @ columns + RIDGE * np.eye(columns.shape[1]), columns.T @ target)


SOLVERS: dict[str, Solve] = {"least squares": least_squares, "normal equations": normal_equations}


def written_down(errors: torch.Tensor, embeddings: torch.Tensor, picks: int, solve: Solve) -> tuple:
    """Run matching pursuit on materialized gradients; return the picks in order and the last solution."""
    weight = (errors[:, :, None] * embeddings[:, None, :]).flatten(1)
    gradients = torch.cat([errors, weight], dim=1).numpy().T  # (C (d + 1), n), each gradient contiguous
    target = gradients.sum(axis=1)
    residual, chosen = target, []
    while len(chosen) < picks and np.linalg.norm(residual) >= 1e-4 * np.linalg.norm(target):
        products = gradients.T @ residual
        products[chosen] = -np.inf
        chosen.append(int(products.argmax()))
        columns = gradients[:, chosen]
        solution = solve(columns, target)
        residual = target - columns @ solution
    return chosen, solution


def gradmatch_row(case: GradMatchCase) -> Row:
    """Time one case.

    Raises:
        RuntimeError: The two implementations disagree.
    """
    errors, embeddings = one_class(case)
    name, found = f"GradMatch, {case.picks:,} of {case.count:,}, {case.classes} classes", {}

    def ours() -> None:
        found.update(ours=pursue(errors, embeddings, case.picks, RIDGE))

    if case.plain is None:
        return Row(f"{name} (ours only)", math.nan, *in_turn((ours,), case.repeats), "s")

    def plain() -> None:
        found.update(plain=written_down(errors, embeddings, case.picks, SOLVERS[case.plain]))

    times = in_turn((plain, ours), case.repeats)
    (picks, weights), (wanted, solution) = found["ours"], found["plain"]
    if picks.tolist() != wanted:
        raise RuntimeError(f"{name}: the two implementations pick different examples")
    if (solution >= 0).all() and not np.allclose(weights, solution, rtol=1e-8):
        raise RuntimeError(f"{name}: weights differ by {np.abs(weights - solution).max()}")
    return Row(f"{name}, {case.plain}", *times, "s", case.target)


def gradmatch(quick: bool = False) -> list[Row]:
    """Time GradMatch's matching pursuit in one class, on materialized gradients and with inner products only.

    The plain implementation stores the C (d + 1) x n matrix of last-layer gradients and solves the ridge regression
    from scratch at each pick, either directly or with its normal equations. Ours is ``pursue``. Both start from
    errors and embeddings in float64, and their picks and weights are compared. The last rows have no plain
    implementation: for 10 and 100 classes, it would need 0.2 and 2 GB, and 1e13 and 1e14 operations.

    Raises:
        RuntimeError: The two implementations disagree.
    """
    if not quick:
        return [gradmatch_row(case) for case in GRADMATCH]
    toys = (replace(case, count=case.count // 20, picks=case.picks // 20, width=16, repeats=1) for case in GRADMATCH)
    return [gradmatch_row(replace(case, plain=case.plain or "normal equations")) for case in toys]


OFFSET = 1e-3
SAMPLED, KEPT = 5, 300  # "pressed" case: one in 5 examples is sampled, and one in 300 pairs is kept


def clustered_class(count: int, classes: int, size: int) -> LastLayer:
    """Return a class of eight low-dimensional clusters, embedded by a random model: many gradients are similar."""
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
    """Pick with the textbook lazy greedy algorithm."""
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
    """Return the textbook implementation's picks and weights."""
    similarities = plain_similarities(network)
    picks = np.sort(plain_picks(similarities, budget))
    return picks, np.bincount(similarities[:, picks].argmax(axis=1), minlength=budget)


def our_choice(network: LastLayer, budget: int, memory: int) -> tuple[np.ndarray, np.ndarray]:
    """Return our picks and weights."""
    return choose_weighted(Distances.of(network), budget, memory, rng.numpy_generator(1, 0, "craig"))


def pressed_choice(network: LastLayer, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the picks and weights of the algorithm for large groups, with few pairs kept."""
    distances, count = Distances.of(network), len(network.labels)
    generator = rng.numpy_generator(1, 0, "craig")
    sample = np.sort(generator.choice(count, count // SAMPLED, replace=False))
    picks = np.sort(greedy_by_sample(distances, budget, sample, count**2 // KEPT, generator))
    return picks, weigh(distances, picks)


def craig_rows(name: str, network: LastLayer, repeats: int) -> list[Row]:
    """Compare the textbook implementation, ours, and our algorithm for large groups.

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
    """Compare CRAIG's selection in one class with a textbook lazy greedy, and with our algorithm for large groups.

    Selects a tenth of 5,000 examples (512-dimensional embeddings, 10 and 100 classes), either random or clustered;
    clusters need more evaluations in the lazy greedy. The textbook implementation stores the similarity matrix, keeps
    gains in a heap and evaluates one column at a time. "picks" starts from the matrices of both; "whole" starts from
    errors and embeddings and includes the weights. Both must reach the same objective. In "large", the matrix just
    does not fit in memory. "pressed" uses a smaller sample and keeps one pair in 300, so that crowded gradients must
    be sampled. Higher objectives are better, so the value for large groups comes first. The last row is memory.

    Raises:
        RuntimeError: A selection is worse than the textbook's.
    """
    count, size, repeats, many = (300, 16, 1, 1_500) if quick else (5_000, 512, 3, 20_000)
    rows = []
    for classes in (10, 100):
        for kind, layer in (("random", random_class), ("clustered", clustered_class)):
            name = f"craig, {count} x 10 %, {classes} classes, {kind}"
            rows += craig_rows(name, layer(count, classes, size), repeats)
    found = _large(many, many // 10, 10, size) if quick else large(many, size=size)
    rows.append(
        Row(f"craig, {many} at once: float64 matrix / all of ours", many**2 / 2**17, found["peak"], "MiB at the peak")
    )
    return rows


def grid(quick: bool = False) -> list[Row]:
    """Time a grid of short runs on digits, with its figure drawn after every cell and at limited intervals."""
    seeds, epochs = ([1], 1) if quick else ([1, 2], 5)
    config = GridConfig(funcs=["random", "csl", "forget"], fractions=[0.1, 0.5], seeds=seeds)
    run_config = RunConfig(
        ModelConfig("small_mlp"), TrainingConfig(epochs=epochs, learning_rate=0.05, lr_sched="const"), batch_size=64
    )
    selections = {name: SelectionConfig(coreset_func=name) for name in config.funcs}
    pretrain = PretrainConfig(coreset_pretrain_epochs=2)
    warned, times = logging.root.level, {-1.0: math.inf, 60.0: math.inf}
    logging.root.setLevel(logging.WARNING)
    for every in list(times) * (1 if quick else 3):
        with tempfile.TemporaryDirectory() as name, mock.patch("src.coresets.grid._DRAW_EVERY", every):
            folders = Folders(**{kind: Path(name, kind) for kind in (*TRAINING_FOLDERS, "plots_folder")})
            with RunContext(DataConfig("digits"), ComputeConfig(), folders.datasets_folder, seed=1) as context:
                table = Grid(context, config, selections, pretrain, run_config, folders)
                start = time.process_time()
                table.run()
                table.write()
                times[every] = min(times[every], time.process_time() - start)
    logging.root.setLevel(warned)
    return [Row(f"a grid of {len(table.runs)} runs of {epochs} epochs, small_mlp on digits", *times.values(), "s")]


def plain_farthest_first(embeddings: Tensor, budget: int) -> np.ndarray:
    """Pick with all distances to each pick, computed from differences in float64."""
    points = embeddings.double()

    def distances(point: Tensor) -> Tensor:
        return torch.cdist(points, point[None], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]

    picks, nearest = [int(distances(points.mean(dim=0)).argmin())], torch.full((len(points),), math.inf).double()
    while len(picks) < budget:
        nearest = torch.minimum(nearest, distances(points[picks[-1]]))
        nearest[picks] = -math.inf
        picks.append(int(nearest.argmax()))
    return np.array(picks)


def k_center(quick: bool = False) -> list[Row]:
    """Compare k-center selection using all distances to each pick in float64 with ours.

    Selects 10% and 30% of 5,000 examples (512-dimensional embeddings).

    Raises:
        RuntimeError: The two implementations pick different examples.
    """
    count, size, repeats = (300, 16, 1) if quick else (5_000, 512, 2)
    rows = []
    for kind, layer in (("random", random_class), ("clustered", clustered_class)):
        embeddings = layer(count, 10, size).embeddings
        for percent in (10, 30):
            budget = count * percent // 100
            plain, expected = timed(lambda: plain_farthest_first(embeddings, budget), repeats)  # noqa: B023
            ours, picks = timed(lambda: farthest_first(embeddings, budget), repeats)  # noqa: B023
            if not np.array_equal(picks, expected):
                raise RuntimeError(f"k-center, {kind}: the two implementations pick different examples")
            rows.append(Row(f"k-center, {count} x {percent} %, {kind}", plain, ours, "s", 2.0))
    return rows


SUBSAMPLED = ("graph_cut", "craig", "gradmatch", "glister", "k_center")


def reached(name: str, network: LastLayer, found: Selection) -> float:
    """Return the objective value of a method's selection, as described in ``subsample``."""
    picks, errors, embeddings = found.indices, network.errors.double(), network.embeddings.double()
    if name == "graph_cut":  # without the diagonal of the similarities
        similarities = Similarities.of(network)
        parts = gradient_sum(similarities.errors[picks], similarities.embeddings[picks])
        among = (len(picks) ** 2 + sum(float(part.square().sum()) for part in parts)) / 2 - len(picks)
        return float(similarities.sums()[picks].sum() - among)
    if name == "craig":
        return float(Distances.of(network).nearest(picks)[0].mean())
    if name == "gradmatch":  # at the best scale of the weights
        both = gradient_sum(errors[picks] * torch.from_numpy(found.weights)[:, None], embeddings[picks])
        ours, wanted = (torch.cat([bias, w.flatten()]) for bias, w in (both, gradient_sum(errors, embeddings)))
        return float(torch.linalg.vector_norm(wanted - ours * (ours @ wanted) / (ours @ ours)) / wanted.norm())
    if name == "glister":
        judges = np.flatnonzero(held_out(network.labels.numpy(), network.logits.shape[1], 1))
        validation = Validation(network, network.at(judges), GlisterOptions().glister_eta)
        validation.judged(picks)
        logits = validation.logits - validation.eta / validation.count * validation.effect
        return float(torch.nn.functional.cross_entropy(logits, validation.labels))
    return float(torch.cdist(embeddings, embeddings[picks]).amin(dim=1).max())


def subsample(quick: bool = False) -> list[Row]:
    """Compare greedy selection from all candidates ("plain") with subsampled selection, the default above 1e8 gains.

    Selects 30% of 5,000 clustered examples in one group (10 classes, 512-dimensional embeddings). Objectives of both
    and of a random selection: graph cut's function (higher is better); the mean distance to CRAIG's nearest pick,
    GradMatch's gradient error, the loss on GLISTER's held-out examples, and k-center's radius (lower is better).
    """
    count, size = (600, 16) if quick else (5_000, 512)
    network = clustered_class(count, 10, size)
    labels, rows = network.labels.numpy(), []
    inputs = SelectionInputs(labels, 10, layers=[network])
    groups = make_groups(labels, 10, fraction=0.3)
    random = find_method("random")
    at_random = random.select(inputs, groups, random.options())
    for name in SUBSAMPLED:
        method, found, times = find_method(name), {}, {}
        for way in ("exact", GREEDY_EPSILON):
            options = method.options(selection_subsample=way)
            start = time.process_time()
            found[way] = method.select(inputs, groups, options)
            times[way] = time.process_time() - start
        rows.append(Row(f"{name}, {count} x 30 %: exact / subsampled", *times.values(), "s"))
        exact, near, chance = (reached(name, network, choice) for choice in (*found.values(), at_random))
        rows.append(Row(f"{name}: objective, exact / subsampled", exact, near, "objective"))
        rows.append(Row(f"{name}: objective, exact / random", exact, chance, "objective"))
    return rows


def whole_set(count: int = 20_000, classes: int = 100, size: int = 512) -> dict[str, float]:
    """Return the CPU seconds of each method's subsampled selection of 30% from all classes at once."""
    network = clustered_class(count, classes, size)
    inputs = SelectionInputs(network.labels.numpy(), classes, layers=[network])
    groups, spent = make_groups(inputs.labels, classes, fraction=0.3, per_class=False), {}
    for method in map(find_method, SUBSAMPLED):
        start = time.process_time()
        method.select(inputs, groups, method.options(selection_subsample=GREEDY_EPSILON))
        spent[method.name] = time.process_time() - start
    return spent


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
    "grid": grid,
    "k_center": k_center,
    "subsample": subsample,
}

if __name__ == "__main__":
    run(BENCHMARKS, __doc__)
