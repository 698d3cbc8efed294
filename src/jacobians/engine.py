"""Per-example squared gradient norms of a whole network: captured modules, the fallback, and nothing left out.

Each parameter takes one of three routes, found anew for every batch:
- *captured*: one recorded call of one module holds all its uses; contracted without forming its gradient
  where that is possible;
- *summed*: several recorded calls (a module called twice, modules that share a weight): the calls' gradients are
  added per example, then squared;
- *fallback*: everything else (`src.jacobians.fallback`).
That a record holds all uses is read off the autograd graph; that a module's first axis counts independent examples
is tried once, on a few examples.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from src.jacobians.capture import Capture, Record, graph_uses
from src.jacobians.contract import KINDS, weighted_squares
from src.jacobians.fallback import ExampleGradients, Quantities, as_rows
from src.jacobians.independence import mixture, refuse_mixing, scales_by_example
from src.models.modes import evaluating

Weighting = Callable[[str, Tensor], Tensor] | None
"""(name in the model, parameter) -> weights S of the parameter's shape; None stands for ones."""

CAPTURED, SUMMED, FALLBACK = "captured", "summed", "fallback"


TRIED = 8
"""Examples on which the independence of examples is tried."""


def covered(record: Record, b: int) -> bool:
    """Whether the formulas cover a call, its first axis having the length of a batch of b."""
    whole = record.inputs.shape[0] == record.output_shape[0] == b
    return whole and record.intact() and record.kind.fits(record.module, record.inputs)


def checked_rows(quantities: Tensor, b: int) -> Tensor:
    """Quantities of b examples as rows (q, b); ValueError if they are not that, or have no gradient."""
    rows = as_rows(quantities)
    if rows.ndim != 2 or rows.shape[1] != b or not rows.requires_grad:
        raise ValueError(
            f"quantities must be (b,) or (q, b) with a gradient for a batch of {b}, "
            f"got {tuple(quantities.shape)}, requires_grad={rows.requires_grad}"
        )
    return rows


