"""Storage of a Lanczos basis: as computed, in half precision, or in main memory beside a GPU."""

from collections.abc import Iterator

import torch
from torch import Tensor

_ROWS = 16  # vectors in a block
_COLUMNS = 2**20  # numbers of each that are read at a time


class Basis:
    """Orthonormal vectors of length P, stored in blocks of rows.

    Rounding to half precision hardly matters to orthogonality: coefficients of a vector that is nearly orthogonal
    already are tiny, and so is what the rounded vectors add to it; eigenvalues stay right to about 1e-5. Numbers are
    stored times the root of P, near 1, where float16 is finest.

    Args:
        size: P.
        dtype: The type of the vectors.
        device: Where they come from.
        storage: A name of ``choices.STORAGES`` but ``"none"``.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, storage: str = "full") -> None:
        self.size, self.dtype, self.device, self.storage = size, dtype, device, storage
        self._half = storage == "half"
        self._scale = size**0.5 if self._half else 1.0
        self._place = torch.device("cpu") if storage == "host" else device
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
                self._blocks.append(torch.empty(_ROWS, self.size, dtype=kind, device=self._place))
            self._blocks[-1][self._count % _ROWS] = row.to(self._place)
            self._count += 1

    def stored(self, start: int) -> Tensor:
        """The vectors from number ``start`` on, as they are stored, on the CPU, ``(r, P)``."""
        rows = [self._blocks[i // _ROWS][i % _ROWS].cpu() for i in range(start, self._count)]
        return torch.stack(rows) if rows else torch.empty(0, self.size, dtype=self.dtype)

    def coefficients(self, vector: Tensor) -> Tensor:
        """Inner products with a vector ``(P,)``, float64 ``(k,)`` on its device."""
        found = torch.zeros(self._count, dtype=torch.float64, device=self.device)
        for rows, columns, piece in self._pieces():
            found[rows] += (piece @ vector[columns]).double()
        return found / self._scale

    def orthogonalise_(self, vector: Tensor) -> None:
        """Subtract the vector's components in the basis, twice ("twice is enough", Kahan and Parlett)."""
        for _ in range(2):
            weights = (self.coefficients(vector) / self._scale).to(self.dtype)
            for rows, columns, piece in self._pieces():
                vector[columns] -= weights[rows] @ piece

    def combine(self, weights: Tensor) -> Tensor:
        """Sums of the vectors, weighted by the columns of ``(k, m)``: ``(m, P)``."""
        total = torch.zeros(weights.shape[1], self.size, dtype=self.dtype, device=self.device)
        weights = (weights.to(self.device) / self._scale).to(self.dtype)
        for rows, columns, piece in self._pieces():
            total[:, columns] += weights[rows].T @ piece
        return total

    def _pieces(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns, and what stands there, in the type and on the device of computing."""
        for number, block in enumerate(self._blocks):
            rows = slice(_ROWS * number, min(_ROWS * (number + 1), self._count))
            for start in range(0, self.size, _COLUMNS):
                columns = slice(start, min(start + _COLUMNS, self.size))
                piece = block[: rows.stop - rows.start, columns]
                yield rows, columns, piece.to(self.device, self.dtype)


def basis_bytes(vectors: int, size: int, dtype: torch.dtype, storage: str) -> int:
    """What so many vectors of length ``size`` take."""
    if storage == "none":
        return 0
    return -(-vectors // _ROWS) * _ROWS * size * (2 if storage == "half" else dtype.itemsize)
