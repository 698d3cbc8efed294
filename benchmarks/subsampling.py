"""Subsampled greedy selection against our exact one.

    python -m benchmarks.subsampling [subsample] [--quick]

Choices from 20,000 examples of 100 classes run alone:

    python -c "from benchmarks.subsampling import whole_set; print(whole_set())"
"""

import time

import numpy as np
import torch

from benchmarks.common import Row, run
from benchmarks.selection import clustered_class
from src.coresets.craig import Distances
from src.coresets.glister import GlisterOptions, Validation, held_out
from src.coresets.graph_cut import Similarities
from src.coresets.inputs import GREEDY_EPSILON, LastLayer, Selection, SelectionInputs, gradient_sum, make_groups
from src.coresets.registry import find_method

SUBSAMPLED = ("graph_cut", "craig", "gradmatch", "glister", "k_center")


def reached(name: str, network: LastLayer, found: Selection) -> float:
    """The value of a selection under the method's own objective; see :func:`subsample`."""
    picks, errors, embeddings = found.indices, network.errors.double(), network.embeddings.double()
    if name == "graph_cut":  # without the function's diagonal
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
    """Greedy selection from all candidates, compared with subsampling, which is the default above 1e8 gains.

    30 % of one group of 5,000 clustered examples, 10 classes, embeddings of 512 numbers. The rows below each
    method's times give the objective values of both and of a random choice: graph cut's objective (larger is better);
    the mean distance to CRAIG's nearest pick, GradMatch's relative error of the gradient, the loss on GLISTER's
    held-out examples, and k-center's radius (smaller is better).
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
        what = f"{name}, 30 % of {count:,}"
        rows.append(Row(f"{what}: exact / subsampled", None, *times.values(), "s", variant=True))
        exact, near, chance = (reached(name, network, choice) for choice in (*found.values(), at_random))
        rows.append(Row(f"{what}, objective: exact / subsampled", None, exact, near, "objective", variant=True))
        rows.append(Row(f"{what}, objective: exact / random choice", None, exact, chance, "objective", variant=True))
    return rows


def whole_set(count: int = 20_000, classes: int = 100, size: int = 512) -> dict[str, float]:
    """CPU seconds of each subsampled selection of 30 % from all classes at once."""
    network = clustered_class(count, classes, size)
    inputs = SelectionInputs(network.labels.numpy(), classes, layers=[network])
    groups, spent = make_groups(inputs.labels, classes, fraction=0.3, per_class=False), {}
    for method in map(find_method, SUBSAMPLED):
        start = time.process_time()
        method.select(inputs, groups, method.options(selection_subsample=GREEDY_EPSILON))
        spent[method.name] = time.process_time() - start
    return spent


BENCHMARKS = {"subsample": subsample}

if __name__ == "__main__":
    run(BENCHMARKS, __doc__)
