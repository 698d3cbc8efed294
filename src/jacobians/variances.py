"""Variances of a model's outputs under a Gaussian posterior over its parameters: ``J S J^T`` for each example.

The linearized predictive covariance of the Memory-Perturbation Equation (Nickl et al. 2023, Eq. 12 and 13), layer by
layer: the posterior's block of a parameter (`src.jacobians.posterior`) is contracted with the layer's inputs and
output gradients (`src.jacobians.layer_rules`), and no Jacobian of the batch ever exists.
"""

from typing import Self

import torch
from torch import Tensor, nn

from src.jacobians.capture import Record, suits_channels_last
from src.jacobians.engine import PerExampleEngine
from src.jacobians.layer_rules import outer_gradients
from src.jacobians.posterior import Posterior, Rotated

TILE = 2**20
"""Bytes of the largest piece of a G that is formed before it is squared and summed: half of a usual L2 cache."""


def _contracted(jacobian: Tensor, variances: Tensor, full: bool, overwrite: bool = False) -> Tensor:
    """Diagonal S: jacobian (b, q, p), variances (p,) or (b, p)."""
    if full:
        return (jacobian * variances.unsqueeze(-2)) @ jacobian.mT
    squares = jacobian.square_() if overwrite else jacobian.square()
    return (squares @ variances.unsqueeze(-1)).squeeze(-1)


def gradient_covariance(gradients: Tensor, block: Rotated, full: bool) -> Tensor:
    """``J S J^T`` from gradients that exist in full.

    Args:
        gradients: (q, b, *shape).
        block: covariance of the parameter.
        full: all pairs of quantities, or only the diagonal.
    """
    jacobian = gradients.transpose(0, 1)  # (b, q, *shape)
    variances, outputs, inputs = block.variances, block.outputs, block.inputs
    if outputs is not None:
        jacobian = jacobian.reshape(*jacobian.shape[:2], *variances.shape)
        jacobian = torch.einsum("bqno...,noj->bqnj...", jacobian, outputs)
    if inputs is not None:
        jacobian = torch.einsum("bqnok,nkj->bqnoj", jacobian, inputs)
    return _contracted(jacobian.reshape(*jacobian.shape[:2], -1), variances.flatten(), full)


def outer_covariance(a: Tensor, g: Tensor, weight: Rotated | None, bias: Rotated | None, full: bool) -> Tensor:
    """``J S J^T`` of a weight with gradient ``sum_t g_t a_t^T`` and of its bias with gradient ``sum_t g_t``.

    Args:
        a: (b, n, k, t).
        g: (q, b, n, o, t).
        weight: covariance of the weight, None where it does not count.
        bias: the same for the bias.
        full: all pairs of quantities, or only the diagonal.
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
    """No outer product: ``T_o = sum_k S_ok a_k^2`` serves all quantities, then ``sum_o g_o T_o g'_o``.

    Here a is (b, n, k) and g (b, q, n, o); the rest as in `outer_covariance`.
    """
    b, q, n, o = g.shape
    basis, inputs = weight.outputs, weight.inputs
    if inputs is not None:
        a = torch.einsum("bnk,nkj->bnj", a, inputs)
    scales = torch.einsum("bnk,nok->bno", a.square(), weight.variances.view(n, o, -1))
    rest = 0.0
    if bias is not None:
        if bias.outputs is basis:
            scales = scales + bias.variances.view(n, o)  # an input that is always 1
        else:
            rest = gradient_covariance(g.transpose(0, 1), bias, full)
    if basis is not None:
        g = torch.einsum("bqno,noj->bqnj", g, basis)
    return rest + _contracted(g.reshape(b, q, n * o), scales.reshape(b, n * o), full)


def _many_positions(a: Tensor, g: Tensor, weight: Rotated, full: bool) -> Tensor:
    """Form ``G = sum_t g_t a_t^T`` and contract it; rotate before or after, whichever is less work."""
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
    return _contracted(jacobian, variances.flatten(), full, overwrite=True)


def entrywise_variances(rows: Tensor, g: Tensor, variances: Tensor) -> Tensor:
    """The diagonal for a weight with variances of its own for each entry, in pieces that stay in a processor's cache.

    The same as `outer_covariance`, but for the order of the sums and for a product per example and group in place of
    one for all: faster where these are large, on a processor.

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
"""Multiplications in one example's products from which on `entrywise_variances` is the faster way."""


def logit_rows(outputs: Tensor, _: Tensor) -> Tensor:
    """The logits as quantities to differentiate.

    Args:
        outputs: (b, C).

    Returns:
        (C, b).

    Raises:
        ValueError: the outputs are not (b, C).
    """
    if outputs.ndim != 2:
        raise ValueError(f"the model must return logits of shape (batch, classes), got {tuple(outputs.shape)}")
    return outputs.T


class OutputVariances(PerExampleEngine):
    """Context manager that computes logits and their variances, one pass over each batch.

    See `PerExampleEngine` for what it does to the model. The gradients of all C logits at the modules' outputs and
    the per-example products made of them are the memory it needs; batches are cut so that both stay within
    ``memory_mb`` each, plus a copy or two of the larger.

    Args:
        model: the model; its outputs are logits (b, C).
        posterior: a covariance for each trainable parameter.
        full: the (C, C) covariance of each example instead of its diagonal.
        memory_mb: see above.

    Raises:
        ValueError: on entering, if model and posterior do not fit each other.
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
        self._ordered: dict[str, Tensor] = {}  # variances of weights in the order of `Outer.rows`
        rotated = any(block.outputs is not None for block in self._blocks.values())
        if not rotated and not self._full and suits_channels_last(self.model):
            self._capture.channels_last = True
            self._room = 1.25  # nothing is copied; maps in between may be larger
        return super().__enter__()

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and variances of one batch.

        Args:
            images: (b, ...) inputs.

        Returns:
            (b, C) logits without their graph, and float64 variances (b, C), or covariances (b, C, C) where ``full``.

        Raises:
            ValueError: the outputs are not (b, C), a BatchNorm would use statistics of the batch, or the model mixes
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
        """Whether `entrywise_variances` can be used and is worth its calls."""
        if self._full or g.device.type != "cpu" or g.shape[-1] == 1 or "weight" not in blocks:
            return False
        if any(block.outputs is not None for block in blocks.values()):
            return False
        products = g[:, 0, 0].numel() * blocks["weight"].variances.numel() // (g.shape[2] * g.shape[3])
        return products >= WORTH_A_CALL

    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """See `PerExampleEngine`."""
        self._variances[part] += gradient_covariance(gradients, self._blocks[name], self._full)
