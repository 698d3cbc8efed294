import numpy as np
import pytest
import torch

from src.coresets import CandidateGroup, LastLayer, SelectionInputs, d2, make_groups
from src.coresets.d2 import D2Options
from src.errors import ArgumentError, FileError


def material(scores, embeddings, labels=None):
    h = torch.as_tensor(embeddings)
    labels = np.zeros(len(h), dtype=np.int64) if labels is None else labels
    layer = LastLayer(torch.zeros(len(h), 2), torch.from_numpy(labels), h)
    return SelectionInputs(labels, 2, scores=np.asarray(scores, dtype=np.float64), layers=[layer])


def slow_d2(material, groups, k, gamma):
    """The graph as a dense table, with the highest feature recomputed at each pick."""
    h = material.layers[0].embeddings.double().numpy()
    chosen = []
    for group in groups:
        members = list(group.positions)
        size = len(members)
        squares = [[float(((h[a] - h[b]) ** 2).sum()) for b in members] for a in members]
        edge = np.zeros((size, size), dtype=bool)
        for a in range(size):
            others = sorted((b for b in range(size) if b != a), key=lambda b, a=a: (squares[a][b], b))
            for b in others[:k]:
                edge[a, b] = edge[b, a] = True
        lengths = [squares[a][b] for a in range(size) for b in range(size) if edge[a, b]]
        scale = np.mean(lengths) if lengths and np.mean(lengths) > 0 else 1.0
        scores = material.scores[members]
        spread = scores.max() - scores.min()
        x = [(s - scores.min()) / spread if spread else 1.0 for s in scores]
        x = [
            x[a] + sum(np.exp(-squares[a][b] / scale) * x[b] for b in range(size) if edge[a, b]) for a in range(size)
        ]
        rest = list(range(size))
        for _ in range(group.budget):
            best = max(rest, key=lambda a: (x[a], -a))
            rest.remove(best)
            chosen.append(members[best])
            for b in rest:
                if edge[best, b]:
                    x[b] -= np.exp(-gamma * squares[best][b] / scale) * x[best]
    return np.sort(chosen)


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize(("fraction", "k", "gamma"), [(0.1, 5, 1.0), (0.5, 3, 0.1), (0.8, 1, 0.0), (1.0, 100, 1.0)])
def test_equals_the_plain_way(per_class, fraction, k, gamma):
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 70)
    made = material(rng.normal(size=70), rng.normal(size=(70, 4)), labels)
    groups = make_groups(labels, 2, fraction=fraction, per_class=per_class)
    selection = d2.d2(made, groups, D2Options(d2_neighbors=k, d2_gamma=gamma))
    np.testing.assert_array_equal(selection.indices, slow_d2(made, groups, k, gamma))
    assert len(selection.indices) == sum(group.budget for group in groups)
    assert not selection.weighted


def slow_neighbors(points, k):
    rows = []
    for a in range(len(points)):
        squares = [((points[a] - points[b]) ** 2).sum() for b in range(len(points))]
        rows.append(sorted(sorted((b for b in range(len(points)) if b != a), key=lambda b, s=squares: (s[b], b))[:k]))
    return np.array(rows)


@pytest.mark.parametrize("k", [1, 4, 39])
@pytest.mark.parametrize("kind", ["random", "grid", "equal", "doubled", "far from 0"])
def test_neighbors_are_exact_and_ties_go_to_the_lower_index(kind, k, monkeypatch):
    rng = np.random.default_rng(5)
    points = {
        "random": rng.normal(size=(40, 6)),
        "grid": rng.integers(0, 3, (40, 3)).astype(np.float64),
        "equal": np.full((40, 6), 0.1),
        "doubled": np.repeat(rng.normal(size=(10, 6)), 4, axis=0),
        "far from 0": rng.normal(size=(40, 6)) + 1e6,
    }[kind]
    expected = slow_neighbors(points, k)
    for rows in (7, 256):
        monkeypatch.setattr(d2, "_ROWS", rows)
        places, squares = d2.nearest_neighbors(torch.from_numpy(points), k, 2048)
        np.testing.assert_array_equal(places, expected)
    exact = ((points[:, None] - points[places]) ** 2).sum(axis=2)
    np.testing.assert_allclose(squares, exact, rtol=1e-7, atol=1e-18)


