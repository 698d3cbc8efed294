"""Capture: the inputs of each layer with parameters, and the gradients at its output.

A layer's Jacobian is a sum over positions t of ``g_t (x) a_t`` (inputs ``a``, gradients at the output ``g``), so
these two tensors are all that a contraction needs, and the Jacobian itself is never built.

Outputs are remembered as gradient edges (node and slot of the autograd graph), taken the moment the layer returns: an
activation that later works in place on that output moves the tensor, not the edge, so ``g`` stays the gradient at the
layer's own output.

Two things belong to capturing. Whether the examples of a batch are independent is tried on gradients, not guessed
from shapes. And on a CPU, convolutions and pooling are fastest when the channels of a position are adjacent in
memory, but under `torch.func.vmap` autograd's own backward operations lose that layout, copy what is the same for all
rows, or both; for the layers in `BACKWARD_OVERRIDES` the output is recomputed, with the same values, in that layout
and with a backward operation that keeps it.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm

from src.errors import MeasurementError
from src.jacobians.layer_rules import LayerRule, all_rows
from src.models.base import SamePad, same_padding

TOLERANCE = 0.02
"""A wrong axis is off by about a third of the norm; rounding, even in TF32, by far less than this."""


def _far_apart(count: int, like: Tensor) -> Tensor:
    """Numbers in [0.5, 1.5), neighbours far from each other (multiples of the golden ratio)."""
    steps = torch.arange(1, count + 1, dtype=torch.float64)
    return (0.5 + (0.6180339887498949 * steps) % 1.0).to(like.device, like.dtype)


def mixture(rows: Tensor) -> tuple[Tensor, Tensor]:
    """One row that mixes q quantities, and numbers to scale its examples with.

    Args:
        rows: (q, b) quantities.

    Returns:
        The mixed row (b,) with its graph, and the scale of each example (b,).
    """
    return _far_apart(rows.shape[0], rows) @ rows, _far_apart(rows.shape[1], rows)


def scales_by_example(plain: Tensor, scaled: Tensor, scale: Tensor) -> bool | None:
    """Whether ``scaled`` is ``plain`` with row i multiplied by ``scale[i]``; None if both vanish.

    Args:
        plain: (b, ...) gradients of the mixed row's sum.
        scaled: (b, ...) gradients of the sum of mixed row times scale.
        scale: (b,).
    """
    expected = plain * scale.to(plain).view(-1, *[1] * (plain.ndim - 1))
    size, gap = expected.norm().item(), (scaled - expected).norm().item()
    if size == 0.0 and gap == 0.0:
        return None
    return gap <= TOLERANCE * size


def refuse_mixing(rows: Tensor, images: Tensor) -> None:
    """Raise if an example's quantities depend on another example's image. Keeps the graph.

    Args:
        rows: (q, b) quantities with their graph.
        images: the leaf (b, ...) that they were computed from.

    Raises:
        ValueError: they do.
        MeasurementError: a gradient is not finite, so that nothing can be said.
    """
    row, scale = mixture(rows)
    found = [
        torch.autograd.grad(values.sum(), images, retain_graph=True, allow_unused=True)[0]
        for values in (row, row * scale)
    ]
    if any(gradient is None for gradient in found):
        return
    if not all(gradient.isfinite().all() for gradient in found):
        raise MeasurementError(
            "the gradients at the first images are not finite: the images or the weights are not, or they are "
            "too large"
        )
    if scales_by_example(*found, scale) is False:
        raise ValueError(
            "per-example gradients are not defined: the model's output for one image depends on the other images "
            "of its batch, even in eval mode"
        )


def refuse_batch_statistics(model: nn.Module) -> None:
    """Raise where examples would depend on each other through the statistics of their batch.

    Args:
        model: the model about to be run.

    Raises:
        ValueError: a BatchNorm of the model is in training mode or keeps no running statistics.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            why = "is in training mode" if module.training else "keeps no running statistics"
            raise ValueError(
                f"per-example gradients need fixed statistics, but the BatchNorm {name!r} {why}: "
                "call model.eval() and build it with track_running_stats=True"
            )


