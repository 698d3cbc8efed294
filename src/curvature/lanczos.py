"""The Lanczos process: builds an orthonormal basis in which a large symmetric matrix is tridiagonal.

Each step costs one matrix-vector product. With a stored basis (full precision, half precision, or in CPU memory),
every new vector is orthogonalized against all earlier ones, and each eigenvalue is found once. Without a stored
basis, only two vectors are kept. Rounding then creates copies of converged eigenvalues; `Lanczos.ritz` removes them,
and they do not change a quadrature of the spectrum. The trace is estimated with random vectors (Hutchinson); the part
spanned by known eigenvectors is computed exactly.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal
from torch import Tensor

from src import rng
from src.curvature.config import EIGEN_ORDERS
from src.curvature.operators import CurvatureOperator, dot
from src.models.base import check_tensor

_ROWS = 16  # vectors per block
_COLUMNS, _COLUMNS_GPU = 2**16, 2**20  # entries of each vector read at once; on a CPU, chosen to fit a block in cache
_TAKEN, _TAKEN_HALF = 0.5, 1e-6  # fraction of the squared norm; if more is subtracted, orthogonalize twice


class Basis:
    """Orthonormal vectors of length P, stored in blocks of rows.

    Half precision hardly affects orthogonality: a vector that is already nearly orthogonal has tiny coefficients, so
    the rounded vectors add only tiny errors. Eigenvalues stay accurate to about 1e-5. Entries are multiplied by the
    square root of P before storage, which brings them near 1, where float16 is most accurate.

    Args:
        size: P.
        dtype: Dtype of the vectors.
        device: Device of the vectors.
        storage: A name in ``config.STORAGES``, except ``"none"``.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, storage: str = "full") -> None:
        self.size, self.dtype, self.device, self.storage = size, dtype, device, storage
        self._half = storage == "half"
        self._scale = size**0.5 if self._half else 1.0
        self._storage_device = torch.device("cpu") if storage == "host" else device
        self._blocks: list[Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, vector: Tensor) -> None:
        """Add a unit vector ``(P,)``."""
        self.append_stored((vector * self._scale).unsqueeze(0))

    def append_stored(self, rows: Tensor) -> None:
        """Add rows ``(r, P)`` as :meth:`stored` returns them."""
        for row in rows:
            if self._count == _ROWS * len(self._blocks):
                kind = torch.float16 if self._half else self.dtype
                self._blocks.append(torch.empty(_ROWS, self.size, dtype=kind, device=self._storage_device))
            self._blocks[-1][self._count % _ROWS] = row.to(self._storage_device)
            self._count += 1

    def stored(self, start: int) -> Tensor:
        """The vectors from index ``start`` on, as stored, on the CPU, ``(r, P)``."""
        rows = [self._blocks[i // _ROWS][i % _ROWS].cpu() for i in range(start, self._count)]
        return torch.stack(rows) if rows else torch.empty(0, self.size, dtype=self.dtype)

    def coefficients(self, vector: Tensor) -> Tensor:
        """Inner products with a vector ``(P,)``, float64 ``(k,)`` on its device."""
        found = torch.zeros(self._count, dtype=torch.float64, device=self.device)
        for rows, columns, piece in self._pieces():
            found[rows] += torch.mv(piece, vector[columns])
        return found / self._scale

    def orthogonalize_(self, vector: Tensor) -> None:
        """Subtract the vector's components in the basis, in place, by classical Gram-Schmidt: two basis products.

        If the components are large compared with the remainder, this is repeated, because they are accurate only up
        to rounding ("twice is enough", Kahan and Parlett; criterion: Daniel, Gragg, Kaufman and Stewart, 1976). A
        Lanczos step subtracts the large components first, so it rarely needs the second pass.
        """
        size = dot(vector, vector)
        for _ in range(2):
            found = self.coefficients(vector)
            weights = (found / self._scale).to(self.dtype)
            for rows, columns, piece in self._pieces():
                vector[columns].addmv_(piece.T, weights[rows], alpha=-1)
            if float(found.square().sum()) <= (_TAKEN_HALF if self._half else _TAKEN) * size:
                break

    def combine(self, weights: Tensor) -> Tensor:
        """Linear combinations of the vectors, with weights in the columns of ``(k, m)``: ``(m, P)``."""
        total = torch.zeros(weights.shape[1], self.size, dtype=self.dtype, device=self.device)
        weights = (weights.to(self.device) / self._scale).to(self.dtype)
        for rows, columns, piece in self._pieces():
            total[:, columns] += weights[rows].T @ piece
        return total

    def _pieces(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield row slice, column slice and the block's contents, in the compute dtype and on the compute device."""
        width = _COLUMNS if self.device.type == "cpu" else _COLUMNS_GPU
        for start in range(0, self.size, width):
            columns = slice(start, min(start + width, self.size))
            for number, block in enumerate(self._blocks):
                rows = slice(_ROWS * number, min(_ROWS * (number + 1), self._count))
                yield rows, columns, block[: rows.stop - rows.start, columns].to(self.device, self.dtype)


def basis_bytes(vectors: int, size: int, dtype: torch.dtype, storage: str) -> int:
    """Memory of this many vectors of length ``size``, in bytes."""
    if storage == "none":
        return 0
    return -(-vectors // _ROWS) * _ROWS * size * (2 if storage == "half" else dtype.itemsize)


class Tridiagonal(NamedTuple):
    """T after k steps: diagonal ``alphas`` (k,) and off-diagonal ``betas`` (k,); the last beta leads out of T."""

    alphas: np.ndarray
    betas: np.ndarray


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenvalues, in the requested order.

    Attributes:
        values: ``(m,)``.
        residuals: Norms ``|H x - value x|`` of their unit vectors x, ``(m,)``.
        weights: ``(k, m)``; each column has the coefficients of one x in the Lanczos vectors.
    """

    values: np.ndarray
    residuals: np.ndarray
    weights: np.ndarray

    def relative_residuals(self) -> np.ndarray:
        """Residuals divided by absolute eigenvalues; infinite if only the eigenvalue is zero."""
        size = np.abs(self.values)
        return np.divide(self.residuals, size, out=np.where(self.residuals > 0, np.inf, 0.0), where=size > 0)

    def converged(self, tolerance: float) -> bool:
        """Whether every relative residual is within ``tolerance``."""
        return bool((self.relative_residuals() <= tolerance).all())


def _without_ghosts(matrix: Tridiagonal, values: np.ndarray, residuals: np.ndarray, unit: float) -> np.ndarray:
    """Indices of the genuine eigenvalues of T (ascending); of several copies, the most accurate one is kept.

    Uses Cullum and Willoughby's test ("Lanczos algorithms for large symmetric eigenvalue computations", 1985): a
    simple eigenvalue of T is spurious if it is also an eigenvalue of T without its first row and column. Of several
    equal eigenvalues, one is kept.

    Args:
        matrix: T.
        values: Eigenvalues of T, (k,).
        residuals: Their residuals, (k,).
        unit: The rounding unit of the arithmetic.
    """
    k = len(values)
    if k == 1:
        return np.zeros(1, dtype=int)
    tolerance = 10 * unit * np.sqrt(k) * np.abs(values).max()
    groups = np.split(np.arange(k), 1 + np.flatnonzero(np.diff(values) > tolerance))
    other = eigvalsh_tridiagonal(matrix.alphas[1:], matrix.betas[1:-1])
    kept = []
    for group in groups:
        near = np.abs(other - values[group[0]]).min() <= tolerance
        if len(group) > 1 or not near:
            kept.append(group[residuals[group].argmin()])
    return np.array(kept, dtype=int)


def quadrature(matrix: Tridiagonal) -> tuple[np.ndarray, np.ndarray]:
    """Gauss quadrature of the spectrum for the start vector (Golub and Meurant; Ubaru, Chen and Saad 2017).

    ``sum_j weights_j f(nodes_j)`` equals ``v^T f(H) v`` for every polynomial f of degree below 2k, where v is the
    unit start vector. Its mean over random v is ``trace f(H) / P``.

    Args:
        matrix: T.

    Returns:
        Nodes (k,), ascending, and weights (k,), nonnegative with sum 1.
    """
    nodes, vectors = eigh_tridiagonal(matrix.alphas, matrix.betas[:-1])
    weights = vectors[0] ** 2
    return nodes, weights / weights.sum()


_NOISE = 100  # rounding units, relative to the matrix; a smaller remainder is noise, and the space is exhausted


class Lanczos:
    """One run of the Lanczos process.

    Args:
        operator: The matrix.
        start: The first vector ``(P,)``, of any norm.
        storage: How to store the basis, a name in ``config.STORAGES``.
        seed: Seed of the restart vectors after the Krylov space is exhausted.

    Attributes:
        alphas: The diagonal of T, one entry per step.
        betas: The off-diagonal of T; the last entry leads out of T.
        exhausted: Whether the basis spans an invariant subspace and no further vector is available.
    """

    def __init__(self, operator: CurvatureOperator, start: Tensor, storage: str = "full", seed: int = 0) -> None:
        self.operator, self.seed = operator, seed
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.exhausted = False
        stored = storage != "none"
        self.basis = Basis(operator.size, operator.dtype, operator.device, storage) if stored else None
        self._previous: Tensor | None = None
        self._current = start / dot(start, start) ** 0.5
        if self.basis is not None:
            self.basis.append(self._current)

    def __len__(self) -> int:
        return len(self.alphas)

    @property
    def matrix(self) -> Tridiagonal:
        """T after the steps so far."""
        return Tridiagonal(np.array(self.alphas), np.array(self.betas))

    def step(self) -> None:
        """Compute one product and one more row of T.

        Raises:
            MeasurementError: The product is not finite.
            ValueError: The run is exhausted.
        """
        if self.exhausted:
            raise ValueError("the run is exhausted")
        product = self.operator @ self._current
        size = dot(product, product) ** 0.5
        if self._previous is not None:
            product.sub_(self._previous, alpha=self.betas[-1])
        alpha = dot(product, self._current)  # after the subtraction: Paige's order, the most stable one
        product.sub_(self._current, alpha=alpha)
        if self.basis is not None:
            self.basis.orthogonalize_(product)
        beta = dot(product, product) ** 0.5
        self.alphas.append(alpha)
        noise = _NOISE * torch.finfo(self.operator.dtype).eps * max(size, *map(abs, self.alphas))
        if beta > noise:
            self.betas.append(beta)
            self._previous, self._current = self._current, product / beta
        else:
            self.betas.append(0.0)
            self._restart()
        if self.basis is not None and not self.exhausted:
            self.basis.append(self._current)

    def _restart(self) -> None:
        """Restart with a random vector orthogonal to the basis, or mark the run as exhausted."""
        self._previous = None
        if self.basis is None or len(self.basis) == self.operator.size:
            self.exhausted = True
            return
        generator = rng.generator(self.seed, len(self.alphas), "vector to go on with")
        fresh = torch.randn(self.operator.size, generator=generator, dtype=torch.float64)
        self._current = fresh.to(self.operator.device, self.operator.dtype)
        self.basis.orthogonalize_(self._current)
        self._current /= dot(self._current, self._current) ** 0.5

    def ritz(self, count: int, order: str = "largest") -> Ritz:
        """The top eigenvalues of T with residuals ``beta_k |s_k|`` (s_k: last entries of T's eigenvectors).

        Without re-orthogonalization, copies of eigenvalues and spurious values due to rounding are removed.

        Args:
            count: Maximum number of eigenvalues; there may be fewer.
            order: A name in ``EIGEN_ORDERS``.
        """
        matrix, unit = self.matrix, torch.finfo(self.operator.dtype).eps
        values, vectors = eigh_tridiagonal(matrix.alphas, matrix.betas[:-1])
        residuals = matrix.betas[-1] * np.abs(vectors[-1])
        keep = np.arange(len(values))
        if self.basis is None:
            keep = _without_ghosts(matrix, values, residuals, unit)
        keep = keep[np.argsort(EIGEN_ORDERS[order](values[keep]), kind="stable")][:count]
        floor = unit * max(map(abs, self.alphas))  # products are not more accurate than this
        return Ritz(values[keep], np.maximum(residuals[keep], floor), vectors[:, keep])

    def vectors(self, found: Ritz) -> Tensor:
        """The unit vectors ``(m, P)`` of Ritz values; requires a stored basis."""
        weights = torch.zeros(len(self.basis), found.weights.shape[1], dtype=torch.float64)
        weights[: len(found.weights)] = torch.from_numpy(found.weights)  # T does not include the newest vector yet
        vectors = self.basis.combine(weights)
        return vectors.div_(torch.linalg.vector_norm(vectors, dim=1, keepdim=True))  # in-place: they are large

    def state(self) -> dict[str, Any]:
        """The state to resume from, except the vectors of the basis."""
        return {
            "alphas": list(self.alphas),
            "betas": list(self.betas),
            "exhausted": self.exhausted,
            "current": self._current.cpu(),
            "previous": None if self._previous is None else self._previous.cpu(),
        }

    def load(self, state: dict[str, Any], rows: Tensor | None) -> None:
        """Restore a state; ``rows`` are the stored vectors of its basis."""
        self.alphas, self.betas = ([float(value) for value in state[name]] for name in ("alphas", "betas"))
        self.exhausted = bool(state["exhausted"])
        device = self.operator.device
        for name in ("current", "previous"):
            if state[name] is not None or name == "current":
                check_tensor(name, self._current, state[name])
        self._current = state["current"].to(device)
        self._previous = None if state["previous"] is None else state["previous"].to(device)
        if self.basis is not None:
            if rows.shape[1:] != (self.basis.size,):
                raise ValueError("the stored vectors have a different length")
            self.basis = Basis(self.basis.size, self.basis.dtype, device, self.basis.storage)
            self.basis.append_stored(rows)


def rademacher(size: int, seed: int, number: int, purpose: str) -> Tensor:
    """A vector ``(size,)`` of random signs, float32 on the CPU, fully determined by the arguments."""
    generator = rng.generator(seed, number, purpose)
    return torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8).float().mul_(2).sub_(1)


LEAST_PROBES = 10
"""Minimum number of probes before stopping; a standard error from fewer is unreliable."""


@dataclass
class TraceEstimate:
    """Hutchinson's estimate: the mean of ``v^T H v`` over random sign vectors v is the trace.

    Its variance is twice the sum of the squared off-diagonal entries, dominated by the few largest eigenvalues. If
    approximate eigenvectors (Ritz vectors) V are known, ``V^T v`` gives their contribution to each probe without
    another product. The remainder ``u^T H u`` with ``u = v - V V^T v``, plus the sum of the Ritz values, has the same
    mean and far less variance (the idea of Hutch++, Meyer et al. 2021, applied to vectors already available).

    Attributes:
        samples: ``v^T H v`` for each probe.
        deflated: The same with the known part computed exactly; empty if no vectors are known.
    """

    samples: list[float] = field(default_factory=list)
    deflated: list[float] = field(default_factory=list)

    @property
    def best(self) -> list[float]:
        """The samples with the lower variance."""
        return self.deflated or self.samples

    @property
    def mean_and_error(self) -> tuple[float, float]:
        """The estimate and its standard error; NaN if there are too few samples."""
        return mean_and_error(self.best)

    def is_done(self, probes: int, tolerance: float) -> bool:
        """Whether there are ``probes`` samples, or the standard error is within ``tolerance`` of the mean."""
        if len(self.samples) >= probes:
            return True
        if len(self.samples) < LEAST_PROBES:
            return False
        mean, error = self.mean_and_error
        return error <= tolerance * abs(mean)


def mean_and_error(samples: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; NaN if there are too few samples."""
    count = len(samples)
    mean = float(np.mean(samples)) if count else float("nan")
    return mean, float(np.std(samples, ddof=1) / count**0.5) if count > 1 else float("nan")


def add_probe(
    estimate: TraceEstimate, operator: CurvatureOperator, seed: int, known: tuple[np.ndarray, Tensor] | None = None
) -> None:
    """Add the sample of the next probe, at the cost of one product.

    Args:
        estimate: Modified in place.
        operator: The matrix.
        seed: Seed of all probes; each probe has its own generator.
        known: Ritz values ``(m,)`` and their orthonormal vectors ``(m, P)``, converged or not.

    Raises:
        MeasurementError: The product is not finite.
    """
    probe = rademacher(operator.size, seed, len(estimate.samples), "trace").to(operator.device, operator.dtype)
    product = operator @ probe
    sample = dot(probe, product)
    estimate.samples.append(sample)
    if known is None:
        return
    values, vectors = known
    c, d = ((vectors @ x).double().cpu().numpy() for x in (probe, product))  # V^T v and V^T H v
    # u^T H u = v^T H v - 2 c^T (V^T H v) + c^T (V^T H V) c, and V^T H V is the diagonal of Ritz values
    estimate.deflated.append(float(sample - 2 * c @ d + c * c @ values + values.sum()))
