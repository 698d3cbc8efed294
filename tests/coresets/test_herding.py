import numpy as np
import pytest
import torch

from src.coresets.embeddings import follow_mean, herding
from src.coresets.inputs import LastLayer, Options, SelectionInputs, make_groups


def points(count: int, size: int = 5, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=draw, dtype=torch.float64) + 3.0


def follow_mean_by_hand(x: np.ndarray, budget: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(budget):
        means = (x[chosen].sum(axis=0) + x) / (len(chosen) + 1)
        distances = np.linalg.norm(x.mean(axis=0) - means, axis=1)
        distances[chosen] = np.inf
        chosen.append(int(distances.argmin()))
    return chosen


@pytest.mark.parametrize("budget", [1, 8, 39])
def test_picks_are_those_of_the_definition(budget):
    x = points(40)
    assert follow_mean(x, budget).tolist() == follow_mean_by_hand(x.numpy(), budget)


def test_the_mean_is_followed_better_than_by_random_choices():
    x = points(200)
    mean = x.mean(dim=0)
    ours = (x[follow_mean(x, 20)].mean(dim=0) - mean).norm()
    generator = np.random.default_rng(0)
    others = [(x[generator.choice(200, 20, replace=False)].mean(dim=0) - mean).norm() for _ in range(50)]
    assert ours < 0.5 * min(others)


def test_all_are_chosen_once():
    assert sorted(follow_mean(points(17).float(), 17).tolist()) == list(range(17))


def test_ties_go_to_the_lower_index():
    twice = points(20).repeat(2, 1)
    place = {pick: step for step, pick in enumerate(follow_mean(twice, 40).tolist())}
    assert all(place[x] < place[x + 20] for x in range(20))
    assert follow_mean(torch.zeros(4, 2), 3).tolist() == [0, 1, 2]
    assert follow_mean(torch.full((5, 2), 0.1), 3).tolist() == [0, 1, 2]
    assert follow_mean(torch.tensor([[0.1], [0.7]]), 1).tolist() == [0]
    assert follow_mean(torch.tensor([[1e3 + 0.1], [1e3 + 0.7]]), 2).tolist() == [0, 1]


@pytest.mark.parametrize("per_class", [True, False])
def test_groups_are_chosen_in_on_their_own(per_class):
    x = points(30)
    labels = np.arange(30) % 2
    labels[5] = 2  # a group of one
    groups = make_groups(labels, 3, fraction=0.3, per_class=per_class)
    network = LastLayer(torch.zeros(30, 3), torch.from_numpy(labels), x)
    selection = herding(SelectionInputs(labels, 3, layers=[network]), groups, Options())
    expected = [g.positions[follow_mean_by_hand(x.numpy()[g.positions], g.budget)] for g in groups]
    assert selection.indices.tolist() == sorted(np.concatenate(expected).tolist())
    assert not selection.weighted
