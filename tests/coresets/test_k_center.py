import itertools

import numpy as np
import pytest
import torch

from src import rng
from src.coresets.embeddings import farthest_first, k_center
from src.coresets.inputs import LastLayer, SelectionInputs, SubsampleOptions, make_groups, random_parts


def points(count: int, size: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def farthest_first_by_hand(x: np.ndarray, budget: int) -> list[int]:
    chosen = [int(np.linalg.norm(x - x.mean(axis=0), axis=1).argmin())]
    while len(chosen) < budget:
        nearest = np.linalg.norm(x[:, None] - x[None, chosen], axis=2).min(axis=1)
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
    return chosen


def radius(x: np.ndarray, chosen) -> float:
    return np.linalg.norm(x[:, None] - x[None, list(chosen)], axis=2).min(axis=1).max()


@pytest.mark.parametrize("budget", [1, 6, 30])
def test_picks_are_those_of_the_definition(budget):
    x = points(30)
    assert farthest_first(x, budget).tolist() == farthest_first_by_hand(x.numpy(), budget)


@pytest.mark.parametrize("seed", range(5))
def test_the_radius_is_at_most_twice_the_best(seed):
    x = points(9, 2, seed)
    best = min(radius(x.numpy(), chosen) for chosen in itertools.combinations(range(9), 3))
    assert best <= radius(x.numpy(), farthest_first(x, 3)) <= 2 * best


def test_duplicates_come_last_and_by_index():
    x = points(5).repeat(3, 1).float()
    picks = farthest_first(x, 15).tolist()
    assert sorted(picks[:5]) == [0, 1, 2, 3, 4]
    assert picks[5:] == list(range(5, 15))


def test_ties_go_to_the_lower_index():
    corners = torch.tensor([[0.1, 0.1], [0.1, 0.4], [0.4, 0.1], [0.4, 0.4]])
    assert farthest_first(corners, 4).tolist() == [0, 3, 1, 2]
    assert farthest_first(torch.tensor([[0.1], [0.3]]), 1).tolist() == [0]
    assert farthest_first(torch.zeros(4, 2), 3).tolist() == [0, 1, 2]


def test_a_far_outlier_does_not_blur_the_rest():
    x = points(20)
    x[0] *= 1e9
    assert farthest_first(x, 10).tolist() == farthest_first_by_hand(x.numpy(), 10)


@pytest.mark.parametrize("per_class", [True, False])
def test_groups_are_chosen_in_on_their_own(per_class):
    x = points(30)
    labels = np.arange(30) % 3
    labels[labels == 2] = 1
    labels[5] = 2  # a group of one
    groups = make_groups(labels, 3, fraction=0.3, per_class=per_class)
    network = LastLayer(torch.zeros(30, 3), torch.from_numpy(labels), x)
    selection = k_center(SelectionInputs(labels, 3, layers=[network]), groups, SubsampleOptions())
    expected = [g.positions[farthest_first_by_hand(x.numpy()[g.positions], g.budget)] for g in groups]
    assert selection.indices.tolist() == sorted(np.concatenate(expected).tolist())
    assert not selection.weighted


def test_random_parts_are_covered_on_their_own():
    x, labels = points(600), np.zeros(600, dtype=np.int64)
    groups = make_groups(labels, 1, fraction=0.1)
    inputs = SelectionInputs(labels, 1, layers=[LastLayer(torch.zeros(600, 1), torch.from_numpy(labels), x)])
    near = k_center(inputs, groups, SubsampleOptions(selection_subsample=0.15))
    parts = random_parts(groups, 0.15, rng.numpy_generator(1, 0, "k-center parts"))
    assert len(parts) > 2
    expected = [part.positions[farthest_first_by_hand(x.numpy()[part.positions], part.budget)] for part in parts]
    assert near.indices.tolist() == sorted(np.concatenate(expected).tolist())
    exact = k_center(inputs, groups, SubsampleOptions(selection_subsample="exact"))
    assert radius(x.numpy(), exact.indices) <= radius(x.numpy(), near.indices) < radius(x.numpy(), range(60))


def plainly(x: torch.Tensor, budget: int) -> list[int]:
    """Distances of all points to each pick, computed from differences."""
    distances = (x - x.mean(dim=0)).norm(dim=1).numpy()
    picks, nearest = [int(distances.argmin())], np.full(len(x), np.inf)
    while len(picks) < budget:
        nearest = np.minimum(nearest, (x - x[picks[-1]]).norm(dim=1).numpy())
        nearest[picks] = -np.inf
        picks.append(int((nearest >= nearest.max() * (1 - 1e-12)).argmax()))
    return picks


SCALES = {
    "plain": (1.0, 0.0),
    "tiny": (1e-30, 0.0),
    "huge": (1e100, 0.0),
    "far from zero": (1e-4, 1e6),
    "of all scales": (torch.logspace(-40, 0, 700, dtype=torch.float64)[:, None], 0.0),
}


@pytest.mark.parametrize(("scale", "shift"), SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("size", [2, 40])
def test_products_in_float32_decide_nothing(scale, shift, size):
    x = points(700, size) * scale + shift
    assert farthest_first(x, 300).tolist() == plainly(x, 300)
