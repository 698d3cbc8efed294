"""What a Gram matrix of Jacobians keeps of each parameter: rows of the Jacobian, or the two factors that make them.

Letters: n examples, q quantities (the loss or one logit: one; the logits: one per class), o outputs and k inputs of a
layer, t positions (pixels, tokens), p numbers of a parameter. A weight's gradient is ``G = sum_t g_t a_t^T``.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from src.jacobians.contract import Outer, outer_gradients

BLOCK_BYTES = 48 * 2**20
"""About how much a product of two parts takes beside the parts themselves."""


class Part(Protocol):
    """What is kept of one parameter, or of one layer's weight, for the examples of a block."""

    def put(self, start: int, a: Tensor, g: Tensor) -> None:
        """Keep what came for the examples from ``start`` on."""

    def products(self, other: "Part", into: Tensor, symmetric: bool) -> None:
        """Add all inner products with another block's examples.

        Args:
            other: The same parameter, other examples (or the same).
            into: (n q, n' q), what to add to.
            symmetric: Whether ``other`` is this part; then only the blocks on and above the diagonal are wanted.
        """


class Rows:
    """Rows of the Jacobian in full, (n, q, p).

    Args:
        examples: n.
    """

    def __init__(self, examples: int) -> None:
        self._examples = examples
        self._rows: Tensor | None = None

    def put(self, start: int, rows: Tensor, _: Tensor | None = None) -> None:
        """Keep rows (b, q, p)."""
        if self._rows is None:
            self._rows = rows.new_zeros(self._examples, *rows.shape[1:])
        self._rows[start : start + len(rows)] = rows

    def products(self, other: "Rows", into: Tensor, symmetric: bool) -> None:
        """See `Part`: one matrix product for each block of rows."""
        left, right = self._rows.flatten(0, 1), other._rows.flatten(0, 1)
        step = block_of(len(left), left.element_size() * len(right), symmetric)
        for start in range(0, len(left), step):
            rows = slice(start, start + step)
            rest = slice(start if symmetric else 0, None)
            into[rows, rest].addmm_(left[rows], right[rest].mT)


class Factors:
    """A layer's inputs ``a`` and the gradients ``g`` at its output; G is never formed.

    One position: ``(a . a') (g . g')``, and with the bias's share ``(a . a' + 1) (g . g')``. Several positions:
    ``sum_{t,t'} (a_t . a'_t') (g_t . g'_t')``: the inner products of the inputs first, then times g, then times g'.

    Args:
        examples: n.
        module: The layer.
        outer: How its inputs become (n, 1, k, t).
        bias: Whether the layer's bias is to be counted, too (one position only).
    """

    def __init__(self, examples: int, module: nn.Module, outer: Outer, bias: bool) -> None:
        self._examples = examples
        self._bias = bias
        self._module = module
        self._outer = outer
        self._a: Tensor | None = None
        self._g: Tensor | None = None

    def put(self, start: int, a: Tensor, g: Tensor) -> None:
        """Keep raw inputs (b, ...) and gradients (q, b, 1, o, t)."""
        g = g[:, :, 0].transpose(0, 1)  # (b, q, o, t)
        if self._a is None:
            self._a = a.new_zeros(self._examples, *a.shape[1:])
            self._g = g.new_zeros(self._examples, *g.shape[1:])
        self._a[start : start + len(a)] = a
        self._g[start : start + len(g)] = g

    def _inputs(self, part: slice) -> Tensor:
        return self._outer.inputs(self._module, self._a[part])[:, 0]  # (b, k, t)

    def products(self, other: "Factors", into: Tensor, symmetric: bool) -> None:
        """See `Part`."""
        if self._g.shape[-1] == 1:
            self._one_position(other, into, symmetric)
        else:
            self._pairs_of_positions(other, into, symmetric)

    def _one_position(self, other: "Factors", into: Tensor, symmetric: bool) -> None:
        inputs = self._inputs(slice(None))[..., 0] @ other._inputs(slice(None))[..., 0].mT  # (n, n')
        if self._bias:
            inputs += 1
        q = self._g.shape[1]
        left, right = self._g[..., 0], other._g[..., 0].flatten(0, 1)  # (n, q, o), (n' q, o)
        step = block_of(len(left), left.element_size() * q * len(right), symmetric)
        for start in range(0, len(left), step):
            first = start if symmetric else 0
            found = left[start : start + step].flatten(0, 1) @ right[first * q :].mT
            found = found.view(-1, q, len(inputs[0]) - first, q)
            part = into[start * q : (start + step) * q, first * q :].unflatten(1, (-1, q)).unflatten(0, (-1, q))
            part.addcmul_(found, inputs[start : start + step, None, first:, None])

    def _pairs_of_positions(self, other: "Factors", into: Tensor, symmetric: bool) -> None:
        q, o, t = self._g.shape[1:]
        per_pair = self._g.element_size() * (t * t + q * o * t) + self._g.element_size() * 2 * other._a[0].numel()
        step = block_of(len(other._g), per_pair)
        for begin in range(0, len(other._g), step):
            end = min(begin + step, len(other._g))
            theirs, right = other._inputs(slice(begin, end)), other._g[begin:end].flatten(2)  # (b, k, t), (b, q, o t)
            for i in range(end if symmetric else len(self._g)):
                first = max(i - begin, 0) if symmetric else 0
                mine = self._inputs(slice(i, i + 1))  # (1, k, t)
                inputs = mine.mT @ theirs[first:]  # (b, t, t')
                mixed = (self._g[i].flatten(0, 1) @ inputs).view(-1, q, o * t)  # (b, q, o t')
                found = mixed @ right[first:].mT  # (b, q, q')
                columns = slice((begin + first) * q, end * q)
                into[i * q : (i + 1) * q, columns] += found.transpose(0, 1).flatten(1)


