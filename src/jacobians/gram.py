"""Gram matrices of Jacobians, ``J J^T``: the inner products of all examples' gradients, without the Jacobian.

The empirical neural tangent kernel (Jacot et al. 2018). Each layer adds its own inner products, found from what flows
in and what comes back (`src.jacobians.gram_parts`), and is forgotten. What does not fit into the memory is made anew:
layers come in bands, one pass over the examples for each; a layer too large for that comes in blocks of examples.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from src.jacobians.capture import Record
from src.jacobians.fallback import Quantities
from src.jacobians.gram_parts import Factors, Part, Rows, as_rows, weight_rows
from src.jacobians.gram_plan import Band, Plan, make_plan, without_factors, work
from src.jacobians.routing import Routing

STEP_MB = 128.0
"""MiB of gradients that are alive at a time beside what is kept."""

MIRRORED = 512
"""Rows that are mirrored at a time."""

Tick = Callable[[float], None]
"""Called with the share of the work that was just done; the shares add up to 1."""


class _OtherRouteError(Exception):
    """A layer whose factors were to be kept came with its gradients in full: some example is of no use for them."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@contextmanager
def only_trainable(model: nn.Module, names: frozenset[str]) -> Iterator[None]:
    """Let only the named parameters require gradients for a while: layers below the lowest of them need no graph."""
    others = [p for name, p in model.named_parameters() if name not in names and p.requires_grad]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


class _Collector(Routing):
    """Keeps parts of the trainable parameters for a block of examples."""

    def collect(self, plan: Plan, images: Tensor, targets: Tensor, quantities: Quantities) -> dict[str, Part]:
        """The parts of all trainable parameters for ``images``."""
        self._plan = plan
        self._examples = len(images)
        self._parts: dict[str, Part] = {}
        for part in self.sub_batches(images):
            self._start = part.start
            self.run(images[part], targets[part], quantities)
        return self._parts

    def begin(self, rows: Tensor) -> None:
        """See `Routing`."""

    def take_captured(self, record: Record, names: dict[str, str], part: slice) -> None:
        """See `Routing`."""
        kind, module, a, g = record.kind, record.module, record.inputs[part], record.gradient[:, part]
        start = self._start + part.start
        if kind.outer is None:
            for local, gradients in kind.gradients(module, a, g, list(names)).items():
                self._rows(names[local]).put(start, as_rows(gradients))
            return
        g = kind.outer.outputs(module, g)
        for local, name in names.items():
            if local == "bias":
                if not (g.shape[-1] == 1 and names.get("weight") in self._plan.factors):
                    self._rows(name).put(start, as_rows(g.sum(-1)))
            elif name in self._plan.factors:
                if name not in self._parts:
                    bias = g.shape[-1] == 1 and "bias" in names
                    self._parts[name] = Factors(self._examples, module, kind.outer, bias)
                self._parts[name].put(start, a, g)
            else:
                self._rows(name).put(start, weight_rows(kind.outer.inputs(module, a), g))

    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """See `Routing`."""
        if name in self._plan.factors:
            raise _OtherRouteError(name)
        self._rows(name).put(self._start + part.start, as_rows(gradients))

    def _rows(self, name: str) -> Part:
        return self._parts.setdefault(name, Rows(self._examples))


def gram_matrix(
    model: nn.Module,
    images: Tensor,
    quantities: Quantities,
    targets: Tensor | None = None,
    *,
    memory_mb: float = 2048.0,
    tick: Tick | None = None,
) -> Tensor:
    """``J J^T`` for the Jacobian J of some quantities of n examples with respect to all trainable parameters.

    Row ``i q + c`` belongs to quantity c of example i. The network is evaluated in eval mode, and left as it was.

    Args:
        model: The network.
        images: (n, ...) inputs.
        quantities: (outputs, targets) of a batch -> (b,) or (q, b); column i depends on example i alone.
        targets: (n, ...) what ``quantities`` takes beside the outputs.
        memory_mb: MiB that the parts kept of the examples may take.
        tick: Told of the progress.

    Returns:
        (n q, n q) in the parameters' type, symmetric.

    Raises:
        ValueError: There are no examples, no parameter requires a gradient or none is used, a BatchNorm would use
            statistics of the batch, or the model mixes the examples of a batch.
    """
    if not len(images):
        raise ValueError("a Gram matrix of no examples")
    model = getattr(model, "_orig_mod", model)  # parameters have other names under torch.compile
    targets = torch.zeros(len(images), device=images.device) if targets is None else targets
    tick = tick or (lambda share: None)
    plan = make_plan(model, images, quantities, targets, memory_mb)
    while True:
        try:
            return _follow(plan, model, images, targets, quantities, tick)
        except _OtherRouteError as found:
            plan = without_factors(plan, found.name)


def _follow(
    plan: Plan, model: nn.Module, images: Tensor, targets: Tensor, quantities: Quantities, tick: Tick
) -> Tensor:
    """Add up what the bands contribute."""
    size = len(images) * plan.quantities
    found = torch.zeros(size, size, dtype=plan.dtype, device=images.device)
    works = [sum(work(plan, band, len(images))) for band in plan.bands]
    for band, its_work in zip(plan.bands, works, strict=True):
        with only_trainable(model, band.names):
            share = its_work / sum(works)
            _add_band(plan, band, model, images, targets, quantities, found, lambda s, w=share: tick(s * w))
    for start in range(0, len(found), MIRRORED):
        stop = start + MIRRORED
        found[start:stop, start:stop].triu_().add_(found[start:stop, start:stop].triu(1).mT)
        found[stop:, start:stop] = found[start:stop, stop:].mT
    return found


def _add_band(
    plan: Plan,
    band: Band,
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    quantities: Quantities,
    found: Tensor,
    tick: Tick,
) -> None:
    """Add what the parameters of one band contribute to the blocks on and above the diagonal."""
    n, q = len(images), plan.quantities
    edges = [n * block // band.blocks for block in range(band.blocks + 1)]
    blocks = [slice(*pair) for pair in pairwise(edges)]
    with _Collector(model, STEP_MB) as collector:
        collector.trust(plan.trial)

        def collect(block: slice) -> dict[str, Part]:
            return collector.collect(plan, images[block], targets[block], quantities)

        making, pairs = work(plan, band, n)
        pieces = band.blocks * (band.blocks + 1) / 2
        making, pairs = (share / (making + pairs) / pieces for share in (making, pairs))
        for i, block in enumerate(blocks):
            mine = collect(block)
            tick(making)
            for other in blocks[i:]:
                theirs = mine if other is block else collect(other)
                rows, columns = (slice(part.start * q, part.stop * q) for part in (block, other))
                for key in list(theirs):
                    with torch.no_grad():
                        mine[key].products(theirs[key], found[rows, columns], theirs is mine)
                    if band.blocks == 1:
                        del mine[key]
                tick(pairs if other is block else making + pairs)
