"""Ways back through maps that lie channels last, for all rows in one operation each.

On a processor, convolutions and pooling are fastest when the channels of a position lie side by side in memory, but
under `torch.func.vmap` the operations behind autograd's own ways back lose that layout, copy what is the same for all
rows, or both. Here a module's output is given anew, with the same values: in that layout, and with a way back that
keeps it. Other modules, and operations without a module (activations, sums), go on as they are: the layout changes no
value.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from src.jacobians.all_rows import all_rows
from src.models.same_padding import SamePad, same_padding

Passage = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(module, inputs, output) -> the output to go on with."""


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
    """See `Passage`."""
    if a.ndim != 4 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return output
    return _Convolution.apply(a, module.weight, module.bias, output.detach(), module)


def _max_pool_maps(g: Tensor, a: Tensor, places: Tensor, settings: tuple) -> tuple[Tensor]:
    """Row by row, into (q, b, h, w, c)."""
    q, (b, c, h, w) = len(g), a.shape
    found = g.new_empty(q, b, h, w, c).permute(0, 1, 4, 2, 3)
    for row, into in zip(g, found, strict=True):
        torch.ops.aten.max_pool2d_with_indices_backward(row, a, *settings, places, grad_input=into)
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
    """See `Passage`."""
    if a.ndim != 4 or module.return_indices:
        return output
    return _MaxPool.apply(a, output.detach(), module)


def adaptive_average_pool(module: nn.AdaptiveAvgPool2d, a: Tensor, output: Tensor) -> Tensor:
    """See `Passage`: a mean over all positions, or over one each, which is nothing."""
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
    """See `Passage`: the way back is a view."""
    (top, _), (left, _) = (same_padding(size, module.kernel, module.stride) for size in a.shape[2:])
    return _Pad.apply(a, output.detach(), top, left)


PASSAGES: dict[type[nn.Module], Passage] = {
    nn.Conv2d: convolution,
    nn.MaxPool2d: max_pool,
    nn.AdaptiveAvgPool2d: adaptive_average_pool,
    SamePad: same_pad,
}
"""By exact module type."""

CHANNELS = 16
"""Numbers in a vector register; convolutions that give other numbers of maps are no faster in this layout."""

KEEPING = frozenset({*PASSAGES, nn.Linear, nn.Flatten, nn.Identity, nn.Dropout, nn.ReLU, nn.ELU, nn.GELU, nn.Tanh})
"""Modules whose way back keeps the layout, or that do not see maps."""


def suits(model: nn.Module) -> bool:
    """Whether a network gains from these ways.

    It is on a processor, its convolutions give multiples of 16 maps each, it takes maxima over maps (where the gain
    is largest), and it has no layer that loses the layout again, as normalisation does.
    """
    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    return (
        {nn.Conv2d, nn.MaxPool2d} <= {type(module) for module in leaves} <= KEEPING
        and all(m.out_channels % CHANNELS == 0 for m in leaves if isinstance(m, nn.Conv2d))
        and all(p.device.type == "cpu" for p in model.parameters())
    )
