"""``J S J^T`` of one parameter or module, for posterior blocks S (`src.jacobians.posterior`).

Letters as in `src.jacobians.contract`: q quantities (the logits), b examples, n groups, o outputs, k inputs, t
positions. Every function returns the diagonal over quantities (b, q), or with ``full`` all of it (b, q, q).

A rotated block needs no other formulas: ``a`` and ``g``, or their product, are rotated into its basis, where it is
diagonal.
"""

import torch
from torch import Tensor

from src.jacobians.contract import outer_gradients
from src.jacobians.posterior import Block, Rotated

TILE = 2**20
"""Bytes of the largest piece of a G that is formed before it is squared and summed: half of a usual L2 cache."""


def _parts(block: Block) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Variances, and the bases of outputs and inputs in which they hold (None: as they are)."""
    return (block.variances, block.outputs, block.inputs) if isinstance(block, Rotated) else (block, None, None)


def _contracted(jacobian: Tensor, variances: Tensor, full: bool, overwrite: bool = False) -> Tensor:
    """Diagonal S: jacobian (b, q, p), variances (p,) or (b, p)."""
    if full:
        return (jacobian * variances.unsqueeze(-2)) @ jacobian.mT
    squares = jacobian.square_() if overwrite else jacobian.square()
    return (squares @ variances.unsqueeze(-1)).squeeze(-1)


def gradient_covariance(gradients: Tensor, block: Block, full: bool) -> Tensor:
    """``J S J^T`` from gradients that exist in full.

    Args:
        gradients: (q, b, *shape).
        block: covariance of the parameter.
        full: all pairs of quantities, or only the diagonal.
    """
    jacobian = gradients.transpose(0, 1)  # (b, q, *shape)
    variances, outputs, inputs = _parts(block)
    if outputs is not None:
        jacobian = jacobian.reshape(*jacobian.shape[:2], *variances.shape)
        jacobian = torch.einsum("bqno...,noj->bqnj...", jacobian, outputs)
    if inputs is not None:
        jacobian = torch.einsum("bqnok,nkj->bqnoj", jacobian, inputs)
    return _contracted(jacobian.reshape(*jacobian.shape[:2], -1), variances.flatten(), full)


def outer_covariance(a: Tensor, g: Tensor, weight: Block | None, bias: Block | None, full: bool) -> Tensor:
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
        found.append(gradient_covariance(g.sum(-1), _by_group(bias, *g.shape[2:4]), full))
    if weight is not None:
        found.append(_many_positions(a, g, weight, full))
    return sum(found)


def _by_group(bias: Block, n: int, o: int) -> Block:
    """Variances of a bias (n * o,) as (n, o)."""
    return bias if isinstance(bias, Rotated) else bias.view(n, o)


def _one_position(a: Tensor, g: Tensor, weight: Block, bias: Block | None, full: bool) -> Tensor:
    """No outer product: ``T_o = sum_k S_ok a_k^2`` serves all quantities, then ``sum_o g_o T_o g'_o``.

    Here a is (b, n, k) and g (b, q, n, o); the rest as in `outer_covariance`.
    """
    b, q, n, o = g.shape
    variances, basis, inputs = _parts(weight)
    if inputs is not None:
        a = torch.einsum("bnk,nkj->bnj", a, inputs)
    scales = torch.einsum("bnk,nok->bno", a.square(), variances.view(n, o, -1))
    rest = 0.0
    if bias is not None:
        of_bias, basis_of_bias, _ = _parts(bias)
        if basis_of_bias is basis:
            scales = scales + of_bias.view(n, o)  # an input that is always 1
        else:
            rest = gradient_covariance(g.transpose(0, 1), _by_group(bias, n, o), full)
    if basis is not None:
        g = torch.einsum("bqno,noj->bqnj", g, basis)
    return rest + _contracted(g.reshape(b, q, n * o), scales.reshape(b, n * o), full)


def _many_positions(a: Tensor, g: Tensor, weight: Block, full: bool) -> Tensor:
    """Form ``G = sum_t g_t a_t^T`` and contract it; rotate before or after, whichever is less work."""
    q, b, n, o, t = g.shape
    k = a.shape[2]
    variances, outputs, inputs = _parts(weight)
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
