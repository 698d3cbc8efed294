"""How a Gram matrix of Jacobians is found: the form in which each layer is kept, and what is in memory together."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from src.jacobians.capture import Record
from src.jacobians.fallback import Quantities
from src.jacobians.gram_parts import Shape, prefers_factors
from src.jacobians.routing import Routing


@dataclass(frozen=True)
class Band:
    """Parameters whose parts are in memory together.

    Attributes:
        names: Of the parameters.
        blocks: In how many blocks the examples come.
    """

    names: frozenset[str]
    blocks: int = 1


@dataclass(frozen=True)
class Plan:
    """How a Gram matrix is found.

    Attributes:
        shapes: Of all parameters.
        factors: Keys of the layers that are kept as factors.
        bands: See `Band`.
        examples: n.
        limit: How many numbers may be kept at a time.
        quantities: q.
        dtype: Of the parameters.
        trial: What has tried whether the examples are independent.
    """

    shapes: dict[str, Shape]
    factors: frozenset[str]
    bands: tuple[Band, ...]
    examples: int
    limit: float
    quantities: int
    dtype: torch.dtype
    trial: Routing = field(repr=False, compare=False)

    def numbers(self, shape: Shape) -> int:
        """Numbers that are kept of a parameter per example."""
        return _numbers(shape, shape.key in self.factors, self.quantities)


class _Shapes(Routing):
    """Notes the sizes of all parameters, from one example."""

    def begin(self, rows: Tensor) -> None:
        """See `Routing`."""
        self.quantities = rows.shape[0]
        self.shapes: dict[str, Shape] = {}

    def take_captured(self, record: Record, names: dict[str, str], part: slice) -> None:
        """See `Routing`."""
        for name in names.values():
            self.shapes[name] = Shape(name, self._parameters[name].numel())
        if record.kind.outer is None or "weight" not in names:
            return
        groups, o, t = record.kind.outer.outputs(record.module, record.gradient).shape[2:]
        if groups == 1:
            weight = names["weight"]
            numbers = self.shapes[weight].numbers
            self.shapes[weight] = Shape(weight, numbers, (o, numbers // o, t, record.inputs[0].numel()))

    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """See `Routing`."""
        self.shapes[name] = Shape(name, self._parameters[name].numel())


def make_plan(model: nn.Module, images: Tensor, quantities: Quantities, targets: Tensor, memory_mb: float) -> Plan:
    """Which form each layer is kept in, and which layers are kept together.

    Args:
        model: The network.
        images: (n, ...) inputs; only the first ones are looked at.
        quantities: See `gram_matrix`.
        targets: See `gram_matrix`.
        memory_mb: See `gram_matrix`.

    Raises:
        ValueError: See `gram_matrix`.
    """
    with _Shapes(model) as noting:
        noting.run(images[:2], targets[:2], quantities)
    shapes, q = {name: s for name, s in noting.shapes.items() if name not in noting.unused}, noting.quantities
    dtype = next(p.dtype for p in model.parameters() if p.requires_grad)  # inputs may be whole numbers
    n, limit = len(images), memory_mb * 2**20 / dtype.itemsize
    # a pass over the network makes all gradients once, and is due each time that the memory is full
    one_pass = sum(s.making(q, n) for s in shapes.values())
    factors = frozenset(key for key, s in shapes.items() if prefers_factors(s, q, n, one_pass / limit))
    return Plan(shapes, factors, _bands(shapes, factors, n, limit, q), n, limit, q, dtype, noting)


def without_factors(plan: Plan, key: str) -> Plan:
    """The plan with one layer kept as rows: some of its examples cannot be taken apart."""
    factors = plan.factors - {key}
    bands = _bands(plan.shapes, factors, plan.examples, plan.limit, plan.quantities)
    return replace(plan, factors=factors, bands=bands)


def _numbers(shape: Shape, as_factors: bool, q: int) -> int:
    """Numbers that are kept of a parameter per example."""
    return shape.factor_numbers(q) if as_factors else shape.row_numbers(q)


def _bands(shapes: Mapping[str, Shape], factors: frozenset[str], n: int, limit: float, q: int) -> tuple[Band, ...]:
    """Neighbouring parameters as long as they fit together; what does not fit alone, in blocks of examples."""
    bands, names, taken = [], [], 0.0
    for key, shape in shapes.items():
        each = _numbers(shape, key in factors, q)
        size = n * each
        if size > limit:
            # two blocks are in memory at a time
            examples = max(1, int(limit / 2 // each))
            bands.append(Band(frozenset([key]), -(-n // examples)))
            continue
        if names and taken + size > limit:
            bands.append(Band(frozenset(names)))
            names, taken = [], 0.0
        names.append(key)
        taken += size
    if names:
        bands.append(Band(frozenset(names)))
    return tuple(bands)


def work(plan: Plan, band: Band, n: int) -> tuple[float, float]:
    """Multiplications of a band: to make its parts, and to multiply them."""
    q, shapes = plan.quantities, [plan.shapes[name] for name in band.names]
    passes = (band.blocks + 1) / 2
    pairs = sum(s.factor_cost(q, n) if s.key in plan.factors else s.row_cost(q, n) for s in shapes)
    return passes * sum(s.making(q, n) for s in shapes), pairs
