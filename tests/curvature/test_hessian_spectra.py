"""Eigenvalues, residuals, quadratures, densities and traces of matrices with known spectra."""

import numpy as np
import pytest
import torch
from curvature_ground import Matrix, batches, dense, images_and_labels, network, small_network
from curvlinops import hutchinson_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from src.curvature.config import STORAGES
from src.curvature.lanczos import (
    Basis,
    Lanczos,
    TraceEstimate,
    add_probe,
    basis_bytes,
    mean_and_error,
    quadrature,
    rademacher,
)
from src.curvature.operators import OPERATORS
from src.curvature.plots import MOST_POINTS, extent, grid, spectral_density, width

OUTLIERS = [50.0, 30.0, 22.0, 21.0, 15.0, 9.0, -4.0]


def moment(nodes, weights, power):
    """The quadrature of ``x ** power``."""
    return float(np.dot(weights, np.power(nodes, power)))


def spectrum(size=400):
    bulk = np.random.default_rng(0).uniform(-0.3, 1.7, size - len(OUTLIERS))
    return -np.sort(-np.concatenate([OUTLIERS, bulk]))


def run(operator, steps, storage="full", seed=0):
    process = Lanczos(operator, rademacher(operator.size, seed, 0, "test").to(operator.dtype), storage)
    for _ in range(steps):
        if not process.exhausted:
            process.step()
    return process


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", ["small", "twice"])
def test_all_eigenvalues_of_a_network(kind, name):
    net, (images, labels) = small_network() if name == "small" else network(name), images_and_labels(11)
    operator = OPERATORS[kind](net, batches(images, labels, 8), 11)
    expected = torch.linalg.eigvalsh(dense(net.eval(), images, labels, kind)).numpy()[::-1]
    process = run(operator, operator.size)
    found = process.ritz(operator.size)
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-8)
    assert found.residuals.max() < 1e-8
    top = run(operator, 40).ritz(5)
    np.testing.assert_allclose(top.values, expected[:5], rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("storage", STORAGES)
def test_outliers_and_their_residuals(storage, dtype):
    matrix, expected = Matrix.of_spectrum(spectrum(), dtype), spectrum()
    process, exact = run(matrix, 60, storage), dtype == torch.float64 and storage != "half"
    found = process.ritz(6)
    np.testing.assert_allclose(found.values, expected[:6], rtol=1e-8 if exact else 2e-5)
    assert found.converged(1e-3)
    assert not process.ritz(60).converged(1e-3)
    assert process.ritz(1, "magnitude").values == found.values[0]
    if storage != "none":
        vectors = process.vectors(found)
        true = vectors @ matrix.values - torch.from_numpy(found.values).to(dtype)[:, None] * vectors
        bound = 50 * 6e-4 if storage == "half" else 1e-4
        assert true.norm(dim=1).max() < bound
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(6, dtype=dtype), rtol=0, atol=1e-3)


@pytest.mark.parametrize("storage", STORAGES)
def test_residuals_are_what_they_say(storage):
    """Also before convergence."""
    matrix = Matrix.of_spectrum(spectrum())
    process = run(matrix, 9)
    found, vectors = process.ritz(5), process.vectors(process.ritz(5))
    true = vectors @ matrix.values - torch.from_numpy(found.values)[:, None] * vectors
    np.testing.assert_allclose(found.residuals, true.norm(dim=1).numpy(), rtol=1e-9)
    np.testing.assert_allclose(run(matrix, 9, storage).ritz(5).residuals, found.residuals, rtol=1e-4)


