"""Variances of a model's outputs under a Gaussian posterior over its parameters: ``J S J^T`` for each example.

This is the linearized predictive covariance of the Memory-Perturbation Equation (Nickl et al. 2023, Eq. 12 and 13),
computed layer by layer. Each parameter's posterior block (`src.jacobians.posterior`) is contracted with the layer's
inputs and output gradients (`src.jacobians.layer_rules`), and the Jacobian of the batch is never formed.
"""

from typing import Self

import torch
from torch import Tensor, nn

from src.jacobians.capture import Record, suits_channels_last
from src.jacobians.engine import PerExampleEngine
from src.jacobians.layer_rules import outer_gradients
from src.jacobians.posterior import Posterior, Rotated

TILE = 2**20
"""Maximum bytes of a tile of G that is formed, squared and summed at once: half of a typical L2 cache."""


def contracted(jacobian: Tensor, variances: Tensor, full: bool, overwrite: bool = False) -> Tensor:
    """Contract with a diagonal S: jacobian (b, q, p), variances (p,) or (b, p)."""
    if full:
        return (jacobian * variances.unsqueeze(-2)) @ jacobian.mT
    squares = jacobian.square_() if overwrite else jacobian.square()
    return (squares @ variances.unsqueeze(-1)).squeeze(-1)


def gradient_covariance(gradients: Tensor, block: Rotated, full: bool) -> Tensor:
    """``J S J^T`` from gradients in full.

    Args:
        gradients: (q, b, *shape).
        block: Covariance of the parameter.
        full: Whether to compute all pairs of quantities instead of the diagonal.
    """
    jacobian = gradients.transpose(0, 1)  # (b, q, *shape)
    variances, outputs, inputs = block.variances, block.outputs, block.inputs
    if outputs is not None:
        jacobian = jacobian.reshape(*jacobian.shape[:2], *variances.shape)
        jacobian = torch.einsum("bqno...,noj->bqnj...", jacobian, outputs)
    if inputs is not None:
        jacobian = torch.einsum("bqnok,nkj->bqnoj", jacobian, inputs)
    return contracted(jacobian.reshape(*jacobian.shape[:2], -1), variances.flatten(), full)


def outer_covariance(a: Tensor, g: Tensor, weight: Rotated | None, bias: Rotated | None, full: bool) -> Tensor:
    """``J S J^T`` of a weight with gradient ``sum_t g_t a_t^T`` and of its bias with gradient ``sum_t g_t``.

    Args:
        a: (b, n, k, t).
        g: (q, b, n, o, t).
        weight: Covariance of the weight; None to leave it out.
        bias: Covariance of the bias; None to leave it out.
        full: Whether to compute all pairs of quantities instead of the diagonal.
    """
    if g.shape[-1] == 1 and weight is not None:
        return _one_position(a[..., 0], g[..., 0].transpose(0, 1), weight, bias, full)
    found = []
    if bias is not None:
        found.append(gradient_covariance(g.sum(-1), bias, full))
    if weight is not None:
        found.append(_many_positions(a, g, weight, full))
    return sum(found)


def _one_position(a: Tensor, g: Tensor, weight: Rotated, bias: Rotated | None, full: bool) -> Tensor:
    """Avoid the outer product: ``T_o = sum_k S_ok a_k^2`` is shared by all quantities, then ``sum_o g_o T_o g'_o``.

    Here a is (b, n, k) and g is (b, q, n, o); the other arguments are those of `outer_covariance`.
    """
    b, q, n, o = g.shape
    basis, inputs = weight.outputs, weight.inputs
    if inputs is not None:
        a = torch.einsum("bnk,nkj->bnj", a, inputs)
    scales = torch.einsum("bnk,nok->bno", a.square(), weight.variances.view(n, o, -1))
    rest = 0.0
    if bias is not None:
        if bias.outputs is basis:
            scales = scales + bias.variances.view(n, o)  # like an input that is always 1
        else:
            rest = gradient_covariance(g.transpose(0, 1), bias, full)
    if basis is not None:
        g = torch.einsum("bqno,noj->bqnj", g, basis)
    return rest + contracted(g.reshape(b, q, n * o), scales.reshape(b, n * o), full)


def _many_positions(a: Tensor, g: Tensor, weight: Rotated, full: bool) -> Tensor:
    """Form ``G = sum_t g_t a_t^T`` and contract it; rotate before or after, whichever is cheaper."""
    q, b, n, o, t = g.shape
    k = a.shape[2]
    variances, outputs, inputs = weight.variances, weight.outputs, weight.inputs
    if inputs is not None and t < q * o:
        a, inputs = torch.einsum("nkj,bnkt->bnjt", inputs, a), None
    if outputs is not None and t < k:
        g, outputs = torch.einsum("noj,qbnot->qbnjt", outputs, g), None
    jacobian = outer_gradients(a, g)  # (b, n, q, o, k)
    if outputs is not None:
        jacobian = torch.einsum("bnqok,noj->bnqjk", jacobian, outputs)
    if inputs is not None:
        jacobian = torch.einsum("bnqok,nkj->bnqoj", jacobian, inputs)
    jacobian = jacobian.transpose(1, 2).reshape(b, q, n * o * k)
    return contracted(jacobian, variances.flatten(), full, overwrite=True)