BackwardOverride = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(module, inputs, output) -> an output with the same values and another backward operation."""


def channels_last(x: Tensor) -> Tensor:
    """(b, c, h, w) with the channels last in memory; by operations that `vmap` knows. No copy where they are."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class _Convolution(torch.autograd.Function):
    """The weight and the bias are inputs so that the graph shows them; they get no gradient."""

    @staticmethod
    def forward(ctx, a: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, module: nn.Conv2d) -> Tensor:
        ctx.inputs, ctx.weight = a.detach(), weight.detach().contiguous(memory_format=torch.channels_last)
        ctx.settings = module.stride, module.padding, module.dilation, module.groups
        return output.clone(memory_format=torch.channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        stride, padding, dilation, groups = ctx.settings
        to_inputs, _, _ = torch.ops.aten.convolution_backward(
            channels_last(g), ctx.inputs, ctx.weight, None, stride, padding, dilation, False, (0, 0), groups,
            (True, False, False),
        )  # fmt: skip
        return to_inputs, None, None, None, None


def convolution(module: nn.Conv2d, a: Tensor, output: Tensor) -> Tensor:
    """See `BackwardOverride`."""
    if a.ndim != 4 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return output
    return _Convolution.apply(a, module.weight, module.bias, output.detach(), module)


def _max_pool_maps(g: Tensor, a: Tensor, positions: Tensor, settings: tuple) -> tuple[Tensor]:
    """Row by row, into (q, b, h, w, c)."""
    q, (b, c, h, w) = len(g), a.shape
    found = g.new_empty(q, b, h, w, c).permute(0, 1, 4, 2, 3)
    for row, into in zip(g, found, strict=True):
        torch.ops.aten.max_pool2d_with_indices_backward(row, a, *settings, positions, grad_input=into)
    return (found,)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, output: Tensor, module: nn.MaxPool2d) -> Tensor:
        sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
        settings = (*(size if isinstance(size, tuple) else (size, size) for size in sizes), module.ceil_mode)
        a = a.contiguous(memory_format=torch.channels_last)
        ctx.constants = a, torch.ops.aten.max_pool2d_with_indices(a, *settings)[1], settings
        return output.clone(memory_format=torch.channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        return *all_rows(_max_pool_maps, g, *ctx.constants), None, None


def max_pool(module: nn.MaxPool2d, a: Tensor, output: Tensor) -> Tensor:
    """See `BackwardOverride`."""
    if a.ndim != 4 or module.return_indices:
        return output
    return _MaxPool.apply(a, output.detach(), module)


def adaptive_average_pool(module: nn.AdaptiveAvgPool2d, a: Tensor, output: Tensor) -> Tensor:
    """See `BackwardOverride`: a mean over all positions, or over one each, which is nothing."""
    if a.ndim != 4:
        return output
    if output.shape == a.shape:
        return a.clone()
    if output.shape[2:] == (1, 1):
        return a.permute(0, 2, 3, 1).flatten(1, 2).mean(1)[:, :, None, None]
    return output


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, output: Tensor, top: int, left: int) -> Tensor:
        ctx.rows, ctx.columns = slice(top, top + a.shape[2]), slice(left, left + a.shape[3])
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        return g[:, :, ctx.rows, ctx.columns], None, None, None


def same_pad(module: SamePad, a: Tensor, output: Tensor) -> Tensor:
    """See `BackwardOverride`: the backward operation is a view."""
    (top, _), (left, _) = (same_padding(size, module.kernel, module.stride) for size in a.shape[2:])
    return _Pad.apply(a, output.detach(), top, left)


BACKWARD_OVERRIDES: dict[type[nn.Module], BackwardOverride] = {
    nn.Conv2d: convolution,
    nn.MaxPool2d: max_pool,
    nn.AdaptiveAvgPool2d: adaptive_average_pool,
    SamePad: same_pad,
}
"""By exact module type."""

CHANNELS = 16
"""Numbers in a vector register; convolutions that give other numbers of maps are no faster in this layout."""

KEEPING = frozenset(
    {*BACKWARD_OVERRIDES, nn.Linear, nn.Flatten, nn.Identity, nn.Dropout, nn.ReLU, nn.ELU, nn.GELU, nn.Tanh}
)
"""Modules whose backward operation keeps the layout, or that do not see maps."""


def suits_channels_last(model: nn.Module) -> bool:
    """Whether a model gains from `BACKWARD_OVERRIDES`.

    It is on a processor, its convolutions give multiples of 16 maps each, it takes maxima over maps (where the gain
    is largest), and it has no layer that loses the layout again, as normalization does.
    """
    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    return (
        {nn.Conv2d, nn.MaxPool2d} <= {type(module) for module in leaves} <= KEEPING
        and all(m.out_channels % CHANNELS == 0 for m in leaves if isinstance(m, nn.Conv2d))
        and all(p.device.type == "cpu" for p in model.parameters())
    )


log = logging.getLogger(__name__)


