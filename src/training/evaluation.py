"""Predictions and mean loss of a trained network, un-augmented and in eval mode."""

from collections.abc import Iterator

import torch
from torch import nn

from src.datasets import Batch, Batches
from src.devices import PRECISIONS, autocast_context
from src.models.base import eval_mode
from src.training.distributed import ProcessGroup


def logits_of(forward: nn.Module, images: torch.Tensor, precision: str = "fp32") -> torch.Tensor:
    """The logits ``(b, C)`` of a network in eval mode, in float32 (float64 under fp64), for no gradient.

    Args:
        forward: The network, or its compiled form.
        images: ``(b, c, h, w)``, on its device.
        precision: A name of ``PRECISIONS``.
    """
    chosen = PRECISIONS[precision]
    with torch.inference_mode(), autocast_context(images.device, chosen):
        return forward(images).to(chosen.dtype)


def predictions(
    model: nn.Module, batches: Batches, *, precision: str = "fp32", forward: nn.Module | None = None
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Yield each batch with its logits.

    Args:
        model: The network; run in eval mode, left as it was.
        batches: Un-augmented batches on the model's device.
        precision: A name of ``PRECISIONS``.
        forward: What is called in place of ``model``, for example its compiled form.

    Yields:
        The batch and its logits ``(b, C)``, in float32 (float64 under fp64).
    """
    with eval_mode(model):
        for batch in batches:
            yield batch, logits_of(model if forward is None else forward, batch.images, precision)


def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    precision: str = "fp32",
    forward: nn.Module | None = None,
    group: ProcessGroup | None = None,
    loss_cap: float | None = None,
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over a set.

    Args:
        model: The network.
        batches: Un-augmented batches; each process of ``group`` sees its share.
        precision: A name of ``PRECISIONS``.
        forward: See ``predictions``.
        group: The processes that share the set.
        loss_cap: The most that one example may add to the loss, in nats; default no limit.

    Returns:
        Mean loss (nats per example) and accuracy in [0, 1].
    """
    totals: torch.Tensor | None = None
    for batch, logits in predictions(model, batches, precision=precision, forward=forward):
        losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        loss = (losses if loss_cap is None else losses.clamp(max=loss_cap)).sum().double()
        correct = (logits.argmax(dim=1) == batch.labels).sum()
        part = torch.stack([loss, correct.double(), torch.full_like(loss, len(batch.labels))])
        totals = part if totals is None else totals + part
    (group or ProcessGroup()).sum_([totals])
    loss, correct, count = totals.tolist()
    return loss / count, correct / count