def entrywise_variances(rows: Tensor, g: Tensor, variances: Tensor) -> Tensor:
    """The diagonal for a weight with independent variances per entry, in tiles that stay in the CPU cache.

    Equivalent to `outer_covariance`, except for the order of summation, and with one product per example and group
    instead of one for all. This is faster on a CPU if the products are large.

    Args:
        rows: (b, n, t, k).
        g: (q, b, n, o, t).
        variances: (n, o, k).

    Returns:
        (b, q).
    """
    q, b, n, o, _ = g.shape
    k = rows.shape[-1]
    step = max(1, min(q, TILE // (o * k * g.element_size())))
    tile = g.new_empty(step, o, k)
    found = g.new_zeros(b, q)
    for i in range(b):
        for group in range(n):
            for start in range(0, q, step):
                part = g[start : start + step, i, group]  # (step, o, t)
                product = tile[: len(part)]
                torch.bmm(part, rows[i, group].expand(len(part), -1, -1), out=product)
                found[i, start : start + step] += product.square_().flatten(1) @ variances[group].flatten()
    return found


WORTH_A_CALL = 2**22
"""Minimum multiplications per example for which `entrywise_variances` is faster."""


def logit_rows(outputs: Tensor, _: Tensor) -> Tensor:
    """The logits as quantities to differentiate.

    Args:
        outputs: (b, C).

    Returns:
        (C, b).

    Raises:
        ValueError: The outputs are not (b, C).
    """
    if outputs.ndim != 2:
        raise ValueError(f"the model must return logits of shape (batch, classes), got {tuple(outputs.shape)}")
    return outputs.T


class OutputVariances(PerExampleEngine):
    """Context manager that computes logits and their variances in one pass over each batch.

    See `PerExampleEngine` for its effect on the model. It needs memory for the gradients of all C logits at the
    modules' outputs and for the per-example products made from them. Batches are split to keep each of the two within
    ``memory_mb``, plus a copy or two of the larger one.

    Args:
        model: The model; its outputs are logits (b, C).
        posterior: A covariance for each trainable parameter.
        full: Whether to compute the (C, C) covariance of each example instead of its diagonal.
        memory_mb: Memory limit in MiB; see above.

    Raises:
        ValueError: On entry, if model and posterior do not match.
    """

    def __init__(
        self, model: nn.Module, posterior: Posterior, *, full: bool = False, memory_mb: float = 128.0
    ) -> None:
        super().__init__(model, memory_mb)
        self._posterior = posterior
        self._full = full

    def __enter__(self) -> Self:
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._blocks = self._posterior.fitted_to(trainable) if trainable else {}
        self._ordered: dict[str, Tensor] = {}  # weight variances in the order of `Outer.rows`
        rotated = any(block.outputs is not None for block in self._blocks.values())
        if not rotated and not self._full and suits_channels_last(self.model):
            self._capture.channels_last = True
            self._room = 1.25  # no copies, but intermediate maps may be larger
        return super().__enter__()

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits and variances of one batch.

        Args:
            images: (b, ...) inputs.

        Returns:
            (b, C) logits without their graph, and float64 variances (b, C), or covariances (b, C, C) with ``full``.

        Raises:
            ValueError: The outputs are not (b, C), a BatchNorm layer would use batch statistics, or the model mixes
                the examples of a batch.
        """
        logits, variances = [], []
        for part in self.sub_batches(images):
            nothing = images.new_empty(part.stop - part.start)
            logits.append(self.run(images[part], nothing, logit_rows))
            variances.append(self._variances)
        return torch.cat(logits), torch.cat(variances)

    def begin(self, rows: Tensor) -> None:
        """See `PerExampleEngine`."""
        q, b = rows.shape
        shape = (b, q, q) if self._full else (b, q)
        self._variances = torch.zeros(shape, dtype=torch.float64, device=rows.device)

    def take_outer(self, record: Record, names: dict[str, str], g: Tensor, part: slice) -> None:
        """See `PerExampleEngine`."""
        outer, module, a = record.rule.outer, record.module, record.inputs[part]
        blocks = {local: self._blocks[name] for local, name in names.items()}
        weight, bias = blocks.get("weight"), blocks.get("bias")
        if self._tiles(g, blocks):
            name = names["weight"]
            if name not in self._ordered:
                self._ordered[name] = outer.in_row_order(module, weight.variances).contiguous()
            found = entrywise_variances(outer.rows(module, a), g, self._ordered[name])
            if bias is not None:
                found += gradient_covariance(g.sum(-1).flatten(2), bias, full=False)
        else:
            found = outer_covariance(outer.inputs(module, a), g, weight, bias, self._full)
        self._variances[part] += found

    def _tiles(self, g: Tensor, blocks: dict[str, Rotated]) -> bool:
        """Whether `entrywise_variances` applies and is large enough to be faster."""
        if self._full or g.device.type != "cpu" or g.shape[-1] == 1 or "weight" not in blocks:
            return False
        if any(block.outputs is not None for block in blocks.values()):
            return False
        products = g[:, 0, 0].numel() * blocks["weight"].variances.numel() // (g.shape[2] * g.shape[3])
        return products >= WORTH_A_CALL

    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """See `PerExampleEngine`."""
        self._variances[part] += gradient_covariance(gradients, self._blocks[name], self._full)