def test_order_by_magnitude():
    matrix = Matrix.of_spectrum([3.0, 2.0, 1.0, -5.0, -2.5, 0.5, 0.1])
    process = run(matrix, 7)
    np.testing.assert_allclose(process.ritz(4, "magnitude").values, [-5, 3, -2.5, 2], atol=1e-12)
    np.testing.assert_allclose(process.ritz(4).values, [3, 2, 1, 0.5], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("order", ["largest", "magnitude"])
def test_without_a_basis_no_ghost_is_taken_for_an_eigenvalue(dtype, order):
    """Long after convergence, at every number of steps: rounding repeatedly creates copies of eigenvalues."""
    expected = spectrum()
    matrix = Matrix.of_spectrum(expected, dtype)
    process = run(matrix, 30, "none")
    plain = 0
    for _ in range(150):
        process.step()
        found = process.ritz(6, order)
        np.testing.assert_allclose(found.values, expected[:6], rtol=2e-5)
        largest = np.linalg.eigvalsh(np.diag(process.alphas) + np.diag(process.betas[:-1], 1)
                                     + np.diag(process.betas[:-1], -1))[::-1][:6]  # fmt: skip
        plain += not np.allclose(largest, expected[:6], rtol=2e-5)
    assert plain > 20, "the test would otherwise show nothing"


def test_an_exhausted_space_goes_on_elsewhere():
    """Multiple eigenvalues and a null space: a single start vector finds each distinct eigenvalue once."""
    matrix = Matrix(torch.diag(torch.tensor([3.0, 3.0, 3.0, -1.0, 0.0, 0.0], dtype=torch.float64)))
    process = run(matrix, 99)
    assert process.exhausted
    assert len(process) == matrix.products == 6
    np.testing.assert_allclose(process.ritz(6).values, [3, 3, 3, 0, 0, -1], atol=1e-12)
    nodes, weights = quadrature(process.matrix)
    assert weights.sum() == pytest.approx(1)
    assert weights[np.isclose(nodes, 3)].sum() == pytest.approx(1 / 2)
    with pytest.raises(ValueError, match="exhausted"):
        process.step()
    zero = run(Matrix(torch.zeros(4, 4)), 99)
    assert list(zero.ritz(4).values) == [0] * 4
    assert zero.ritz(4).converged(0)
    assert run(Matrix(torch.zeros(4, 4)), 99, "none").exhausted
    single = run(Matrix(torch.full((1, 1), 2.0)), 9)
    assert single.ritz(3).values == [2]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=2, max_size=40),
    st.integers(1, 20),
    st.integers(0, 99),
)
def test_quadratures(eigenvalues, steps, seed):
    """Weights are a distribution; its moments are those of the start vector, up to twice the number of steps."""
    matrix = Matrix.of_spectrum(eigenvalues, seed=seed)
    process = run(matrix, steps, seed=seed)
    nodes, weights = quadrature(process.matrix)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1)
    assert min(eigenvalues) - 1e-6 <= nodes.min()
    assert nodes.max() <= max(eigenvalues) + 1e-6
    start = rademacher(matrix.size, seed, 0, "test").double() / matrix.size**0.5
    scale, power = max(map(abs, eigenvalues)) or 1.0, start
    for k in range(min(2 * len(process), 9)):
        assert abs(moment(nodes, weights, k) - (start @ power).item()) <= 1e-8 * scale**k
        power = matrix.values @ power
    product = matrix.values @ start
    if len(process) > 1:
        assert moment(nodes, weights, 2) == pytest.approx((product @ product).item(), abs=1e-8 * scale**2)


def test_quadratures_over_a_whole_basis_of_signs_give_the_trace():
    """Hadamard vectors are orthogonal, so the mean over all of them is exact, both for trace and density."""
    values = np.arange(8.0) - 2
    matrix = Matrix.of_spectrum(values)
    signs = torch.tensor([[1.0]], dtype=torch.float64)
    for _ in range(3):
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    nodes, weights = [], []
    for start in signs:
        process = Lanczos(matrix, start)
        while not process.exhausted:
            process.step()
        for found, into in zip(quadrature(process.matrix), (nodes, weights), strict=True):
            into.append(found)
    assert np.mean([moment(n, w, 1) for n, w in zip(nodes, weights, strict=True)]) == pytest.approx(values.mean())
    assert np.mean([moment(n, w, 2) for n, w in zip(nodes, weights, strict=True)]) == pytest.approx(
        (values**2).mean()
    )
    for value in values:
        share = np.mean([w[np.isclose(n, value)].sum() for n, w in zip(nodes, weights, strict=True)])
        assert share == pytest.approx(1 / 8)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e5])
