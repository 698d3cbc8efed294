"""The Lanczos process: an orthonormal basis in which a large symmetric matrix is tridiagonal, one product a step.

With a stored basis (as computed, in half precision, or in main memory beside a GPU) every new vector is
orthogonalized against all of them, so that each eigenvalue is found once. Without one, only two vectors are kept;
rounding then makes copies of converged eigenvalues appear, which `Lanczos.ritz` recognizes and which do not change a
quadrature of the spectrum. The trace is estimated with the same random vectors (Hutchinson), with the eigenvectors
found taken out exactly.
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

_ROWS = 16  # vectors in a block
_COLUMNS, _COLUMNS_GPU = 2**16, 2**20  # numbers of each read at a time; those of a block fit a processor's caches
_TAKEN, _TAKEN_HALF = 0.5, 1e-6  # of a vector's squared length: subtracting more is done twice


class Basis:
    """Orthonormal vectors of length P, stored in blocks of rows.

    Rounding to half precision hardly matters to orthogonality: coefficients of a vector that is nearly orthogonal
    already are tiny, and so is what the rounded vectors add to it; eigenvalues stay right to about 1e-5. Numbers are
    stored times the root of P, near 1, where float16 is finest.

    Args:
        size: P.
        dtype: The type of the vectors.
        device: Where they come from.
        storage: A name of ``config.STORAGES`` but ``"none"``.
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
        """The vectors from number ``start`` on, as they are stored, on the CPU, ``(r, P)``."""
        rows = [self._blocks[i // _ROWS][i % _ROWS].cpu() for i in range(start, self._count)]
        return torch.stack(rows) if rows else torch.empty(0, self.size, dtype=self.dtype)

    def coefficients(self, vector: Tensor) -> Tensor:
        """Inner products with a vector ``(P,)``, float64 ``(k,)`` on its device."""
        found = torch.zeros(self._count, dtype=torch.float64, device=self.device)
        for rows, columns, piece in self._pieces():
            found[rows] += torch.mv(piece, vector[columns])
        return found / self._scale

    def orthogonalize_(self, vector: Tensor) -> None:
        """Subtract the vector's components in the basis, by classical Gram-Schmidt: two products with the basis.

        Where they are large beside what is left, it happens again, as they are only right up to rounding ("twice is
        enough", Kahan and Parlett; when it is needed: Daniel, Gragg, Kaufman and Stewart, 1976). A Lanczos step has
        subtracted the large ones before, so there the second time is rare.
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
        """Sums of the vectors, weighted by the columns of ``(k, m)``: ``(m, P)``."""
        total = torch.zeros(weights.shape[1], self.size, dtype=self.dtype, device=self.device)
        weights = (weights.to(self.device) / self._scale).to(self.dtype)
        for rows, columns, piece in self._pieces():
            total[:, columns] += weights[rows].T @ piece
        return total

    def _pieces(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns, and what they contain, in the type and on the device of computing."""
        width = _COLUMNS if self.device.type == "cpu" else _COLUMNS_GPU
        for start in range(0, self.size, width):
            columns = slice(start, min(start + width, self.size))
            for number, block in enumerate(self._blocks):
                rows = slice(_ROWS * number, min(_ROWS * (number + 1), self._count))
                yield rows, columns, block[: rows.stop - rows.start, columns].to(self.device, self.dtype)


def basis_bytes(vectors: int, size: int, dtype: torch.dtype, storage: str) -> int:
    """What so many vectors of length ``size`` take."""
    if storage == "none":
        return 0
    return -(-vectors // _ROWS) * _ROWS * size * (2 if storage == "half" else dtype.itemsize)


class Tridiagonal(NamedTuple):
    """T after k steps: its diagonal ``alphas`` (k,), and ``betas`` (k,) beside it, whose last one leads out of T."""

    alphas: np.ndarray
    betas: np.ndarray


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenvalues, in the order that was asked for.

    Attributes:
        values: ``(m,)``.
        residuals: Norms ``|H x - value x|`` of their unit vectors x, ``(m,)``.
        weights: Columns ``(k, m)``: how each x is combined from the Lanczos vectors.
    """

    values: np.ndarray
    residuals: np.ndarray
    weights: np.ndarray

    def relative_residuals(self) -> np.ndarray:
        """Residuals over the absolute eigenvalues; infinite where only the eigenvalue is zero."""
        size = np.abs(self.values)
        return np.divide(self.residuals, size, out=np.where(self.residuals > 0, np.inf, 0.0), where=size > 0)

    def converged(self, tolerance: float) -> bool:
        """Whether every relative residual is within ``tolerance``."""
        return bool((self.relative_residuals() <= tolerance).all())


def _without_ghosts(matrix: Tridiagonal, values: np.ndarray, residuals: np.ndarray, unit: float) -> np.ndarray:
    """Positions of the genuine ones among the ascending eigenvalues of T; of copies the most accurate.

    Cullum and Willoughby's test ("Lanczos algorithms for large symmetric eigenvalue computations", 1985): a single
    eigenvalue of T that T without its first row and column has too is spurious; of several that agree one is kept.

    Args:
        matrix: T.
        values: Its eigenvalues (k,).
        residuals: Theirs.
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
    """Gauss quadrature of the spectrum as the start vector sees it (Golub and Meurant; Ubaru, Chen and Saad 2017).

    ``sum_j weights_j f(nodes_j)`` equals ``v^T f(H) v`` for every polynomial f of a degree below 2k, v being the
    unit start vector; its mean over random v is ``trace f(H) / P``.

    Args:
        matrix: T.

    Returns:
        Nodes (k,) ascending and weights (k,), non-negative and of sum 1.
    """
    nodes, vectors = eigh_tridiagonal(matrix.alphas, matrix.betas[:-1])
    weights = vectors[0] ** 2
    return nodes, weights / weights.sum()


_NOISE = 100  # rounding units, relative to the matrix: a remainder below it is noise, the space is exhausted


class Lanczos:
    """One run of the process.

    Args:
        operator: The matrix.
        start: The first vector ``(P,)``, of any length.
        storage: How the basis is stored, a name of ``config.STORAGES``.
        seed: Seed of the vectors with which an exhausted run goes on.

    Attributes:
        alphas: The diagonal of T, a number per step.
        betas: The numbers beside it; the last one leads out of T.
        exhausted: Whether the basis spans an invariant space and there is no other vector to go on with.
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
        """T after the steps done."""
        return Tridiagonal(np.array(self.alphas), np.array(self.betas))

    def step(self) -> None:
        """One product, one more row of T.

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
        alpha = dot(product, self._current)  # after that subtraction: Paige's order, the most stable one
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
        """Start again in what the basis does not span, or end."""
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
        """The first eigenvalues of T and their residuals ``beta_k |s_k|`` (s_k: last components of T's eigenvectors).

        Without re-orthogonalization, copies of eigenvalues and values that only rounding made are left out.

        Args:
            count: How many are wanted; there may be fewer.
            order: A name of ``EIGEN_ORDERS``.
        """
        matrix, unit = self.matrix, torch.finfo(self.operator.dtype).eps
        values, vectors = eigh_tridiagonal(matrix.alphas, matrix.betas[:-1])
        residuals = matrix.betas[-1] * np.abs(vectors[-1])
        keep = np.arange(len(values))
        if self.basis is None:
            keep = _without_ghosts(matrix, values, residuals, unit)
        keep = keep[np.argsort(EIGEN_ORDERS[order](values[keep]), kind="stable")][:count]
        floor = unit * max(map(abs, self.alphas))  # products are no more accurate than this
        return Ritz(values[keep], np.maximum(residuals[keep], floor), vectors[:, keep])

    def vectors(self, found: Ritz) -> Tensor:
        """The unit vectors ``(m, P)`` of Ritz values; only where the basis is stored."""
        weights = torch.zeros(len(self.basis), found.weights.shape[1], dtype=torch.float64)
        weights[: len(found.weights)] = torch.from_numpy(found.weights)  # the newest vector is not in T yet
        vectors = self.basis.combine(weights)
        return vectors.div_(torch.linalg.vector_norm(vectors, dim=1, keepdim=True))  # in place: they are large

    def state(self) -> dict[str, Any]:
        """What a run is continued from, beside the vectors of its basis."""
        return {
            "alphas": list(self.alphas),
            "betas": list(self.betas),
            "exhausted": self.exhausted,
            "current": self._current.cpu(),
            "previous": None if self._previous is None else self._previous.cpu(),
        }

    def load(self, state: dict[str, Any], rows: Tensor | None) -> None:
        """Continue from a state; ``rows`` are the stored vectors of its basis."""
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
                raise ValueError("its vectors have another length")
            self.basis = Basis(self.basis.size, self.basis.dtype, device, self.basis.storage)
            self.basis.append_stored(rows)


def rademacher(size: int, seed: int, number: int, purpose: str) -> Tensor:
    """A vector ``(size,)`` of random signs on the CPU, float32, that depends on the arguments alone."""
    generator = rng.generator(seed, number, purpose)
    return torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8).float().mul_(2).sub_(1)


LEAST_PROBES = 10
"""A standard error of fewer is not worth stopping for."""


@dataclass
class TraceEstimate:
    """Hutchinson's estimate: ``v^T H v`` averages to the trace over vectors v of random signs.

    Its variance is twice the sum of the squared off-diagonal entries, which the few largest eigenvalues dominate.
    Where Ritz vectors V near their eigenvectors are known, ``V^T v`` gives what they add to each probe, without
    another product: the remainder ``u^T H u``, ``u = v - V V^T v``, plus the Ritz values' sum has the same mean and
    varies far less
    (the idea of Hutch++, Meyer et al. 2021, with vectors that are there already).

    Attributes:
        samples: ``v^T H v`` of each probe.
        deflated: The same with the known part taken exactly; empty where no vectors are known.
    """

    samples: list[float] = field(default_factory=list)
    deflated: list[float] = field(default_factory=list)

    @property
    def best(self) -> list[float]:
        """The samples that vary less."""
        return self.deflated or self.samples

    def is_done(self, probes: int, tolerance: float) -> bool:
        """Whether there are ``probes`` samples, or the standard error is within ``tolerance`` of the mean."""
        if len(self.samples) >= probes:
            return True
        if len(self.samples) < LEAST_PROBES:
            return False
        mean, error = mean_and_error(self.best)
        return error <= tolerance * abs(mean)


def mean_and_error(samples: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; NaN where there are too few samples."""
    count = len(samples)
    mean = float(np.mean(samples)) if count else float("nan")
    return mean, float(np.std(samples, ddof=1) / count**0.5) if count > 1 else float("nan")


def add_probe(
    estimate: TraceEstimate, operator: CurvatureOperator, seed: int, known: tuple[np.ndarray, Tensor] | None = None
) -> None:
    """Add the next probe's sample: one product.

    Args:
        estimate: Changed in place.
        operator: The matrix.
        seed: Seed of all probes; each has a generator of its own.
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
