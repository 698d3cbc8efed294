import numpy as np
import pytest
import torch

from src.coresets import CandidateGroup, LastLayer, SelectionInputs, make_groups
from src.coresets.embeddings import center_distances, moderate, nearest_to_median
from src.coresets.inputs import Options


def material(embeddings, labels):
    h, y = torch.as_tensor(embeddings), torch.as_tensor(labels)
    layer = LastLayer(torch.zeros(len(y), int(y.max()) + 1), y, h)
    return SelectionInputs(y.numpy(), int(y.max()) + 1, layers=[layer])


def slow_moderate(material, groups):
    h = material.layers[0].embeddings.double().numpy()
    distances = []
    for i, label in enumerate(material.labels):
        same = [h[j] for j in range(len(h)) if material.labels[j] == label]
        center = sum(same) / len(same)
        distances.append(np.sqrt(sum((a - b) ** 2 for a, b in zip(h[i], center, strict=True))))
    chosen = []
    for group in groups:
        ordered = sorted(distances[i] for i in group.positions)
        half = len(ordered) // 2
        median = ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
        chosen.extend(sorted(group.positions, key=lambda i: (abs(distances[i] - median), i))[: group.budget])
    return np.sort(chosen)


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_equals_the_plain_way(per_class, fraction):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 61)
    made = material(rng.normal(size=(61, 5)), labels)
    groups = make_groups(labels, 2, fraction=fraction, per_class=per_class)
    selection = moderate(made, groups, Options())
    np.testing.assert_array_equal(selection.indices, slow_moderate(made, groups))
    assert len(selection.indices) == sum(group.budget for group in groups)
    assert not selection.weighted


def test_the_median_is_picked():
    # the class's center is 0: distances 1, 1, 2, 2, 3, 3, 8, 8
    line = np.array([1.0, -1, 2, -2, 3, -3, 8, -8])[:, None]
    made = material(line, np.zeros(8, dtype=np.int64))
    selection = moderate(made, [CandidateGroup(np.arange(8), 4)], Options())
    np.testing.assert_array_equal(selection.indices, [2, 3, 4, 5])


def test_ties_go_to_the_lower_index():
    np.testing.assert_array_equal(nearest_to_median(np.array([3.0, 1, 2, 1, 3]), 3), [2, 0, 1])


def test_centers_are_of_all_candidates_of_a_label():
    rng = np.random.default_rng(2)
    h, labels = rng.normal(size=(20, 3)), np.repeat([0, 4], 10)
    distances = center_distances(torch.from_numpy(h), labels)
    expected = [np.linalg.norm(h[i] - h[labels == labels[i]].mean(axis=0)) for i in range(20)]
    np.testing.assert_allclose(distances, expected, rtol=1e-12)


@pytest.mark.parametrize("budget", [1, 5])
def test_equal_embeddings_and_groups_of_one(budget):
    made = material(torch.full((6, 4), 0.1), np.array([0, 0, 0, 0, 0, 1]))
    groups = [CandidateGroup(np.arange(5), budget, 0), CandidateGroup(np.array([5]), 1, 1)]
    selection = moderate(made, groups, Options())
    np.testing.assert_array_equal(selection.indices, [*range(budget), 5])
