"""Capture of layer inputs and output gradients, for every layer with parameters.

A layer's Jacobian is a sum over positions t of ``g_t (x) a_t`` (inputs ``a``, gradients at the output ``g``). These
two tensors are all that a contraction needs, and the Jacobian itself is never formed.

Outputs are stored as gradient edges (node and slot of the autograd graph), taken as soon as the layer returns. A
later in-place activation changes the tensor but not the edge, so ``g`` stays the gradient at the layer's own output.

This module also handles two related problems. Whether the examples of a batch are independent is tested on gradients,
not guessed from shapes. On a CPU, convolutions and pooling are fastest in channels-last layout, but under
`torch.func.vmap` autograd's backward operations lose that layout, copy data shared by all rows, or both. For the
layers in `BACKWARD_OVERRIDES`, the output is therefore recomputed, with the same values, in channels-last layout and
with a backward operation that preserves it.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

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
"""A wrong axis gives an error of about a third of the norm; rounding, even in TF32, gives far less than this."""


def _far_apart(count: int, like: Tensor) -> Tensor:
    """Values in [0.5, 1.5) whose neighbors differ widely (multiples of the golden ratio, modulo 1)."""
    steps = torch.arange(1, count + 1, dtype=torch.float64)
    return (0.5 + (0.6180339887498949 * steps) % 1.0).to(like.device, like.dtype)


def mixture(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mix q quantities into one row, and choose a scale for each example.

    Args:
        rows: (q, b) quantities.

    Returns:
        The mixed row (b,) with its graph, and the scale of each example (b,).
    """
    return _far_apart(rows.shape[0], rows) @ rows, _far_apart(rows.shape[1], rows)


def scales_by_example(plain: Tensor, scaled: Tensor, scale: Tensor) -> bool | None:
    """Whether ``scaled`` equals ``plain`` with row i multiplied by ``scale[i]``; None if both are zero.

    Args:
        plain: (b, ...) gradients of the mixed row's sum.
        scaled: (b, ...) gradients of the sum of the mixed row times scale.
        scale: (b,).
    """
    expected = plain * scale.to(plain).view(-1, *[1] * (plain.ndim - 1))
    size, gap = expected.norm().item(), (scaled - expected).norm().item()
    if size == 0.0 and gap == 0.0:
        return None
    return gap <= TOLERANCE * size


def refuse_mixing(rows: Tensor, images: Tensor) -> None:
    """Raise an error if an example's quantities depend on another example's image. Keeps the graph.

    Args:
        rows: (q, b) quantities with their graph.
        images: The leaf tensor (b, ...) from which they were computed.

    Raises:
        ValueError: The quantities depend on other images.
        MeasurementError: A gradient is not finite, so the test is inconclusive.
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
            "the gradients at the first images are not finite: the images or the weights are not finite, or too large"
        )
    if scales_by_example(*found, scale) is False:
        raise ValueError(
            "per-example gradients are not defined: the model's output for one image depends on the other images "
            "in its batch, even in eval mode"
        )


def refuse_batch_statistics(model: nn.Module) -> None:
    """Raise an error if examples depend on each other through batch statistics.

    Args:
        model: The model about to run.

    Raises:
        ValueError: A BatchNorm layer is in training mode or keeps no running statistics.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            why = "is in training mode" if module.training else "keeps no running statistics"
            raise ValueError(
                f"per-example gradients need fixed statistics, but the BatchNorm {name!r} {why}: "
                "call model.eval() and build it with track_running_stats=True"
            )


BackwardOverride = Callable[[Any, Tensor, Tensor], Tensor]
"""(module, inputs, output) -> an output with the same values and a different backward operation."""


def channels_last(x: Tensor) -> Tensor:
    """Convert (b, c, h, w) to channels-last memory, with operations that support `vmap`; no copy if it already is."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class _Convolution(torch.autograd.Function):
    """Convolution whose weight and bias are inputs, so that they appear in the graph; they get no gradient."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, module: nn.Conv2d
    ) -> Tensor:
        ctx.inputs, ctx.weight = a.detach(), weight.detach().contiguous(memory_format=torch.channels_last)
        ctx.settings = module.stride, module.padding, module.dilation, module.groups
        return output.clone(memory_format=torch.channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
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
    """Apply the max-pooling backward operation row by row, into a (q, b, h, w, c) buffer."""
    q, (b, c, h, w) = len(g), a.shape
    found = g.new_empty(q, b, h, w, c).permute(0, 1, 4, 2, 3)
    for row, into in zip(g, found, strict=True):
        torch.ops.aten.max_pool2d_with_indices_backward(row, a, *settings, positions, grad_input=into)
    return (found,)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, output: Tensor, module: nn.MaxPool2d) -> Tensor:
        sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
        settings = (*(size if isinstance(size, tuple) else (size, size) for size in sizes), module.ceil_mode)
        a = a.contiguous(memory_format=torch.channels_last)
        ctx.constants = a, torch.ops.aten.max_pool2d_with_indices(a, *settings)[1], settings
        return output.clone(memory_format=torch.channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return *all_rows(_max_pool_maps, g, *ctx.constants), None, None


def max_pool(module: nn.MaxPool2d, a: Tensor, output: Tensor) -> Tensor:
    """See `BackwardOverride`."""
    if a.ndim != 4 or module.return_indices:
        return output
    return _MaxPool.apply(a, output.detach(), module)


def adaptive_average_pool(module: nn.AdaptiveAvgPool2d, a: Tensor, output: Tensor) -> Tensor:
    """See `BackwardOverride`. Covers the mean over all positions, and the identity; others are unchanged."""
    if a.ndim != 4:
        return output
    if output.shape == a.shape:
        return a.clone()
    if output.shape[2:] == (1, 1):
        return a.permute(0, 2, 3, 1).flatten(1, 2).mean(1)[:, :, None, None]
    return output


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, output: Tensor, top: int, left: int) -> Tensor:
        ctx.rows, ctx.columns = slice(top, top + a.shape[2]), slice(left, left + a.shape[3])
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
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
"""Overrides by exact module type."""

