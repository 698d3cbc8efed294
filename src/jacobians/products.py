"""Covariances between the gradients of two sets of examples under a Gaussian posterior: ``G S H^T``.

The gradients of one set (G, at most a few hundred rows) are formed in full and multiplied by S once. Those of the
other set are contracted with the result batch by batch and layer by layer, and never kept.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from src.jacobians.capture import Record
from src.jacobians.engine import PerExampleEngine, Quantities
from src.jacobians.posterior import Posterior, Rotated


class InFull(PerExampleEngine):
    """Hands out the gradients of every parameter in full."""

    def take_captured(self, record: Record, names: dict[str, str], part: slice) -> None:
        """See `PerExampleEngine`."""
        gradients = record.rule.gradients(record.module, record.inputs[part], record.gradient[:, part], list(names))
        for local, found in gradients.items():
            self.take_gradients(names[local], found, part)


class _Rows(InFull):
    """Keeps the gradients of one quantity per example: parameter name -> (b, p)."""

    def begin(self, rows: Tensor) -> None:
        """See `PerExampleEngine`."""
        self.kept = {name: rows.new_zeros(rows.shape[1], p.numel()) for name, p in self._parameters.items()}

    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """See `PerExampleEngine`."""
        self.kept[name][part] = gradients[0].reshape(gradients.shape[1], -1)


class _Products(InFull):
    """Contracts the gradients of one quantity per example with given directions.

    Args:
        model: See `PerExampleEngine`.
        memory_mb: See `PerExampleEngine`.
        directions: Parameter name -> (m, p).
    """

    def __init__(self, model: nn.Module, memory_mb: float, directions: dict[str, Tensor]) -> None:
        super().__init__(model, memory_mb)
        self._directions = directions

    def begin(self, rows: Tensor) -> None:
        """See `PerExampleEngine`."""
        count = len(next(iter(self._directions.values())))
        self.found = torch.zeros(count, rows.shape[1], dtype=torch.float64, device=rows.device)

    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """See `PerExampleEngine`."""
        self.found[:, part] += self._directions[name] @ gradients[0].reshape(gradients.shape[1], -1).mT


def _times_covariance(rows: Tensor, block: Rotated) -> Tensor:
    """Multiply rows (b, p) of one parameter's gradients by its covariance."""
    variances, outputs, inputs = block.variances, block.outputs, block.inputs
    x = rows.view(-1, *variances.shape) if outputs is not None or inputs is not None else rows
    if outputs is not None:
        x = torch.einsum("bno...,noj->bnj...", x, outputs)
    if inputs is not None:
        x = torch.einsum("bnok,nkj->bnoj", x, inputs)
    x = x * (variances if x.ndim > 2 else variances.flatten())
    if inputs is not None:
        x = torch.einsum("bnoj,nkj->bnok", x, inputs)
    if outputs is not None:
        x = torch.einsum("bnj...,noj->bno...", x, outputs)
    return x.reshape(len(rows), -1)


def gradient_covariances(
    model: nn.Module,
    posterior: Posterior,
    first: tuple[Iterable[Sequence[Tensor]], Quantities],
    second: tuple[Iterable[Sequence[Tensor]], Quantities],
    *,
    memory_mb: float = 256.0,
) -> Tensor:
    """Compute ``grad q1(x_i)^T S grad q2(x_j)`` for all examples i of one set and j of another.

    Needs memory for the gradients of the first set in full, twice.

    Args:
        model: The model, with outputs (b, C); unchanged.
        posterior: A covariance S for each trainable parameter.
        first: Batches ``(images, labels, ...)`` of m examples, and the quantity q1: (outputs, labels) -> (b,).
        second: The same for n examples and q2.
        memory_mb: Memory limit of temporary per-example gradients, in MiB.

    Returns:
        float64 (m, n), on the CPU.

    Raises:
        ValueError: Model and posterior do not match, a BatchNorm layer would use batch statistics, or the model mixes
            the examples of a batch.
    """
    blocks = posterior.fitted_to({name: p for name, p in model.named_parameters() if p.requires_grad})
    batches, quantity = first
    parts = []
    with _Rows(model, memory_mb) as engine:
        for images, labels, *_ in batches:
            engine.run(images, labels, quantity)
            parts.append({name: _times_covariance(rows, blocks[name]) for name, rows in engine.kept.items()})
    directions = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    del parts
    batches, quantity = second
    columns = []
    with _Products(model, memory_mb, directions) as engine:
        for images, labels, *_ in batches:
            engine.run(images, labels, quantity)
            columns.append(engine.found.cpu())
    return torch.cat(columns, dim=1)
