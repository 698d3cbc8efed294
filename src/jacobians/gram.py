"""Gram matrices of Jacobians, ``J J^T``: inner products of all examples' gradients, without forming the Jacobian.

This is the empirical neural tangent kernel (Jacot et al. 2018). Each layer adds its own inner products, computed from
its inputs and output gradients, which are then freed. What does not fit in memory is recomputed: layers are processed
in bands, with one pass over the examples per band, and a layer too large for that in blocks of examples. A plan
chooses for each layer whether to keep rows of the Jacobian or their two factors, and which layers share a band.

Notation: n examples, q quantities (the loss or one logit: one; all logits: one per class), o outputs and k inputs of
a layer, t positions (pixels, tokens), p entries of a parameter. A weight's gradient is ``G = sum_t g_t a_t^T``.

If an estimate is sufficient, `sketch_jacobian` computes a random sketch of each example's gradient: every entry of a
parameter's gradient gets a random sign, and entries whose positions differ by a multiple of D are added. This is a
count sketch (Charikar et al. 2002) with cyclic instead of random buckets. Signs are independent, so inner products
are unbiased; their variance is about ``(|x|^2 |y|^2 + (x . y)^2) / D``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from src import rng
from src.jacobians.capture import Record
from src.jacobians.engine import PerExampleEngine, Quantities
from src.jacobians.layer_rules import Outer, outer_gradients

BLOCK_BYTES = 48 * 2**20
"""Approximate temporary memory of a product of two parts, in addition to the parts."""


class Rows:
    """Stores one parameter's rows of the Jacobian for a block of examples, (n, q, p).

    Args:
        examples: n.
    """

    def __init__(self, examples: int) -> None:
        self._examples = examples
        self._rows: Tensor | None = None

    def put(self, start: int, rows: Tensor) -> None:
        """Store rows (b, q, p) of the examples from ``start`` on."""
        if self._rows is None:
            self._rows = rows.new_zeros(self._examples, *rows.shape[1:])
        self._rows[start : start + len(rows)] = rows

    def products(self, other: "Rows", into: Tensor, symmetric: bool) -> None:
        """Add all inner products with another block's examples: one matrix product for each block of rows.

        Args:
            other: The same parameter, for other examples (or the same ones).
            into: (n q, n' q), modified in place.
            symmetric: Whether ``other`` is ``self``; if so, only the blocks on and above the diagonal are computed.
        """
        left, right = self._rows.flatten(0, 1), other._rows.flatten(0, 1)
        step = block_of(len(left), left.element_size() * len(right), symmetric)
        for start in range(0, len(left), step):
            rows = slice(start, start + step)
            rest = slice(start if symmetric else 0, None)
            into[rows, rest].addmm_(left[rows], right[rest].mT)


class Factors:
    """Stores a layer's inputs ``a`` and output gradients ``g`` instead of rows; G is never formed.

    For one position: ``(a . a') (g . g')``, or with the bias ``(a . a' + 1) (g . g')``. For several positions:
    ``sum_{t,t'} (a_t . a'_t') (g_t . g'_t')``: first the inner products of the inputs, then times g, then times g'.

    Args:
        examples: n.
        module: The layer.
        outer: How its inputs become (n, 1, k, t).
        bias: Whether to include the layer's bias (only for one position).
    """

    def __init__(self, examples: int, module: nn.Module, outer: Outer, bias: bool) -> None:
        self._examples = examples
        self._bias = bias
        self._module = module
        self._outer = outer
        self._a: Tensor | None = None
        self._g: Tensor | None = None

    def put(self, start: int, a: Tensor, g: Tensor) -> None:
        """Store raw inputs (b, ...) and gradients (q, b, 1, o, t) of the examples from ``start`` on."""
        g = g[:, :, 0].transpose(0, 1)  # (b, q, o, t)
        if self._a is None:
            self._a = a.new_zeros(self._examples, *a.shape[1:])
            self._g = g.new_zeros(self._examples, *g.shape[1:])
        self._a[start : start + len(a)] = a
        self._g[start : start + len(g)] = g

    def _inputs(self, part: slice) -> Tensor:
        return self._outer.inputs(self._module, self._a[part])[:, 0]  # (b, k, t)

    def products(self, other: "Factors", into: Tensor, symmetric: bool) -> None:
        """See `Rows.products`."""
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
    """How many of ``count`` items fit in a block; at most a quarter if symmetric, so that blocks can be skipped."""
    most = -(-count // 4) if symmetric else count
    return max(1, min(BLOCK_BYTES // max(bytes_each, 1), most))


def flat_rows(gradients: Tensor) -> Tensor:
    """Reshape (q, b, *shape) to (b, q, p)."""
    return gradients.reshape(*gradients.shape[:2], -1).transpose(0, 1)


def weight_rows(a: Tensor, g: Tensor) -> Tensor:
    """G for each example and quantity, (b, q, p), from (b, n, k, t) and (q, b, n, o, t)."""
    return outer_gradients(a, g).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Shape:
    """The sizes of one parameter or layer, and the costs of storing it as rows or as factors.

    Attributes:
        key: The parameter's name in the model (for a layer, its weight's name).
        numbers: p, including a bias that is kept with the weight.
        factors: (o, k, t, entries of the raw inputs) if the weight's gradient is a sum of outer products, else None.
    """

    key: str
    numbers: int
    factors: tuple[int, int, int, int] | None = None

    def kept(self, q: int, as_factors: bool) -> int:
        """Entries stored per example, as factors or as rows."""
        if as_factors:
            o, _, t, raw = self.factors
            return q * o * t + raw
        return q * self.numbers

    def making(self, q: int, n: int) -> float:
        """Multiplications of the backward pass to this layer, plus as many to form G from it."""
        return n * q * (self.factors[2] if self.factors else 1) * self.numbers

    def row_cost(self, q: int, n: int) -> float:
        """Multiplications for all pairs, with rows."""
        return n * n / 2 * q * q * self.numbers

    def factor_cost(self, q: int, n: int) -> float:
        """Multiplications for all pairs, with factors; small products run at about half the speed of large ones."""
        o, k, t, _ = self.factors
        if t == 1:
            return n * n / 2 * (k + q * q * (o + 1))
        return n * n * (k * t * t + q * o * t * t + q * q * o * t)


def prefers_factors(shape: Shape, q: int, n: int, price: float) -> bool:
    """Whether to store a layer as factors.

    Args:
        shape: The layer.
        q: Number of quantities.
        n: Number of examples.
        price: Cost in multiplications of each stored entry, because a full memory requires another pass.
    """
    if shape.factors is None:
        return False
    rows = shape.making(q, n) + shape.row_cost(q, n) + price * n * shape.kept(q, False)
    return shape.factor_cost(q, n) + price * n * shape.kept(q, True) < rows


@dataclass(frozen=True)
class Band:
    """Parameters whose parts are in memory at the same time.

    Attributes:
        names: The parameters' names.
        blocks: Number of blocks into which the examples are split.
    """

    names: frozenset[str]
    blocks: int = 1


@dataclass(frozen=True)
class Plan:
    """How to compute a Gram matrix.

    Attributes:
        shapes: The shapes of all parameters.
        factors: Keys of the layers stored as factors.
        examples: n.
        limit: Maximum number of entries stored at once.
        quantities: q.
        dtype: Dtype of the parameters.
        trial: The engine that has tested the independence of examples.
    """

    shapes: dict[str, Shape]
    factors: frozenset[str]
    examples: int
    limit: float
    quantities: int
    dtype: torch.dtype
    trial: PerExampleEngine = field(repr=False, compare=False)

    def numbers(self, shape: Shape) -> int:
        """Entries stored per example for a parameter."""
        return shape.kept(self.quantities, shape.key in self.factors)

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        """Group consecutive parameters that fit together; split one that does not fit alone into example blocks."""
        bands: list[Band] = []
        names: list[str] = []
        taken = 0.0
        for key, shape in self.shapes.items():
            each = self.numbers(shape)
            size = self.examples * each
            if size > self.limit:
                # two blocks are in memory at once
                block = max(1, int(self.limit / 2 // each))
                bands.append(Band(frozenset([key]), -(-self.examples // block)))
                continue
            if names and taken + size > self.limit:
                bands.append(Band(frozenset(names)))
                names, taken = [], 0.0
            names.append(key)
            taken += size
        if names:
            bands.append(Band(frozenset(names)))
        return tuple(bands)


class _Shapes(PerExampleEngine):
    """Records the shapes of all parameters, from a few examples."""

    def begin(self, rows: Tensor) -> None:
        """See `PerExampleEngine`."""
        self.quantities = rows.shape[0]
        self.shapes: dict[str, Shape] = {}

    def take_captured(self, record: Record, names: dict[str, str], part: slice) -> None:
        """See `PerExampleEngine`."""
        for name in names.values():
            self.shapes[name] = Shape(name, self._parameters[name].numel())
        if record.rule.outer is None or "weight" not in names:
            return
        groups, o, t = record.rule.outer.outputs(record.module, record.gradient).shape[2:]
        if groups == 1:
            weight = names["weight"]
            numbers = self.shapes[weight].numbers
            self.shapes[weight] = Shape(weight, numbers, (o, numbers // o, t, record.inputs[0].numel()))

    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """See `PerExampleEngine`."""
        self.shapes[name] = Shape(name, self._parameters[name].numel())


def make_plan(model: nn.Module, images: Tensor, quantities: Quantities, targets: Tensor, memory_mb: float) -> Plan:
    """Choose how to store each layer and which layers to process together.

    Args:
        model: The model.
        images: (n, ...) inputs; only the first ones are used.
        quantities: See `gram_matrix`.
        targets: See `gram_matrix`.
        memory_mb: See `gram_matrix`.

    Raises:
        ValueError: See `gram_matrix`.
    """
    with _Shapes(model) as noting:
        noting.run(images[:2], targets[:2], quantities)
    shapes, q = {name: s for name, s in noting.shapes.items() if name not in noting.unused}, noting.quantities
    dtype = next(p.dtype for p in model.parameters() if p.requires_grad)  # images may be integers
    n, limit = len(images), memory_mb * 2**20 / dtype.itemsize
    # each time memory is full, another pass over the model is needed, which recomputes all gradients
    one_pass = sum(s.making(q, n) for s in shapes.values())
    factors = frozenset(key for key, s in shapes.items() if prefers_factors(s, q, n, one_pass / limit))
    return Plan(shapes, factors, n, limit, q, dtype, noting)


def work(plan: Plan, band: Band, n: int) -> tuple[float, float]:
    """Multiplications of a band: to compute its parts, and to multiply them."""
    q, shapes = plan.quantities, [plan.shapes[name] for name in band.names]
    passes = (band.blocks + 1) / 2
    pairs = sum(s.factor_cost(q, n) if s.key in plan.factors else s.row_cost(q, n) for s in shapes)
    return passes * sum(s.making(q, n) for s in shapes), pairs


STEP_MB = 128.0
"""MiB of gradients that exist at once, in addition to the stored parts."""

MIRRORED = 512
"""Rows mirrored at once."""


class _OtherRouteError(Exception):
    """A layer (given by its weight's name) planned as factors has produced full gradients instead."""


@contextmanager
def only_trainable(model: nn.Module, names: frozenset[str]) -> Iterator[None]:
    """Let only the named parameters require gradients; layers below the lowest of them then need no graph."""
    others = [p for name, p in model.named_parameters() if name not in names and p.requires_grad]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


class _Collector(PerExampleEngine):
    """Stores the parts of the trainable parameters for a block of examples."""

    def collect(
        self, plan: Plan, images: Tensor, targets: Tensor, quantities: Quantities
    ) -> dict[str, Rows | Factors]:
        """Compute the parts of all trainable parameters for ``images``."""
        self._plan = plan
        self._examples = len(images)
        self._parts: dict[str, Rows | Factors] = {}
        for part in self.sub_batches(images):
            self._start = part.start
            self.run(images[part], targets[part], quantities)
        return self._parts

    def take_outer(self, record: Record, names: dict[str, str], g: Tensor, part: slice) -> None:
        """See `PerExampleEngine`."""
        outer, module, a = record.rule.outer, record.module, record.inputs[part]
        start = self._start + part.start
        for local, name in names.items():
            if local == "bias":
                if not (g.shape[-1] == 1 and names.get("weight") in self._plan.factors):
                    self._rows(name).put(start, flat_rows(g.sum(-1)))
            elif name in self._plan.factors:
                if name not in self._parts:
                    bias = g.shape[-1] == 1 and "bias" in names
                    self._parts[name] = Factors(self._examples, module, outer, bias)
                self._parts[name].put(start, a, g)
            else:
                self._rows(name).put(start, weight_rows(outer.inputs(module, a), g))

    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """See `PerExampleEngine`."""
        if name in self._plan.factors:
            raise _OtherRouteError(name)
        self._rows(name).put(self._start + part.start, flat_rows(gradients))

    def _rows(self, name: str) -> Rows:
        return self._parts.setdefault(name, Rows(self._examples))


def gram_matrix(
    model: nn.Module,
    images: Tensor,
    quantities: Quantities,
    targets: Tensor | None = None,
    *,
    memory_mb: float = 2048.0,
) -> Tensor:
    """``J J^T`` for the Jacobian J of q quantities of n examples with respect to all trainable parameters.

    Row ``i q + c`` belongs to quantity c of example i. The model is evaluated in eval mode and restored.

    Args:
        model: The model.
        images: (n, ...) inputs.
        quantities: (outputs, targets) of a batch -> (b,) or (q, b); column i depends only on example i.
        targets: (n, ...) second argument of ``quantities``.
        memory_mb: Memory limit of the stored parts, in MiB.

    Returns:
        (n q, n q) in the parameters' dtype, symmetric.

    Raises:
        ValueError: There are no examples, no parameter requires a gradient or none is used, a BatchNorm layer would
            use batch statistics, or the model mixes the examples of a batch.
    """
    if not len(images):
        raise ValueError("cannot compute a Gram matrix of no examples")
    model = getattr(model, "_orig_mod", model)  # torch.compile renames the parameters
    targets = torch.zeros(len(images), device=images.device) if targets is None else targets
    plan = make_plan(model, images, quantities, targets, memory_mb)
    while True:
        try:
            return _follow(plan, model, images, targets, quantities)
        except _OtherRouteError as error:  # some call of this layer has no factors: store its rows
            plan = replace(plan, factors=plan.factors - {error.args[0]})


def _follow(plan: Plan, model: nn.Module, images: Tensor, targets: Tensor, quantities: Quantities) -> Tensor:
    """Sum the contributions of all bands: the blocks on and above the diagonal, mirrored at the end."""
    n, q = len(images), plan.quantities
    found = torch.zeros(n * q, n * q, dtype=plan.dtype, device=images.device)
    for band in plan.bands:
        edges = [n * block // band.blocks for block in range(band.blocks + 1)]
        blocks = [slice(*pair) for pair in pairwise(edges)]
        with only_trainable(model, band.names), _Collector(model, STEP_MB) as collector:
            collector.trust(plan.trial)
            for i, block in enumerate(blocks):
                mine = collector.collect(plan, images[block], targets[block], quantities)
                for other in blocks[i:]:
                    theirs = mine
                    if other is not block:
                        theirs = collector.collect(plan, images[other], targets[other], quantities)
                    rows, columns = (slice(part.start * q, part.stop * q) for part in (block, other))
                    for key in list(theirs):
                        with torch.no_grad():
                            mine[key].products(theirs[key], found[rows, columns], theirs is mine)
                        if band.blocks == 1:
                            del mine[key]
    for start in range(0, len(found), MIRRORED):
        stop = start + MIRRORED
        found[start:stop, start:stop].triu_().add_(found[start:stop, start:stop].triu(1).mT)
        found[stop:, start:stop] = found[start:stop, stop:].mT
    return found


class _Sketcher(PerExampleEngine):
    """Sums the sketches of all parameters' gradients, for one or a few examples at a time."""

    def prepare(self, dimension: int, seed: int) -> None:
        """Draw the signs and shifts of all parameters."""
        self._dimension = dimension
        self._signs: dict[str, tuple[Tensor, int]] = {}
        for name, p in self._parameters.items():
            generator = rng.generator(seed, 0, f"sketch of {name}")
            signs = torch.randint(0, 2, (p.numel(),), generator=generator, dtype=torch.int8)
            shift = int(torch.randint(dimension, (1,), generator=generator))
            self._signs[name] = (2 * signs - 1).to(p.device, p.dtype), shift

    def begin(self, rows: Tensor) -> None:
        """See `PerExampleEngine`."""
        self.found = rows.new_zeros(rows.shape[1], rows.shape[0], self._dimension)

    def take_outer(self, record: Record, names: dict[str, str], g: Tensor, part: slice) -> None:
        """See `PerExampleEngine`."""
        if "weight" in names:
            a = record.rule.outer.inputs(record.module, record.inputs[part])
            self._add(names["weight"], weight_rows(a, g), part)
        if "bias" in names:
            self._add(names["bias"], flat_rows(g.sum(-1)), part)

    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """See `PerExampleEngine`."""
        self._add(name, flat_rows(gradients), part)

    def _add(self, name: str, rows: Tensor, part: slice) -> None:
        signs, shift = self._signs[name]
        signed, dimension = rows * signs, self._dimension
        complete = signed.shape[-1] // dimension * dimension
        folded = signed[..., :complete].unflatten(-1, (-1, dimension)).sum(-2) if complete else 0
        total = signed.new_zeros(*signed.shape[:2], dimension) + folded
        total[..., : signed.shape[-1] - complete] += signed[..., complete:]
        self.found[part] += total.roll(shift, -1)


def sketch_jacobian(
    model: nn.Module,
    images: Tensor,
    quantities: Quantities,
    targets: Tensor,
    dimension: int,
    seed: int = 0,
    *,
    memory_mb: float = 256.0,
) -> Tensor:
    """Sketch each example's Jacobian with ``dimension`` entries per quantity; ``S S^T`` estimates ``J J^T``.

    The same seed gives the same sketch for any weights, so kernels of two epochs can be compared.

    Args:
        model: The model, evaluated in eval mode and restored.
        images: (n, ...) inputs.
        quantities: (outputs, targets) of a batch -> (b,) or (q, b); column i depends only on example i.
        targets: (n, ...) second argument of ``quantities``.
        dimension: D, entries per example and quantity.
        seed: Seed of the signs.
        memory_mb: Memory limit of gradients that exist at once, in MiB.

    Returns:
        (n q, D).

    Raises:
        ValueError: D is below 1, or for the reasons listed at `gram_matrix`.
    """
    if dimension < 1:
        raise ValueError(f"dimension is {dimension}; a sketch needs at least 1")
    parts = []
    with _Sketcher(getattr(model, "_orig_mod", model), memory_mb) as sketcher:
        sketcher.prepare(dimension, seed)
        for part in sketcher.sub_batches(images):
            sketcher.run(images[part], targets[part], quantities)
            parts.append(sketcher.found)
    return torch.cat(parts).flatten(0, 1)