CHANNELS = 16
"""Values per vector register; channels-last is not faster for convolutions with other numbers of output channels."""

KEEPING = frozenset(
    {*BACKWARD_OVERRIDES, nn.Linear, nn.Flatten, nn.Identity, nn.Dropout, nn.ReLU, nn.ELU, nn.GELU, nn.Tanh}
)
"""Modules whose backward operation preserves the layout, or that do not operate on feature maps."""


def suits_channels_last(model: nn.Module) -> bool:
    """Whether a model runs faster with `BACKWARD_OVERRIDES`.

    This requires that it is on a CPU, the output channels of all its convolutions are multiples of 16, it uses max
    pooling (where the speedup is largest), and no layer, such as normalization, loses the layout.
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
        name: The module's name in the model.
        module: The module.
        rule: The rule that contracts its gradients.
        inputs: Its input, (b, ...).
        edge: The gradient edge of its output (or of the tensor that its rule taps instead).
        output_shape: The shape of that tensor.
        version: Version counter of ``inputs`` at the time of the call.
        gradient: (q, b, ...) gradients of q quantities at the output; None until `Capture.backward` sets it.
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
    """The module's own parameters (not its children's) that require a gradient."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}


class Capture:
    """Context manager that hooks the modules with a layer rule and records their calls while `forward` runs.

    Modules of other types, subclasses, parametrized modules and modules with other parameter names are not hooked;
    the caller must handle their parameters separately.

    Args:
        model: The model.
        rules: Layer rules by exact module type.

    Attributes:
        channels_last: Whether `BACKWARD_OVERRIDES` apply; set it before `forward`.
    """

    def __init__(self, model: nn.Module, rules: Mapping[type[nn.Module], LayerRule]) -> None:
        self.model = model
        self.records: list[Record] = []
        self.channels_last = False
        self._rules = rules
        self._recording = False
        self._vectorizes: bool | None = None  # whether one pass can carry all rows; None: unknown
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self.model.named_modules():
            rule = self._rules.get(type(module))
            own = {key for key, value in module._parameters.items() if value is not None}
            # an instance with its own forward, or with weights under other names (weight norm, pruning), does not
            # compute what its type suggests
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
        # a call without a graph (under no_grad) contributes to no parameter's gradient
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
        """Run the model and record. Recording stops before any backward pass, because checkpointing reruns modules.

        Args:
            images: (b, ...) inputs.

        Returns:
            The model's outputs, with their graph.

        Raises:
            ValueError: A BatchNorm layer would use batch statistics.
        """
        refuse_batch_statistics(self.model)
        self.records = []
        self._recording = True
        try:
            return self.model(images)
        finally:
            self._recording = False

    def backward(self, rows: Tensor, records: Sequence[Record], keep_graph: bool = False) -> list[Tensor]:
        """Compute the gradients of each row's sum at the outputs of the records.

        One pass processes all rows (`torch.func.vmap`): its layers process q times as many maps, and the batch can
        be small enough for these to stay in the CPU caches. If a model cannot be differentiated this way, each row
        gets its own pass. No parameter gradient is computed or stored.

        Args:
            rows: (q, b) quantities with their graph; column i depends only on example i.
            records: The records whose gradients to compute.
            keep_graph: Whether to keep the graph for later use.

        Returns:
            For each record, a tensor (q, *output shape).
        """
        if not records:
            return []
        if self._vectorizes is not False and rows.shape[0] > 1:
            # the first attempt may fail, and the second one needs its graph
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
    """`Capture.backward` in one pass; None if an operation in the graph cannot be vectorized."""
    edges = [record.edge for record in records]

    def pull(weights: Tensor) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(rows, edges, weights, retain_graph=keep_graph, allow_unused=True)
        return _zeros_if_none(gradients, records)

    units = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    try:
        with (
            warnings.catch_warnings()
        ):  # vmap loops over operations without a batching rule, which costs nothing here
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return list(vmap(pull)(units.unsqueeze(2).expand(-1, -1, rows.shape[1])))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # Operations that cannot be vectorized raise RuntimeError. Row by row gives the same gradients, or raises the
        # error again if it came from the model. Without a graph, no second attempt is possible: report the error.
        if not keep_graph:
            raise
        log.info("gradients cannot be vectorized over classes; computing one class at a time: %.160s", error)
        return None


def _row_by_row(rows: Tensor, records: Sequence[Record], keep_graph: bool) -> list[Tensor]:
    """`Capture.backward` with one pass per row."""
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
    """Walk the autograd graph below the rows.

    Args:
        rows: Any tensor with a graph.

    Returns:
        How often each parameter enters the graph, by ``id``, and all nodes of the graph. A captured module uses each
        of its parameters once per call; any additional use was not seen by a hook.
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