@dataclass(eq=False)
class Record:
    """One call of one captured module.

    Attributes:
        name: the module's name in the model.
        module: the module.
        rule: how its gradients are contracted.
        inputs: what it was called with, (b, ...).
        edge: where its output (or what its rule taps instead) is in the autograd graph.
        output_shape: the shape of that tensor.
        version: version counter of ``inputs`` at the call.
        gradient: (q, b, ...) gradients of q quantities at the output, None until `Capture.backward` filled it.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    inputs: Tensor
    edge: GradientEdge
    output_shape: torch.Size
    version: int
    gradient: Tensor | None = None


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that belong to the module itself (not to its children) and require a gradient."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}


class Capture:
    """Context manager: hooks on the modules that have a layer rule, recording while `forward` runs.

    Modules of other types, subclasses, parametrized modules and modules with parameters of other names are left
    alone; the caller must treat their parameters in another way.

    Args:
        model: the model.
        rules: layer rules by exact module type.

    Attributes:
        channels_last: whether `BACKWARD_OVERRIDES` apply; to be set before `forward`.
    """

    def __init__(self, model: nn.Module, rules: Mapping[type[nn.Module], LayerRule]) -> None:
        self.model = model
        self.records: list[Record] = []
        self.channels_last = False
        self._rules = rules
        self._recording = False
        self._vectorizes: bool | None = None  # whether one pass can carry all rows; None: not tried
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self.model.named_modules():
            rule = self._rules.get(type(module))
            own = {key for key, value in module._parameters.items() if value is not None}
            # an instance that carries its own forward, or weights under other names (weight norm, pruning),
            # does not compute what its type suggests
            if "forward" in vars(module) or not own <= (rule.parameters if rule else set()):
                continue
            captured = rule is not None and bool(trainable(module))
            if captured or (type(module) in BACKWARD_OVERRIDES and not own):
                hook = partial(self._hook, name, rule if captured else None)
                self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.records = []

    def _hook(
        self, name: str, rule: LayerRule | None, module: nn.Module, args: tuple, kwargs: dict, output: Tensor
    ) -> Tensor | None:
        # without a gradient (a call under no_grad) this call adds nothing to any parameter's gradient
        if not self._recording or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        inputs = args[0] if args else kwargs.get("input", next(iter(kwargs.values())))
        if self.channels_last and type(module) in BACKWARD_OVERRIDES:
            output = BACKWARD_OVERRIDES[type(module)](module, inputs, output)
        if rule is not None:
            tapped = output
            if rule.tap is not None and rule.fits(module, inputs):
                output, tapped = rule.tap(module, inputs, output)
            edge = get_gradient_edge(tapped)
            self.records.append(Record(name, module, rule, inputs.detach(), edge, tapped.shape, inputs._version))
        return output

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
        be so few that these stay in the processor's caches. A model that cannot be differentiated this way gets
        a pass for each row. No gradient of a parameter is computed or left behind.

        Args:
            rows: (q, b) quantities with their graph; column i depends on example i alone.
            records: those whose gradients are wanted.
            keep_graph: whether the graph is still needed afterwards.

        Returns:
            For each record a tensor (q, *output shape).
        """
        if not records:
            return []
        if self._vectorizes is not False and rows.shape[0] > 1:
            # the graph of the first trial may be needed for a second
            found = _all_rows(rows, records, keep_graph or self._vectorizes is None)
            self._vectorizes = found is not None
            if found is not None:
                return found
        return _row_by_row(rows, records, keep_graph)


def _zeros_if_none(gradients: Sequence[Tensor | None], records: Sequence[Record]) -> tuple[Tensor, ...]:
    return tuple(
        record.inputs.new_zeros(record.output_shape) if gradient is None else gradient
        for record, gradient in zip(records, gradients, strict=True)
    )


def _all_rows(rows: Tensor, records: Sequence[Record], keep_graph: bool) -> list[Tensor] | None:
    """`Capture.backward` in one pass; None where something in the graph cannot be vectorized."""
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
    except RuntimeError as error:
        # What cannot be vectorized raises these; one by one gives the same gradients, or the error again if it was
        # the model's own. Without its graph there is no second attempt, and the reason must not be hidden.
        if not keep_graph:
            raise
        log.info("gradients of the classes are taken one by one: %.160s", error)
        return None


def _row_by_row(rows: Tensor, records: Sequence[Record], keep_graph: bool) -> list[Tensor]:
    """`Capture.backward` by one pass per row."""
    edges = [record.edge for record in records]
    found: list[Tensor] = []
    for q, row in enumerate(rows):
        keep = keep_graph or q + 1 < len(rows)
        gradients = torch.autograd.grad(row.sum(), edges, retain_graph=keep, allow_unused=True)
        filled = _zeros_if_none(gradients, records)
        if len(rows) == 1:  # without a copy
            return [gradient.unsqueeze(0) for gradient in filled]
        if q == 0:
            found = [g.new_empty(len(rows), *g.shape) for g in filled]
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