def test_memory_bounds_the_blocks():
    points = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 3)))
    for one, other in zip(d2.nearest_neighbors(points, 3, 0), d2.nearest_neighbors(points, 3, 2048), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_graph_is_symmetric_and_scaled():
    graph = d2.neighbor_graph(torch.from_numpy(np.random.default_rng(6).normal(size=(30, 3))), 3, 64)
    begin = np.repeat(np.arange(30), np.diff(graph.starts))
    table = np.zeros((30, 30))
    table[begin, graph.ends] = graph.squares
    np.testing.assert_array_equal(table, table.T)
    assert (np.diff(graph.starts) >= 3).all()
    assert graph.squares.mean() == pytest.approx(1.0)


def test_without_edges_the_most_difficult_are_kept():
    rng = np.random.default_rng(7)
    scores = rng.normal(size=30)
    made = material(scores, rng.normal(size=(30, 3)))
    selection = d2.d2(made, [CandidateGroup(np.arange(30), 9)], D2Options(d2_neighbors=0))
    np.testing.assert_array_equal(selection.indices, np.sort(np.argsort(-scores)[:9]))


def test_reverse_messages_cover_both_clusters():
    rng = np.random.default_rng(8)
    h = np.concatenate([rng.normal(0, 0.1, (40, 2)), rng.normal(0, 0.1, (40, 2)) + 100])
    scores = np.concatenate([np.full(40, 1.0), np.full(40, 0.9)]) + rng.normal(0, 0.01, 80)
    scores = np.append(scores, 0.0)
    h = np.concatenate([h, [[50.0, 50.0]]])
    by_difficulty = np.argsort(-scores)[:20]
    selection = d2.d2(material(scores, h), [CandidateGroup(np.arange(81), 20)], D2Options(d2_gamma=1.0))
    assert (by_difficulty < 40).all()
    assert 5 <= (selection.indices < 40).sum() <= 15


def test_the_embeddings_scale_does_not_matter():
    rng = np.random.default_rng(9)
    scores, h = rng.normal(size=40), rng.normal(size=(40, 4))
    group = [CandidateGroup(np.arange(40), 15)]
    one = d2.d2(material(scores, h), group, D2Options())
    other = d2.d2(material(3 + 5 * scores, h.astype(np.float32) * 1024), group, D2Options())
    np.testing.assert_array_equal(one.indices, other.indices)


@pytest.mark.parametrize("budget", [1, 6])
def test_equal_examples_and_groups_of_one(budget):
    made = material(np.full(8, 0.5), torch.full((8, 4), 0.3))
    groups = [
        CandidateGroup(np.arange(6), budget),
        CandidateGroup(np.array([6]), 1),
        CandidateGroup(np.array([7]), 1),
    ]
    selection = d2.d2(made, groups, D2Options())
    assert len(np.unique(selection.indices)) == budget + 2
    assert selection.indices[0] == 0


def test_complaints():
    made, group = material([0.0, 1.0], torch.eye(2)), [CandidateGroup(np.arange(2), 1)]
    with pytest.raises(ArgumentError, match=r"^d2_neighbors -1"):
        d2.d2(made, group, D2Options(d2_neighbors=-1))
    with pytest.raises(ArgumentError, match=r"^d2_gamma -0\.5"):
        d2.d2(made, group, D2Options(d2_gamma=-0.5))
    with pytest.raises(FileError, match="infinite"):
        d2.d2(material([0.0, np.inf], torch.eye(2)), group, D2Options())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_does_not_matter():
    rng = np.random.default_rng(10)
    h = torch.from_numpy(np.repeat(rng.normal(size=(100, 16)), 3, axis=0))
    for one, other in zip(d2.nearest_neighbors(h, 5, 64), d2.nearest_neighbors(h.cuda(), 5, 64), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10)