def block_of(count: int, bytes_each: int, symmetric: bool = False) -> int:
    """How many of ``count`` things fit into a block; at most a quarter where half of all blocks can be left out."""
    most = -(-count // 4) if symmetric else count
    return max(1, min(BLOCK_BYTES // max(bytes_each, 1), most))


def as_rows(gradients: Tensor) -> Tensor:
    """(q, b, *shape) as (b, q, p)."""
    return gradients.reshape(*gradients.shape[:2], -1).transpose(0, 1)


def weight_rows(a: Tensor, g: Tensor) -> Tensor:
    """G of each example and quantity, (b, q, p), from (b, n, k, t) and (q, b, n, o, t)."""
    return outer_gradients(a, g).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Shape:
    """The sizes of one parameter or layer, and what either way of keeping it costs.

    Attributes:
        key: The parameter's name in the model (a layer's: its weight's).
        numbers: p, with those of a bias that is kept with the weight.
        factors: (o, k, t, numbers of the raw inputs) where the weight's gradient is such a sum, else None.
    """

    key: str
    numbers: int
    factors: tuple[int, int, int, int] | None = None

    def row_numbers(self, q: int) -> int:
        """Numbers that rows take per example."""
        return q * self.numbers

    def factor_numbers(self, q: int) -> int:
        """Numbers that factors take per example."""
        o, _, t, raw = self.factors
        return q * o * t + raw

    def making(self, q: int, n: int) -> float:
        """Multiplications of the way back to this layer, and as many again of forming G from it."""
        return n * q * (self.factors[2] if self.factors else 1) * self.numbers

    def row_cost(self, q: int, n: int) -> float:
        """Multiplications of all pairs of rows."""
        return n * n / 2 * q * q * self.numbers

    def factor_cost(self, q: int, n: int) -> float:
        """Multiplications with factors, all pairs; their small products run at about half the speed of large ones."""
        o, k, t, _ = self.factors
        if t == 1:
            return n * n / 2 * (k + q * q * (o + 1))
        return n * n * (k * t * t + q * o * t * t + q * q * o * t)


def prefers_factors(shape: Shape, q: int, n: int, price: float) -> bool:
    """Whether a layer is kept as factors.

    Args:
        shape: The layer.
        q: Quantities.
        n: Examples.
        price: Multiplications that each number kept costs, as it brings the next pass over the network nearer.
    """
    if shape.factors is None:
        return False
    rows = shape.making(q, n) + shape.row_cost(q, n) + price * n * shape.row_numbers(q)
    return shape.factor_cost(q, n) + price * n * shape.factor_numbers(q) < rows
