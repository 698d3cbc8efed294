"""Per-example gradients of a full model, parameter by parameter: captured layers plus a fallback for all others.

Each parameter takes one of three routes, chosen for every batch:
- *captured*: a single recorded call of one layer contains all uses of the parameter. It is contracted without forming
  the gradient if possible.
- *summed*: there are several recorded calls (a layer called twice, or layers that share a weight). The gradients of
  the calls are added per example before use.
- *fallback*: everything else, by `vmap` over examples; exact for any parameter.

The autograd graph tells whether the records contain all uses. Whether a layer's first axis indexes independent
examples is tested once, on a few examples.
"""

import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Self

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
"""(outputs, targets) of a batch -> (b,) or (q, b); column i depends only on example i."""


def as_rows(quantities: Tensor) -> Tensor:
    """Reshape quantities (b,) or (q, b) to (q, b)."""
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

    # use math attention: the fused kernels have no batching rule
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found = vmap(single)(images, targets)  # (b, q, *shape); gradients equal for all examples are expanded over b
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
"""Number of examples on which independence is tested."""

Calls = dict[str, list[tuple[Record, str]]]
"""For each parameter, its recorded calls with the parameter's name in the module; an empty list means fallback."""


def covered(record: Record, b: int) -> bool:
    """Whether the formulas cover a call, which requires that its first axis has the batch length b."""
    if not record.inputs.shape[0] == record.output_shape[0] == b:
        return False
    unchanged = record.inputs._version == record.version  # no later layer modified them in place
    return unchanged and record.rule.fits(record.module, record.inputs)


def checked_rows(quantities: Tensor, b: int) -> Tensor:
    """Reshape the quantities of b examples to rows (q, b); ValueError on a wrong shape or without a gradient."""
    rows = as_rows(quantities)
    if rows.ndim != 2 or rows.shape[1] != b or not rows.requires_grad:
        raise ValueError(
            f"quantities must be (b,) or (q, b) with a gradient for a batch of {b}, "
            f"got {tuple(quantities.shape)}, requires_grad={rows.requires_grad}"
        )
    return rows