def test_densities(scale):
    """The area is 1, the mean is the quadrature's, and the variance is the quadrature's plus the Gaussians'."""
    nodes = [np.array([-0.2, 0.0, 0.01, 0.3, 1.0]) * scale, np.array([-0.1, 0.9]) * scale]
    weights = [np.array([0.1, 0.6, 0.1, 0.1, 0.1]), np.array([0.5, 0.5])]
    low, high = extent(nodes)
    assert (low, high) == pytest.approx((-0.15 * scale, 0.95 * scale))
    sigma = width(low, high)
    assert sigma**2 == pytest.approx(1e-5 * max(1, 1.1 * scale))
    points = grid(min(map(min, nodes)), max(map(max, nodes)), sigma)
    step = points[1] - points[0]
    assert len(points) >= 10_000
    assert step <= sigma / 3
    heights = spectral_density(nodes, weights, points, sigma)
    mean = np.mean([moment(n, w, 1) for n, w in zip(nodes, weights, strict=True)])
    second = np.mean([moment(n, w, 2) for n, w in zip(nodes, weights, strict=True)])
    assert heights.sum() * step == pytest.approx(1)
    assert (heights * points).sum() * step == pytest.approx(mean, rel=1e-5)
    assert (heights * points**2).sum() * step == pytest.approx(second + sigma**2, rel=1e-5)
    assert heights.min() >= 0


def test_a_grid_has_an_upper_bound_and_every_node_is_seen_on_it():
    narrow, wide = width(0, 0.5), width(0, 1e5)
    points = grid(0, 1e5, narrow, wide)
    assert len(points) == MOST_POINTS
    step = points[1] - points[0]
    assert step > 10 * narrow
    nodes = [[0.0, points[500_000] + step / 2]]  # halfway between two points
    heights = spectral_density(nodes, [[0.5, 0.5]], points, narrow)
    assert heights.sum() * step == pytest.approx(1)
    assert heights[500_000] == pytest.approx(heights.max(), rel=0.1)


def test_trace_and_its_error():
    matrix = Matrix.of_spectrum(spectrum())
    trace = spectrum().sum()
    plain = TraceEstimate()
    while not plain.is_done(200, 0.0):
        add_probe(plain, matrix, seed=3)
    mean, error = mean_and_error(plain.samples)
    assert abs(mean - trace) < 4 * error
    off_diagonal = matrix.values - torch.diag(matrix.values.diagonal())
    assert error == pytest.approx((2 * off_diagonal.square().sum().item() / 200) ** 0.5, rel=0.2)
    assert mean == pytest.approx(hutchinson_trace(matrix.values, 300).item(), abs=8 * error)
    known = run(matrix, 60)
    found = known.ritz(6)
    better = TraceEstimate()
    while not better.is_done(200, 0.0):
        add_probe(better, matrix, seed=3, known=(found.values, known.vectors(found)))
    assert better.samples == plain.samples
    mean, small = mean_and_error(better.deflated)
    assert abs(mean - trace) < 4 * small
    assert small < error / 2.5
    # u^T H u with u outside the known eigenvectors, plus their eigenvalues: the definition
    vectors, v = known.vectors(found), rademacher(matrix.size, 3, 0, "trace").double()
    u = v - vectors.T @ (vectors @ v)
    assert better.deflated[0] == pytest.approx((u @ matrix.values @ u).item() + found.values.sum())


