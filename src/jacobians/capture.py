"""Capture: what flows into each parameterised module, and the gradients that come back to its output.

A module's Jacobian is a sum over positions t of ``g_t (x) a_t`` (inputs ``a``, gradients at the output ``g``), so
these two tensors hold everything that a contraction needs, and the Jacobian itself is never built.

Outputs are remembered as gradient edges (node and slot of the autograd graph), taken the moment the module
returns: an activation that later works in place on that output moves the tensor, not the edge, so ``g`` stays
the gradient at the module's own output.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import vmap

from src.jacobians.channels_last import PASSAGES
from src.jacobians.contract import Kind
from src.jacobians.independence import refuse_batch_statistics

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Record:
    """One call of one captured module.

    Attributes:
        name: the module's name in the model.
        module: the module.
        kind: how its gradients are contracted.
        inputs: what it was called with, (b, ...).
        edge: where its output (or what its kind taps instead) stands in the autograd graph.
        output_shape: the shape of that tensor.
        version: version counter of ``inputs`` at the call.
        gradient: (q, b, ...) gradients of q quantities at the output, None until `Capture.backward` filled it.
    """

    name: str
    module: nn.Module
    kind: Kind
    inputs: Tensor
    edge: GradientEdge
    output_shape: torch.Size
    version: int
    gradient: Tensor | None = field(default=None)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The module's own parameters that require a gradient, by their name within the module."""
        return trainable(self.module)

    def intact(self) -> bool:
        """Whether the inputs are still those that the module saw."""
        return self.inputs._version == self.version


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that belong to the module itself (not to its children) and require a gradient."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}


