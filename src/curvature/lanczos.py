"""The Lanczos process: an orthonormal basis in which a large symmetric matrix is tridiagonal, one product a step.

With a stored basis every new vector is orthogonalised against all of them, so that eigenvalues come once each.
Without one, two vectors are all that is kept; rounding then lets copies of converged eigenvalues appear, which
``tridiagonal.ritz`` tells apart, and which a quadrature of the spectrum does not mind.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from src import draws
from src.curvature.basis import Basis
from src.curvature.hessian import CurvatureOperator, dot
from src.curvature.tridiagonal import Ritz, Tridiagonal, ritz
from src.models.restoring import check_tensor

_NOISE = 100  # rounding units, relative to the matrix: a remainder below it is noise, the space is exhausted


class Lanczos:
    """One run of the process.

    Args:
        operator: The matrix.
        start: The first vector ``(P,)``, of any length.
        storage: How the basis is stored, a name of ``choices.STORAGES``.
        seed: Seed of the vectors with which an exhausted run goes on.

    Attributes:
        alphas: The diagonal of T, a number per step.
        betas: What stands beside it; the last one leads out of T.
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
            self.basis.orthogonalise_(product)
        beta = dot(product, product) ** 0.5
        self.alphas.append(alpha)
        noise = _NOISE * torch.finfo(self.operator.dtype).eps * max(size, *map(abs, self.alphas))
        if beta > noise:
            self.betas.append(beta)
            self._previous, self._current = self._current, product / beta
        else:
            self.betas.append(0.0)
            self._go_on()
        if self.basis is not None and not self.exhausted:
            self.basis.append(self._current)

    def _go_on(self) -> None:
        """Start anew in what the basis does not span, or end."""
        self._previous = None
        if self.basis is None or len(self.basis) == self.operator.size:
            self.exhausted = True
            return
        generator = draws.generator(self.seed, len(self.alphas), "vector to go on with")
        fresh = torch.randn(self.operator.size, generator=generator, dtype=torch.float64)
        self._current = fresh.to(self.operator.device, self.operator.dtype)
        self.basis.orthogonalise_(self._current)
        self._current /= dot(self._current, self._current) ** 0.5

    def ritz(self, count: int, order: str = "largest") -> Ritz:
        """The first ``count`` approximate eigenvalues, in an order of ``choices.ORDERS``."""
        unit = torch.finfo(self.operator.dtype).eps
        found = ritz(self.matrix, count, order, ghosts_of=None if self.basis is not None else unit)
        floor = unit * max(map(abs, self.alphas))  # products are no more accurate than this
        return Ritz(found.values, np.maximum(found.residuals, floor), found.weights)

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
    generator = draws.generator(seed, number, purpose)
    return torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8).float().mul_(2).sub_(1)
