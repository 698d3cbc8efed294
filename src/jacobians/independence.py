"""Do the examples of a batch leave each other alone? Tried on gradients, not guessed from shapes.

Scale each example's quantity by a number of its own: a gradient whose first axis counts independent examples
scales row by row, any other does not.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from src.errors import MeasurementError

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
        model: the network about to be run.

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
