"""BatchNorm during the second pass of SAM."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_batchnorm(model: nn.Module) -> Iterator[None]:
    """Keep running statistics as they are while the block runs; what the layers compute stays the same.

    A layer in training mode still normalises by the statistics of its batch, one in evaluation mode by the running
    ones. With tracking off a layer writes none of its buffers, so its momentum needs no change (setting it to 0 would
    still count the batch, and be wrong for ``momentum=None``, the cumulative average). Contexts may be nested, and an
    exception leaves the layers as they were.

    Args:
        model: Any module; all its BatchNorm layers (1d to 3d, synchronised, lazy) are held.

    Yields:
        Nothing.
    """
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    try:
        for layer in tracking:
            layer.track_running_stats = False
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True
