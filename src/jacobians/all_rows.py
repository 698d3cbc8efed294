"""One operation of ours for all rows at once, within a way back that `torch.func.vmap` runs."""

from collections.abc import Callable

import torch
from torch import Tensor

Maps = Callable[..., tuple[Tensor, ...]]
"""(g, *constants) -> gradients, where g and they are (q, b, ...) and the constants, tensors or not, have no rows."""


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(maps: Maps, g: Tensor, *constants: object) -> tuple[Tensor, ...]:
        return tuple(found[0] for found in maps(g.unsqueeze(0), *constants))

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        pass  # a second derivative is never asked for

    @staticmethod
    def vmap(info, in_dims: tuple, maps: Maps, g: Tensor, *constants: object) -> tuple[tuple, tuple]:
        found = maps(g.movedim(in_dims[1], 0), *constants)
        return found, (0,) * len(found)


def all_rows(maps: Maps, g: Tensor, *constants: object) -> tuple[Tensor, ...]:
    """Apply ``maps`` to all rows that `vmap` carries along, (q, b, ...), or to the one there is, (1, b, ...).

    The batching rules of many operations copy once for each row what is the same for all, or lose the layout.

    Args:
        maps: see `Maps`.
        g: (b, ...) gradients, as a `torch.autograd.Function` is given them.
        constants: the same for all rows.

    Returns:
        What ``maps`` returns, without the axis of rows.
    """
    return _AllRows.apply(maps, g, *constants)