def test_when_a_trace_is_good_enough():
    def steps(spectrum_, tolerance, most=100):
        matrix, estimate = Matrix.of_spectrum(spectrum_), TraceEstimate()
        while not estimate.is_done(most, tolerance):
            add_probe(estimate, matrix, seed=0)
        return len(estimate.samples), mean_and_error(estimate.best)

    count, (mean, error) = steps(np.full(50, 2.0), 0.01)
    assert (count, mean, error) == (10, pytest.approx(100), pytest.approx(0, abs=1e-12))
    count, (mean, error) = steps(
        np.linspace(-3, -1, 50), 0.01
    )  # with a negative trace, the loop stops neither too early nor never
    assert 10 <= count < 100
    assert error <= 0.01 * abs(mean)
    count, _ = steps(np.linspace(-1, 1, 50), 0.01)  # a trace of zero has no relative error
    assert count == 100
    assert steps(np.ones(4), 0.01, most=0)[0] == 0
    assert np.isnan(mean_and_error([])).all()
    assert np.isnan(mean_and_error([1.0])[1])


def test_vectors_of_signs():
    a = rademacher(1001, 1, 0, "x")
    assert set(a.tolist()) == {-1.0, 1.0}
    assert torch.equal(a, rademacher(1001, 1, 0, "x"))
    others = [rademacher(1001, *key) for key in ((2, 0, "x"), (1, 1, "x"), (1, 0, "y"))]
    assert all(abs((a @ b).item()) < 150 for b in others)


@pytest.mark.parametrize("storage", ["full", "half", "host"])
def test_bases(storage):
    draw = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(300, 37, generator=draw))[0].T
    basis = Basis(300, torch.float32, torch.device("cpu"), storage)
    for vector in vectors[:20]:
        basis.append(vector)
    other = Basis(300, torch.float32, torch.device("cpu"), storage)
    other.append_stored(basis.stored(0)[:15])
    other.append_stored(basis.stored(15))
    assert len(basis) == len(other) == 20
    assert len(basis.stored(20)) == 0
    probe = torch.randn(300, generator=draw)
    assert torch.equal(basis.coefficients(probe), other.coefficients(probe))
    close = {"rtol": 0, "atol": 2e-3 if storage == "half" else 1e-6}
    torch.testing.assert_close(basis.coefficients(probe), (vectors[:20] @ probe).double(), **close)
    torch.testing.assert_close(basis.combine(torch.eye(20)[:, 3:5]), vectors[3:5], **close)
    rest = probe.clone()
    basis.orthogonalize_(rest)
    assert (basis.coefficients(rest).abs() < 3e-6).all()
    assert basis_bytes(33, 10, torch.float32, storage) == 48 * 10 * (2 if storage == "half" else 4)
    assert basis_bytes(33, 10, torch.float64, "none") == 0


@pytest.mark.parametrize(("storage", "limit"), [("full", 1e-5), ("host", 1e-5), ("half", 1e-3)])
def test_lanczos_vectors_stay_orthonormal_in_float32(storage, limit):
    """Outliers converge within a few steps; unless they are subtracted, rounding then reintroduces them."""
    values, found = torch.from_numpy(spectrum(70_000)), {}  # more numbers than are processed at a time
    for dtype, kind, most in ((torch.float64, "full", 1e-12), (torch.float32, storage, limit)):
        process = run(Matrix(torch.sparse.spdiags(values.to(dtype), torch.tensor(0), (70_000, 70_000))), 60, kind)
        vectors = process.basis.combine(torch.eye(61)).double()
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(61).double(), rtol=0, atol=most)
        found[dtype] = process.ritz(6).values
    np.testing.assert_allclose(found[torch.float32], found[torch.float64], rtol=5e-5 if storage == "half" else 3e-6)


@pytest.mark.parametrize("storage", ["full", "half"])
def test_what_lies_in_the_basis_is_taken_out_to_rounding(storage):
    """The remainder is a millionth of the vector: after a single subtraction, it would be rounding noise."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(300, 21, generator=draw))[0].T
    basis = Basis(300, torch.float32, torch.device("cpu"), storage)
    for vector in vectors[:20]:
        basis.append(vector)
    left = torch.randn(20, generator=draw) @ basis.combine(torch.eye(20)) + 1e-4 * vectors[20]
    basis.orthogonalize_(left)
    assert basis.coefficients(left).norm() < 1e-3 * left.norm()