class SquaredNorms:
    """Context manager that computes ``sum over parameters of S * grad_i^2`` for each example i.

    Covers the parameters that require a gradient. Inside the context the model is in eval mode; on leaving it,
    hooks are gone and every module is in the mode it had. No ``.grad`` is written.

    Args:
        model: the network; its outputs' first axis is the batch.
        memory_mb: how many MB of per-example gradients may be alive at a time.

    Raises:
        ValueError: on entering, if no parameter requires a gradient.
    """

    def __init__(self, model: nn.Module, memory_mb: float = 256.0) -> None:
        self.model = getattr(model, "_orig_mod", model)  # under torch.compile hooks need not fire
        self.routes: dict[str, str] = {}
        self._budget = memory_mb * 2**20
        self._capture = Capture(self.model, KINDS)
        self._fallback = ExampleGradients(self.model)
        self._untried = True  # whether some module's examples may yet turn out to depend on each other
        self._independent: dict[nn.Module, bool] = {}  # by trial; undecided modules are absent

    def __enter__(self) -> Self:
        self._parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError("per-example gradients of a model none of whose parameters requires a gradient")
        self._names = {id(p): name for name, p in self._parameters.items()}
        self._evaluating = evaluating(self.model)
        self._evaluating.__enter__()
        self._capture.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capture.__exit__(kind, error, trace)
        self._evaluating.__exit__(kind, error, trace)

    def __call__(
        self,
        images: Tensor,
        targets: Tensor,
        quantities: Quantities,
        weightings: Sequence[Weighting] = (None,),
    ) -> tuple[Tensor, Tensor]:
        """Squared norms of one batch.

        Args:
            images: (b, ...) inputs.
            targets: (b, ...) what ``quantities`` takes beside the outputs, labels for a loss.
            quantities: (outputs, targets) -> (b,) or (q, b) values to differentiate.
            weightings: f families of weights that share every per-example gradient.

        Returns:
            (f, q, b) float64 squared norms, and the model's outputs without their graph.

        Raises:
            ValueError: a BatchNorm would use statistics of the batch, the model mixes the examples of a batch, or the
                quantities have no gradient.
        """
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            if self._untried and len(images) > 1:
                self._try_independence(images[:TRIED], targets[:TRIED], quantities)
            outputs = self._capture.forward(images.clone())  # a network may work on its input in place
            rows = checked_rows(quantities(outputs, targets), len(images))
            routes = self._route(rows)
            norms = torch.zeros(len(weightings), *rows.shape, dtype=torch.float64, device=rows.device)
            done = self._add_recorded(norms, routes, weightings)
            rest = [name for name, route in self.routes.items() if route == FALLBACK]
            done += self._add_fallback(norms, rest, images, targets, quantities, weightings)
        self._capture.records = []
        if sorted(done) != sorted(self._parameters):
            odd = sorted(set(self._parameters) ^ set(done)) or "some parameter counted twice"
            raise RuntimeError(f"captured and fallback parameters are not all parameters: {odd}")
        return norms, outputs.detach()

    # ------------------------------------------------------------------------------------------------- routing

    def _route(self, rows: Tensor) -> dict[str, list[tuple[Record, str]]]:
        """For each parameter its recorded calls with the parameter's name in the module; none: the fallback.

        Also fills the records' gradients, and `routes`.
        """
        uses, nodes = graph_uses(rows)
        records = [r for r in self._capture.records if r.edge.node in nodes]
        self._differentiate(rows, records)
        calls: dict[str, list[tuple[Record, str]]] = {name: [] for name in self._parameters}
        for record in records:
            for local, parameter in record.parameters().items():
                calls[self._names[id(parameter)]].append((record, local))
        for name, parameter in self._parameters.items():
            seen_whole = len(calls[name]) == uses[id(parameter)]
            if not seen_whole or any(record.gradient is None for record, _ in calls[name]):
                calls[name] = []
        self.routes = {name: (FALLBACK, CAPTURED, SUMMED)[min(len(records), 2)] for name, records in calls.items()}
        return calls

    def _differentiate(self, rows: Tensor, records: list[Record]) -> None:
        """Fill the gradients of the records that the formulas cover; leave the others None."""
        b = rows.shape[1]
        usable = [r for r in records if covered(r, b) and self._independent.get(r.module, True)]
        for record, gradient in zip(usable, self._capture.backward(rows, usable), strict=True):
            # a module that the trial did not settle counts only where there is nothing to count, or no other example
            if b == 1 or record.module in self._independent or not gradient.any():
                record.gradient = gradient
            else:
                self._untried = True

    def _try_independence(self, images: Tensor, targets: Tensor, quantities: Quantities) -> None:
        """Find out, on a few examples, which modules' first axis counts independent examples.

        Raises:
            ValueError: the model itself mixes examples.
        """
        self._untried = False
        leaf = images.detach().clone()
        if leaf.is_floating_point():
            leaf.requires_grad_()
        rows = checked_rows(quantities(self._capture.forward(leaf.clone()), targets), len(images))
        if leaf.requires_grad:
            refuse_mixing(rows, leaf)
        row, scale = mixture(rows)
        records = self._capture.records
        plain, scaled = (self._capture.backward(r.unsqueeze(0), records, True) for r in (row, row * scale))
        outcomes: dict[nn.Module, list[bool | None]] = defaultdict(list)
        for record, before, after in zip(records, plain, scaled, strict=True):
            shaped = covered(record, len(images))
            outcomes[record.module].append(shaped and scales_by_example(before[0], after[0], scale))
        for module, found in outcomes.items():  # None: its gradients vanish, which proves nothing
            if False in found or None not in found:
                self._independent[module] = False not in found

    # --------------------------------------------------------------------------------------------- contraction

    @torch.no_grad()
    def _add_recorded(
        self, norms: Tensor, routes: dict[str, list[tuple[Record, str]]], weightings: Sequence[Weighting]
    ) -> list[str]:
        """Add what the records hold; returns the names of the parameters added."""
        done: list[str] = []
        alone: dict[Record, dict[str, str]] = defaultdict(dict)  # record -> name in its module -> name
        for name, calls in routes.items():
            if len(calls) == 1:
                record, local = calls[0]
                alone[record][local] = name
            elif calls:
                self._add_summed(norms, name, calls, weightings)
                done.append(name)
        for record, names in alone.items():
            self._add_captured(norms, record, names, weightings)
            done += names.values()
        return done

    def _weights(self, name: str, weightings: Sequence[Weighting]) -> Tensor | None:
        """The families' weights of one parameter, (f, *shape), or None if all are ones."""
        if all(weighting is None for weighting in weightings):
            return None
        p = self._parameters[name].detach()
        return torch.stack([torch.ones_like(p) if w is None else w(name, p).to(p) for w in weightings])

    def _chunks(self, count: int, bytes_per_example: int) -> list[slice]:
        step = max(1, int(self._budget // max(bytes_per_example, 1)))
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def _add_captured(
        self, norms: Tensor, record: Record, names: dict[str, str], weightings: Sequence[Weighting]
    ) -> None:
        weights = {local: self._weights(name, weightings) for local, name in names.items()}
        kind, a, g = record.kind, record.inputs, record.gradient
        for part in self._chunks(a.shape[0], kind.bytes_per_example(record.module, a, g)):
            norms[:, :, part] += kind.squares(record.module, a[part], g[:, part], weights)

    def _add_summed(
        self, norms: Tensor, name: str, calls: list[tuple[Record, str]], weightings: Sequence[Weighting]
    ) -> None:
        weights = self._weights(name, weightings)
        size = sum(r.kind.bytes_per_example(r.module, r.inputs, r.gradient) for r, _ in calls)
        size += 2 * norms.shape[1] * self._parameters[name].nbytes
        for part in self._chunks(norms.shape[2], size):
            total = sum(
                r.kind.gradients(r.module, r.inputs[part], r.gradient[:, part], [local])[local] for r, local in calls
            )
            norms[:, :, part] += weighted_squares(total, weights)

    def _add_fallback(
        self,
        norms: Tensor,
        names: list[str],
        images: Tensor,
        targets: Tensor,
        quantities: Quantities,
        weightings: Sequence[Weighting],
    ) -> list[str]:
        """Add the named parameters' part; returns the names added."""
        if not names:
            return []
        size = 3 * norms.shape[1] * sum(self._parameters[name].nbytes for name in names)
        step = max(1, int(self._budget // size))
        weights = {name: self._weights(name, weightings) for name in names}
        for part, found in self._fallback(names, images, targets, quantities, step):
            with torch.no_grad():
                for name, gradients in found.items():
                    norms[:, :, part] += weighted_squares(gradients, weights[name])
        return names
