"""Per-example gradients of a full model, parameter by parameter: captured layers, the fallback, nothing left out.

Each parameter takes one of three routes, chosen for every batch:
- *captured*: one recorded call of one layer contains all its uses; contracted without forming its gradient where that
  is possible;
- *summed*: several recorded calls (a layer called twice, layers that share a weight): the gradients of the calls are
  added per example, then used;
- *fallback*: everything else, by `vmap` over examples, exact for any parameter.
That a record contains all uses is read off the autograd graph; that a layer's first axis counts independent examples
is tried once, on a few examples.
"""

import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from src.devices import keep_freed_blocks
from src.jacobians.capture import Capture, Record, graph_uses, mixture, refuse_mixing, scales_by_example, trainable
from src.jacobians.layer_rules import LAYER_RULES, weighted_squares
from src.models.base import eval_mode

log = logging.getLogger(__name__)

Quantities = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) of a batch -> (b,) or (q, b); column i depends on example i alone."""


def as_rows(quantities: Tensor) -> Tensor:
    """Quantities (b,) or (q, b) as (q, b)."""
    return quantities.unsqueeze(0) if quantities.ndim == 1 else quantities


def _vectorized(
    model: nn.Module, names: Sequence[str], images: Tensor, targets: Tensor, quantities: Quantities
) -> dict[str, Tensor]:
    constants = {name: p.detach() for name, p in model.named_parameters()}
    values = {name: constants[name] for name in names}

    def single(image: Tensor, target: Tensor) -> dict[str, Tensor]:
        def rows(chosen: dict[str, Tensor]) -> Tensor:
            outputs = functional_call(model, {**constants, **chosen}, (image.unsqueeze(0),))
            return as_rows(quantities(outputs, target.unsqueeze(0)))[:, 0]  # (q,)

        primals, pull = vjp(rows, values)
        units = torch.eye(len(primals), dtype=primals.dtype, device=primals.device)
        pulled = [pull(unit)[0] for unit in units]
        return {name: torch.stack([gradients[name] for gradients in pulled]) for name in names}

    # plain attention: the fused kernels have no batching rule
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found = vmap(single)(images, targets)  # (b, q, *shape); gradients that are equal for all are spread over b
    return {name: gradients.transpose(0, 1) for name, gradients in found.items()}


def _one_by_one(
    model: nn.Module, names: Sequence[str], images: Tensor, targets: Tensor, quantities: Quantities
) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for image, target in zip(images.split(1), targets.split(1), strict=True):
        rows = as_rows(quantities(model(image), target))[:, 0]
        per_row = []
        for q, row in enumerate(rows):
            gradients = torch.autograd.grad(row, chosen, retain_graph=q + 1 < len(rows), allow_unused=True)
            per_row.append([torch.zeros_like(p) if g is None else g for p, g in zip(chosen, gradients, strict=True)])
        for name, *stacked in zip(names, *per_row, strict=True):
            found[name].append(torch.stack(stacked))
    return {name: torch.stack(parts, dim=1) for name, parts in found.items()}


CAPTURED, SUMMED, FALLBACK = "captured", "summed", "fallback"

_TRIED = 8
"""Examples on which the independence of examples is tried."""

Calls = dict[str, list[tuple[Record, str]]]
"""For each parameter its recorded calls, with the parameter's name in the module; none: the fallback."""


def covered(record: Record, b: int) -> bool:
    """Whether the formulas cover a call, its first axis having the length of a batch of b."""
    if not record.inputs.shape[0] == record.output_shape[0] == b:
        return False
    unchanged = record.inputs._version == record.version  # no later layer worked on them in place
    return unchanged and record.rule.fits(record.module, record.inputs)


def checked_rows(quantities: Tensor, b: int) -> Tensor:
    """Quantities of b examples as rows (q, b); ValueError if they are not that, or have no gradient."""
    rows = as_rows(quantities)
    if rows.ndim != 2 or rows.shape[1] != b or not rows.requires_grad:
        raise ValueError(
            f"quantities must be (b,) or (q, b) with a gradient for a batch of {b}, "
            f"got {tuple(quantities.shape)}, requires_grad={rows.requires_grad}"
        )
    return rows