class Capture:
    """Context manager: hooks on the modules of known kinds, recording while `forward` runs.

    Modules of other kinds, subclasses, parametrised modules and modules with parameters of other names are left
    alone: their parameters are nobody's here, and the caller must treat them in another way.

    Args:
        model: the network.
        kinds: contraction rules by exact module type.

    Attributes:
        channels_last: whether maps take the ways of `src.jacobians.channels_last`; to be set before `forward`.
    """

    def __init__(self, model: nn.Module, kinds: Mapping[type[nn.Module], Kind]) -> None:
        self.model = model
        self.records: list[Record] = []
        self.channels_last = False
        self._kinds = kinds
        self._recording = False
        self._vectorises: bool | None = None  # whether one pass can carry all rows; None: not tried
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self.model.named_modules():
            kind = self._kinds.get(type(module))
            own = {key for key, value in module._parameters.items() if value is not None}
            # an instance that carries its own forward, or weights under other names (weight norm, pruning),
            # computes something else than its type says
            if "forward" in vars(module) or not own <= (kind.parameters if kind else set()):
                continue
            if kind is not None and trainable(module):
                hook = self._hook(name, kind)
            elif type(module) in PASSAGES and not own:
                hook = self._passing
            else:
                continue
            self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.records = []

    def _hook(self, name: str, kind: Kind):
        def record(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            # without a gradient (a call under no_grad) this call adds nothing to any parameter's gradient
            if not self._recording or not output.requires_grad:
                return None
            inputs = args[0] if args else kwargs["input"]
            tapped = output = self._passed(module, inputs, output)
            if kind.tap is not None and kind.fits(module, inputs):
                output, tapped = kind.tap(module, inputs, output)
            edge = get_gradient_edge(tapped)
            self.records.append(Record(name, module, kind, inputs.detach(), edge, tapped.shape, inputs._version))
            return output

        return record

    def _passing(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        """The hook of modules without parameters."""
        if not self._recording or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        return self._passed(module, args[0] if args else next(iter(kwargs.values())), output)

    def _passed(self, module: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        passage = PASSAGES.get(type(module)) if self.channels_last else None
        return output if passage is None else passage(module, inputs, output)

    def forward(self, images: Tensor) -> Tensor:
        """Run the model and record; recording stops before any backward pass (checkpointing calls modules again).

        Args:
            images: (b, ...) inputs.

        Returns:
            The model's outputs, with their graph.

        Raises:
            ValueError: a BatchNorm would use statistics of the batch.
        """
        refuse_batch_statistics(self.model)
        self.records = []
        self._recording = True
        try:
            return self.model(images)
        finally:
            self._recording = False

    def backward(self, rows: Tensor, records: Sequence[Record], keep_graph: bool = False) -> list[Tensor]:
        """Gradients of each row's sum at the outputs of the records.

        One pass carries all rows along (`torch.func.vmap`): its layers see q times as many maps, and the examples can
        be so few that these stay in the processor's caches. A network that cannot be differentiated so gets a pass
        for each row. No gradient of a parameter is computed or left behind.

        Args:
            rows: (q, b) quantities with their graph; column i depends on example i alone.
            records: those whose gradients are wanted.
            keep_graph: whether the graph is still needed afterwards.

        Returns:
            For each record a tensor (q, *output shape).
        """
        if not records:
            return []
        if self._vectorises is not False and rows.shape[0] > 1:
            # the graph of the first trial may be needed for a second
            found = _all_rows(rows, records, keep_graph or self._vectorises is None)
            self._vectorises = found is not None
            if found is not None:
                return found
        return _row_by_row(rows, records, keep_graph)


def _zeros_if_none(gradients: Sequence[Tensor | None], records: Sequence[Record]) -> tuple[Tensor, ...]:
    return tuple(
        record.inputs.new_zeros(record.output_shape) if gradient is None else gradient
        for record, gradient in zip(records, gradients, strict=True)
    )


def _all_rows(rows: Tensor, records: Sequence[Record], keep_graph: bool) -> list[Tensor] | None:
    """`Capture.backward` in one pass; None where the graph holds what cannot be vectorised."""
    edges = [record.edge for record in records]

    def pull(weights: Tensor) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(rows, edges, weights, retain_graph=keep_graph, allow_unused=True)
        return _zeros_if_none(gradients, records)

    units = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    try:
        with warnings.catch_warnings():  # an operation without a batching rule is looped over, which is no loss here
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return list(vmap(pull)(units.unsqueeze(2).expand(-1, -1, rows.shape[1])))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        # What cannot be vectorised raises these; one by one gives the same gradients, or the error again if it was
        # the network's own. Without its graph there is no second way, and the reason is not hidden behind that.
        if not keep_graph:
            raise
        logger.info("gradients of the classes are taken one by one: %.160s", error)
        return None


def _row_by_row(rows: Tensor, records: Sequence[Record], keep_graph: bool) -> list[Tensor]:
    """`Capture.backward` by one pass per row."""
    edges = [record.edge for record in records]
    count = len(rows)
    found: list[Tensor] = []
    for q, row in enumerate(rows.unbind(0)):
        keep = keep_graph or q + 1 < count
        gradients = torch.autograd.grad(row.sum(), edges, retain_graph=keep, allow_unused=True)
        filled = _zeros_if_none(gradients, records)
        if count == 1:
            return [gradient.unsqueeze(0) for gradient in filled]
        if q == 0:
            found = [g.new_empty(count, *g.shape) for g in filled]
        for stacked, gradient in zip(found, filled, strict=True):
            stacked[q] = gradient
    return found


def graph_uses(rows: Tensor) -> tuple[Counter[int], set[torch.autograd.graph.Node]]:
    """Walk the autograd graph under the rows.

    Args:
        rows: any tensor with a graph.

    Returns:
        How often each parameter enters the graph, by ``id``; and all nodes of the graph. A captured module enters
        each of its parameters once per call; any further entry is a use that no hook saw.
    """
    uses: Counter[int] = Counter()
    nodes = {rows.grad_fn}
    stack = [rows.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            if node.name() == "torch::autograd::AccumulateGrad":
                uses[id(node.variable)] += 1
            elif node not in nodes:
                nodes.add(node)
                stack.append(node)
    return uses, nodes