class PerExampleEngine(ABC):
    """Context manager with the common part of all contractions of per-example gradients.

    Covers the parameters that require a gradient. Inside the context, the model is in eval mode; on exit, hooks are
    removed and every module's mode is restored. No ``.grad`` is written. A subclass defines how to process a captured
    module (`take_captured`) and gradients that exist in full (`take_gradients`).

    Args:
        model: The model.
        memory_mb: Memory limit of per-example gradients that exist at once, in MiB.

    Attributes:
        routes: For the last batch: parameter name -> captured, summed or fallback.
        unused: For the last batch: parameters that the quantities do not depend on.

    Raises:
        ValueError: On entry, if no parameter requires a gradient.
    """

    def __init__(self, model: nn.Module, memory_mb: float = 256.0) -> None:
        self.model = getattr(model, "_orig_mod", model)  # under torch.compile, hooks may not run
        self.routes: dict[str, str] = {}
        self.unused: frozenset[str] = frozenset()
        self._budget = memory_mb * 2**20
        self._capture = Capture(self.model, LAYER_RULES)
        self._vectorizes = True  # until vmap fails on this model
        self._room = 2.0  # the largest block of memory, relative to the largest captured gradient
        self._untried = True  # whether the independence of some module's examples is still unknown
        self._independent: dict[nn.Module, bool] = {}  # test results; undecided modules are absent
        self._sizes: dict[torch.Size, tuple[int, int]] = {}  # image shape -> see `sub_batches`

    def __enter__(self) -> Self:
        self._parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError(
                "per-example gradients need a parameter that requires a gradient, but the model has none"
            )
        self._names = {id(p): name for name, p in self._parameters.items()}
        self._kept = keep_freed_blocks()
        self._evaluating = eval_mode(self.model)
        self._evaluating.__enter__()
        self._capture.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._capture.__exit__(*error)
        self._evaluating.__exit__(*error)

    def trust(self, other: "PerExampleEngine") -> None:
        """Copy what another engine of the same model has found: independence of examples and memory sizes."""
        self._untried, self._independent = other._untried, dict(other._independent)
        self._sizes = dict(other._sizes)

    def begin(self, rows: Tensor) -> None:  # noqa: B027
        """Prepare for a batch with quantities ``rows`` (q, b); does nothing by default."""

    def take_captured(self, record: Record, names: dict[str, str], part: slice) -> None:
        """Process examples ``part`` of one captured call: by `take_outer` if the rule allows it, otherwise in full.

        Args:
            record: The record, with its ``gradient``.
            names: The parameters whose only call this is: name in the module -> name in the model.
            part: Which examples.
        """
        rule, module, gradient = record.rule, record.module, record.gradient[:, part]
        if rule.outer is not None:
            self.take_outer(record, names, rule.outer.outputs(module, gradient), part)
            return
        for local, gradients in rule.gradients(module, record.inputs[part], gradient, list(names)).items():
            self.take_gradients(names[local], gradients, part)

    def take_outer(self, record: Record, names: dict[str, str], g: Tensor, part: slice) -> None:
        """The same for a call whose weight gradient is ``sum_t g_t a_t^T``, with g (q, len(part), n, o, t).

        Only engines that use the default `take_captured` need to implement it.
        """
        raise NotImplementedError

    @abstractmethod
    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """Process gradients (q, len(part), *shape) of the parameter ``name`` for the examples ``part``."""

    # ----------------------------------------------------------------------------------------------- one batch

    def run(self, images: Tensor, targets: Tensor, quantities: Quantities) -> Tensor:
        """Process all per-example gradients of one batch; return the model's outputs without their graph.

        Args:
            images: (b, ...) inputs.
            targets: (b, ...) second argument of ``quantities``.
            quantities: (outputs, targets) -> (b,) or (q, b) values to differentiate.

        Raises:
            ValueError: A BatchNorm layer would use batch statistics, the model mixes the examples of a batch, or the
                quantities have no gradient.
        """
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            if self._untried and len(images) > 1:
                self._try_independence(images[:_TRIED], targets[:_TRIED], quantities)
            outputs, rows, calls = self._record(images, targets, quantities)
            if self._untried and len(images) > _TRIED:  # the few examples gave some module only zero gradients
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
        """Run one batch; return outputs, rows, and each parameter's recorded calls with their gradients."""
        outputs = self._capture.forward(images.clone())  # the model may modify its input in place
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
        """Set the gradients of the records that the formulas cover; leave the others None."""
        b = rows.shape[1]
        usable = [r for r in records if covered(r, b) and self._independent.get(r.module, True)]
        for record, gradient in zip(usable, self._capture.backward(rows, usable), strict=True):
            # accept an undecided module only if its gradient is zero or there is no other example
            if b == 1 or record.module in self._independent or not gradient.any():
                record.gradient = gradient
            else:
                self._untried = True

    def _try_independence(self, images: Tensor, targets: Tensor, quantities: Quantities) -> None:
        """Test on a few examples which modules' first axis indexes independent examples.

        Raises:
            ValueError: The model itself mixes examples.
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
        for module, found in outcomes.items():  # None: its gradients are zero, which proves nothing
            if False in found or None not in found:
                self._independent[module] = False not in found

    def sub_batches(self, images: Tensor) -> list[slice]:
        """Split a batch so that the gradients of all logits at the captured modules' outputs fit in memory.

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
        """Store the bytes per example of the gradients of q quantities at all outputs, and of the largest one."""
        sizes = [r.output_shape.numel() // b * r.inputs.element_size() for r in self._capture.records] or [0]
        # the graph takes about five times the outputs
        self._sizes[shape] = (q + 5) * sum(sizes), q * max(sizes)

    # ---------------------------------------------------------------------------------------------- handing out

    def _chunks(self, count: int, bytes_per_example: int, largest: int, device: torch.device) -> list[slice]:
        """Split ``count`` examples, given the bytes per example in total and in the largest block."""
        step = self._budget // max(bytes_per_example, 1)
        if device.type == "cpu":
            # small enough for the allocator to reuse the memory of the previous part
            step = min(step, 2 * self._kept / max(bytes_per_example, 1), self._kept / max(largest, 1))
        step = max(1, int(step))
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    @torch.no_grad()
    def _hand_out_recorded(self, calls: Calls, q: int) -> None:
        """Process the gradients of the recorded calls."""
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
        """Process the named parameters' gradients, computed by `vmap` over examples or one by one."""
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
        """Compute, for each name, the gradients (q, b, *shape)."""
        if self._vectorizes:
            try:
                # copy each time: the model may modify its input in place
                return _vectorized(self.model, names, images.clone(), targets, quantities)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # vmap does not support some operation; one by one is also exact and reproduces a model's own errors
                log.warning(
                    "%s cannot be vectorized over examples; computing one example at a time (slow): %.160s",
                    self.model._get_name(),
                    str(error).strip().splitlines()[0],
                )
                self._vectorizes = False
        return _one_by_one(self.model, names, images.clone(), targets, quantities)


Weighting = Callable[[str, Tensor], Tensor] | None
"""(name in the model, parameter) -> weights S of the parameter's shape; None for ones."""


def check_per_example(model: nn.Module, images: Tensor) -> None:
    """Check on a few images that a model has per-example gradients.

    Raises:
        ValueError: Its output for an image depends on other images of the batch.
    """

    def losses(outputs: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs, labels, reduction="none")

    with SquaredNorms(model) as squared_norms:
        squared_norms(images, torch.zeros(len(images), dtype=torch.int64, device=images.device), losses)


class SquaredNorms(PerExampleEngine):
    """Context manager that computes ``sum over parameters of S * grad_i^2`` for each example i.

    See `PerExampleEngine` for its arguments, its effect on the model, and its errors.
    """

    def __call__(
        self,
        images: Tensor,
        targets: Tensor,
        quantities: Quantities,
        weightings: Sequence[Weighting] = (None,),
    ) -> tuple[Tensor, Tensor]:
        """Compute the squared norms of one batch.

        Args:
            images: (b, ...) inputs.
            targets: (b, ...) second argument of ``quantities``; labels for a loss.
            quantities: (outputs, targets) -> (b,) or (q, b) values to differentiate.
            weightings: f families of weights; all use the same per-example gradients.

        Returns:
            (f, q, b) float64 squared norms, and the model's outputs without their graph.

        Raises:
            ValueError: A BatchNorm layer would use batch statistics, the model mixes the examples of a batch, or the
                quantities have no gradient.
        """
        self._weightings = weightings
        outputs = self.run(images, targets, quantities)
        return self._norms, outputs

    def begin(self, rows: Tensor) -> None:
        """See `PerExampleEngine`."""
        self._norms = torch.zeros(len(self._weightings), *rows.shape, dtype=torch.float64, device=rows.device)
        self._weights: dict[str, Tensor] = {}  # of the current module
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
        """Weights of one parameter for all families, (f, *shape), or None if all are ones."""
        if all(weighting is None for weighting in self._weightings):
            return None
        if name not in self._weights:
            p = self._parameters[name].detach()
            families = [torch.ones_like(p) if w is None else w(name, p).to(p) for w in self._weightings]
            self._weights[name] = torch.stack(families)
        return self._weights[name]