class PerExampleEngine(ABC):
    """Context manager: what any contraction of per-example gradients has in common.

    Covers the parameters that require a gradient. Inside the context the model is in eval mode; on leaving it,
    hooks are gone and every module is in the mode it had. No ``.grad`` is written. A subclass defines what becomes of
    a captured module (`take_captured`) and of gradients that exist in full (`take_gradients`).

    Args:
        model: the model.
        memory_mb: how many MB of per-example gradients may be alive at a time.

    Attributes:
        routes: of the last batch: parameter's name -> captured, summed or fallback.
        unused: of the last batch: parameters that the quantities do not depend on.

    Raises:
        ValueError: on entering, if no parameter requires a gradient.
    """

    def __init__(self, model: nn.Module, memory_mb: float = 256.0) -> None:
        self.model = getattr(model, "_orig_mod", model)  # under torch.compile hooks need not fire
        self.routes: dict[str, str] = {}
        self.unused: frozenset[str] = frozenset()
        self._budget = memory_mb * 2**20
        self._capture = Capture(self.model, LAYER_RULES)
        self._vectorizes = True  # until the model turns out not to allow it
        self._room = 2.0  # the largest block of memory, in units of the largest gradient that is captured
        self._untried = True  # whether some module's examples may yet turn out to depend on each other
        self._independent: dict[nn.Module, bool] = {}  # by trial; undecided modules are absent
        self._sizes: dict[torch.Size, tuple[int, int]] = {}  # image shape -> see `sub_batches`

    def __enter__(self) -> Self:
        self._parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError("per-example gradients of a model none of whose parameters requires a gradient")
        self._names = {id(p): name for name, p in self._parameters.items()}
        self._kept = keep_freed_blocks()
        self._evaluating = eval_mode(self.model)
        self._evaluating.__enter__()
        self._capture.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._capture.__exit__(*error)
        self._evaluating.__exit__(*error)

    def trust(self, other: "PerExampleEngine") -> None:
        """Take over what another engine of the same model found out: independence of examples, sizes of batches."""
        self._untried, self._independent = other._untried, dict(other._independent)
        self._sizes = dict(other._sizes)

    def begin(self, rows: Tensor) -> None:  # noqa: B027
        """A batch with quantities ``rows`` (q, b) is about to come; nothing to do by default."""

    def take_captured(self, record: Record, names: dict[str, str], part: slice) -> None:
        """Examples ``part`` of one captured call: by `take_outer` where the rule allows it, else in full.

        Args:
            record: with its ``gradient``.
            names: the parameters whose only call this is: name in the module -> name in the model.
            part: which examples.
        """
        rule, module, gradient = record.rule, record.module, record.gradient[:, part]
        if rule.outer is not None:
            self.take_outer(record, names, rule.outer.outputs(module, gradient), part)
            return
        for local, gradients in rule.gradients(module, record.inputs[part], gradient, list(names)).items():
            self.take_gradients(names[local], gradients, part)

    def take_outer(self, record: Record, names: dict[str, str], g: Tensor, part: slice) -> None:
        """The same for a call whose weight's gradient is ``sum_t g_t a_t^T``, with g (q, len(part), n, o, t).

        Only engines that keep the default `take_captured` need it; the others never get here.
        """
        raise NotImplementedError

    @abstractmethod
    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """Gradients (q, len(part), *shape) of the parameter ``name`` for the examples ``part``."""

    # ----------------------------------------------------------------------------------------------- one batch

    def run(self, images: Tensor, targets: Tensor, quantities: Quantities) -> Tensor:
        """Hand out all per-example gradients of one batch; returns the model's outputs without their graph.

        Args:
            images: (b, ...) inputs.
            targets: (b, ...) what ``quantities`` takes beside the outputs.
            quantities: (outputs, targets) -> (b,) or (q, b) values to differentiate.

        Raises:
            ValueError: a BatchNorm would use statistics of the batch, the model mixes the examples of a batch, or the
                quantities have no gradient.
        """
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            if self._untried and len(images) > 1:
                self._try_independence(images[:_TRIED], targets[:_TRIED], quantities)
            outputs, rows, calls = self._record(images, targets, quantities)
            if self._untried and len(images) > _TRIED:  # a module through which the few tried let no gradient pass
                self._try_independence(images, targets, quantities)
                outputs, rows, calls = self._record(images, targets, quantities)
            self.routes = {name: (FALLBACK, CAPTURED, SUMMED)[min(len(found), 2)] for name, found in calls.items()}
            self.begin(rows)
            self._hand_out_recorded(calls, rows.shape[0])
            if rest := [name for name, route in self.routes.items() if route == FALLBACK]:
                self._hand_out_fallback(rest, images, targets, quantities, rows.shape[0])
        self._capture.records = []
        return outputs.detach()

    def _record(self, images: Tensor, targets: Tensor, quantities: Quantities) -> tuple[Tensor, Tensor, Calls]:
        """Outputs, rows and each parameter's recorded calls, with gradients, of one batch."""
        outputs = self._capture.forward(images.clone())  # a model may work on its input in place
        rows = checked_rows(quantities(outputs, targets), len(images))
        if images.shape[1:] not in self._sizes:
            self._note_sizes(images.shape[1:], *rows.shape)
        uses, nodes = graph_uses(rows)
        self.unused = frozenset(name for name, p in self._parameters.items() if not uses[id(p)])
        records = [r for r in self._capture.records if r.edge.node in nodes]
        self._differentiate(rows, records)
        calls: Calls = {name: [] for name in self._parameters}
        for record in records:
            for local, parameter in trainable(record.module).items():
                calls[self._names[id(parameter)]].append((record, local))
        for name, parameter in self._parameters.items():
            all_recorded = len(calls[name]) == uses[id(parameter)]
            if not all_recorded or any(record.gradient is None for record, _ in calls[name]):
                calls[name] = []
        return outputs, rows, calls

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

    def sub_batches(self, images: Tensor) -> list[slice]:
        """Cuts of a batch such that the gradients of all logits at the captured modules' outputs fit into the memory.

        Args:
            images: (b, ...) inputs.
        """
        shape = images.shape[1:]
        if shape not in self._sizes and len(images):
            with torch.enable_grad():
                q = self._capture.forward(images[:1].clone()).numel()
            self._note_sizes(shape, q, 1)
            self._capture.records = []
        size, largest = self._sizes.get(shape, (0, 0))
        return self._chunks(len(images), size, int(self._room * largest), images.device)

    def _note_sizes(self, shape: torch.Size, q: int, b: int) -> None:
        """Remember what the gradients of q quantities at all outputs take per example, and the largest of them."""
        sizes = [r.output_shape.numel() // b * r.inputs.element_size() for r in self._capture.records] or [0]
        # and about five times the outputs in the graph
        self._sizes[shape] = (q + 5) * sum(sizes), q * max(sizes)

    # ---------------------------------------------------------------------------------------------- handing out

    def _chunks(self, count: int, bytes_per_example: int, largest: int, device: torch.device) -> list[slice]:
        """Cuts of ``count`` examples, each with so many bytes in all and in its largest block."""
        step = self._budget // max(bytes_per_example, 1)
        if device.type == "cpu":
            # what is freed after one cut serves the next
            step = min(step, 2 * self._kept / max(bytes_per_example, 1), self._kept / max(largest, 1))
        step = max(1, int(step))
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    @torch.no_grad()
    def _hand_out_recorded(self, calls: Calls, q: int) -> None:
        """Hand out the gradients of the recorded calls."""
        alone: dict[Record, dict[str, str]] = defaultdict(dict)  # record -> name in its module -> name
        for name, found in calls.items():
            if len(found) == 1:
                record, local = found[0]
                alone[record][local] = name
            elif found:
                self._hand_out_summed(name, found, q)
        for record, names in alone.items():
            size = record.rule.bytes_per_example(record.module, record.inputs, record.gradient)
            for part in self._chunks(record.inputs.shape[0], size, size, record.inputs.device):
                self.take_captured(record, names, part)

    def _hand_out_summed(self, name: str, calls: list[tuple[Record, str]], q: int) -> None:
        size = sum(r.rule.bytes_per_example(r.module, r.inputs, r.gradient) for r, _ in calls)
        size += 2 * q * self._parameters[name].nbytes
        first = calls[0][0].inputs
        for part in self._chunks(first.shape[0], size, size, first.device):
            total = sum(
                r.rule.gradients(r.module, r.inputs[part], r.gradient[:, part], [local])[local] for r, local in calls
            )
            self.take_gradients(name, total, part)

    def _hand_out_fallback(
        self, names: list[str], images: Tensor, targets: Tensor, quantities: Quantities, q: int
    ) -> None:
        """Hand out the named parameters' gradients, taken by `vmap` over examples or one by one."""
        size = 3 * q * sum(self._parameters[name].nbytes for name in names)
        step = max(1, int(self._budget // size))
        for start in range(0, len(images), step):
            part = slice(start, min(start + step, len(images)))
            found = self._fallback(names, images[part], targets[part], quantities)
            with torch.no_grad():
                for name, gradients in found.items():
                    self.take_gradients(name, gradients, part)

    def _fallback(
        self, names: list[str], images: Tensor, targets: Tensor, quantities: Quantities
    ) -> dict[str, Tensor]:
        """Per name the gradients (q, b, *shape)."""
        if self._vectorizes:
            try:
                # a copy each time: the model may work on its input in place
                return _vectorized(self.model, names, images.clone(), targets, quantities)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # raised by what vmap does not know; one by one is exact, too, and raises a model's own errors again
                log.warning(
                    "%s cannot be vectorized over examples, which are now taken one by one (slow): %.160s",
                    type(self.model).__name__,
                    str(error).strip().splitlines()[0],
                )
                self._vectorizes = False
        return _one_by_one(self.model, names, images.clone(), targets, quantities)


Weighting = Callable[[str, Tensor], Tensor] | None
"""(name in the model, parameter) -> weights S of the parameter's shape; None for ones."""


class SquaredNorms(PerExampleEngine):
    """Context manager that computes ``sum over parameters of S * grad_i^2`` for each example i.

    See `PerExampleEngine` for its arguments, for what it does to the model, and for what it raises.
    """

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
        self._weightings = weightings
        outputs = self.run(images, targets, quantities)
        return self._norms, outputs

    def begin(self, rows: Tensor) -> None:
        """See `PerExampleEngine`."""
        self._norms = torch.zeros(len(self._weightings), *rows.shape, dtype=torch.float64, device=rows.device)
        self._weights: dict[str, Tensor] = {}  # of the module at hand
        self._latest: Record | None = None

    def take_captured(self, record: Record, names: dict[str, str], part: slice) -> None:
        """See `PerExampleEngine`."""
        if record is not self._latest:
            self._weights.clear()
            self._latest = record
        weights = {local: self._weight(name) for local, name in names.items()}
        squares = record.rule.squares(record.module, record.inputs[part], record.gradient[:, part], weights)
        self._norms[:, :, part] += squares

    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """See `PerExampleEngine`."""
        self._norms[:, :, part] += weighted_squares(gradients, self._weight(name))

    def _weight(self, name: str) -> Tensor | None:
        """The families' weights of one parameter, (f, *shape), or None if all are ones."""
        if all(weighting is None for weighting in self._weightings):
            return None
        if name not in self._weights:
            p = self._parameters[name].detach()
            families = [torch.ones_like(p) if w is None else w(name, p).to(p) for w in self._weightings]
            self._weights[name] = torch.stack(families)
        return self._weights[name]
