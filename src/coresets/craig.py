"""CRAIG: weighted examples whose gradients stand for all (Mirzasoleiman et al., ICML 2020)."""

import logging
from collections.abc import Sequence

import numpy as np

from src import draws
from src.coresets.facility_location import Distances, greedy_by_sample, greedy_on_matrix
from src.coresets.material import Group, LastLayer, Material, Options, Selection
from src.coresets.registry import Needs, method

log = logging.getLogger(__name__)

_SAMPLE = 5_000  # of a large group: its matrix takes 200 MB
_LEAST_SAMPLE = 1_000
_PAIRS = 2**25  # at most, of a large group: 256 MiB
_LEAST_PAIRS = 2**20


def fits(count: int, memory: int) -> bool:
    """Whether a group's matrix of float64 distances fits ``memory`` MiB."""
    return 8 * count**2 <= memory * 2**20


def choose(distances: Distances, budget: int, memory: int, generator: np.random.Generator) -> np.ndarray:
    """Picks ``(k,)`` of a group, in their order.

    Args:
        distances: Of the group.
        budget: k.
        memory: MiB that pairwise distances may take.
        generator: Draws the sample of a large group.
    """
    size = len(distances)
    if budget == size:
        return np.arange(size)
    if fits(size, memory):
        return greedy_on_matrix(distances.matrix(), budget)
    sample = int(np.clip((memory * 2**17) ** 0.5, min(_LEAST_SAMPLE, size), min(_SAMPLE, size)))
    places = np.sort(generator.choice(size, sample, replace=False))
    return greedy_by_sample(distances, budget, places, int(np.clip(memory * 2**17, _LEAST_PAIRS, _PAIRS)))


def weigh(distances: Distances, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The picks ``(k,)`` in ascending order, and of each how many examples have it as their nearest pick."""
    picks = np.sort(picks)
    return picks, np.bincount(distances.nearest(picks)[1], minlength=len(picks)).astype(np.float64)


def choose_weighted(
    network: LastLayer, group: Group, memory: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A group's picks as positions, ascending, and their weights, which sum to the group's size."""
    distances = Distances.of(network, group.positions)
    picks, weights = weigh(distances, choose(distances, group.budget, memory, generator))
    return group.positions[picks], weights


@method(
    "craig",
    needs=Needs(embeddings=True),
    paper="Mirzasoleiman et al. 2020",
    equation="greedy for sum_i max_{j in S} (max d - d_ij), d between last-layer gradients; weight = how many are "
    "nearest to j (algorithm 1)",
    cost="n^2 (C + d)",
    options=("selection_memory",),
    weighted=True,
)
def craig(material: Material, groups: Sequence[Group], options: Options) -> Selection:
    """CRAIG (Mirzasoleiman et al., ICML 2020, algorithm 1 with facility location, eq. 14), once after pre-training.

    Each group greedily maximises ``sum_i max_{j in S} s_ij`` with ``s_ij = max d - d_ij + 1e-3``; then every example
    is assigned to its most similar pick (ties to the lower index), and a pick's weight is the number assigned. A pick
    is nearest to itself, so its weight is at least 1 unless it duplicates the gradient of a lower pick: then it is 0.
    The weights of a group sum to its size, and are scaled to mean 1 over all picks at the end.

    Groups whose matrix of distances (float64, ``8 n^2`` bytes) fits ``selection_memory`` are chosen from by the exact
    lazy greedy, one matrix at a time. Larger ones get their first picks by the exact greedy on a random sample, and
    the others by the greedy on all examples (see :func:`~src.coresets.facility_location.greedy_by_sample`).
    Memory then: the group's factors in float64 (``8 n (C + d)`` bytes) and up to 0.6 GB.

    Args:
        material: One network with ``embeddings``.
        groups: The groups.
        options: ``selection_memory`` in MiB.

    Raises:
        UserError: A gradient is not finite.
    """
    generator = draws.numpy_generator(material.seed, 0, "craig")
    large = [group for group in groups if not fits(len(group.positions), options.selection_memory)]
    if len(large) < len(groups):
        log.info("craig: exact lazy greedy in %d groups", len(groups) - len(large))
    if large:
        log.info("craig: greedy from a sample's picks in %d groups that exceed --selection_memory", len(large))
    network = material.networks[0]
    chosen = [choose_weighted(network, group, options.selection_memory, generator) for group in groups]
    return Selection.of(*zip(*chosen, strict=True)).rescaled()
