"""Normalisation layers: BatchNorm with fixed statistics, LayerNorm, filter response normalisation.

Their parameters are few, one or two numbers per channel, so their per-example gradients are formed in full.
Letters as in `src.jacobians.contract`: a (b, ...) inputs, g (q, b, ...) gradients at the output.
"""

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from src.jacobians.all_rows import all_rows
from src.jacobians.contract import Kind, Weights, weighted_squares
from src.models.frn import FilterResponseNorm

Gradients = Callable[[nn.Module, Tensor, Tensor, Collection[str]], dict[str, Tensor]]


def plain_kind(
    parameters: Collection[str], gradients: Gradients, fits: Callable[[nn.Module, Tensor], bool] | None = None
) -> Kind:
    """A kind from nothing but its gradients, for modules whose parameters are few.

    Args:
        parameters: names of all parameters that the module may have.
        gradients: (module, a, g, names) -> per name (q, b, *shape of the parameter).
        fits: (module, a) -> whether ``gradients`` covers inputs of this shape; default always.
    """

    def squares(module: nn.Module, a: Tensor, g: Tensor, weights: Weights) -> Tensor:
        found = gradients(module, a, g, list(weights))
        return sum(weighted_squares(found[name], weights[name]) for name in weights)

    return Kind(frozenset(parameters), fits or (lambda module, a: True), squares, gradients, _bytes_per_example)


def _bytes_per_example(module: nn.Module, a: Tensor, g: Tensor) -> int:
    return a.element_size() * (2 + g.shape[0]) * a[0].numel()


def _over_positions(products: Tensor) -> Tensor:
    """(q, b, c, ...) summed over all axes behind the channels: (q, b, c)."""
    return products.reshape(*products.shape[:3], -1).sum(-1)


def batchnorm_gradients(module: nn.BatchNorm2d, a: Tensor, g: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """Scale: ``sum_t g * xhat``, shift: ``sum_t g``, with xhat from the running statistics; each (q, b, c)."""
    found = {}
    if "weight" in names:
        shape = (1, -1) + (1,) * (a.ndim - 2)
        deviation = (module.running_var + module.eps).sqrt().view(shape)
        found["weight"] = _over_positions(g * ((a - module.running_mean.view(shape)) / deviation))
    if "bias" in names:
        found["bias"] = _over_positions(g)
    return found


def layernorm_gradients(module: nn.LayerNorm, a: Tensor, g: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """Scale: ``sum_t g * xhat``, shift: ``sum_t g``, over the positions t in front of the normalised axes."""
    shape = tuple(module.normalized_shape)

    def over_positions(products: Tensor) -> Tensor:
        return products.reshape(*products.shape[:2], -1, *shape).sum(2)

    found = {}
    if "weight" in names:
        found["weight"] = over_positions(g * F.layer_norm(a, shape, eps=module.eps))
    if "bias" in names:
        found["bias"] = over_positions(g)
    return found


def _filter_response_maps(g: Tensor, xhat: Tensor, mask: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What comes back from the output of filter response normalisation, in few passes over the maps.

    With ``z = max(gamma * xhat + beta, tau)``, ``xhat = x * r``, ``r = 1 / sqrt(mean x^2 + eps)`` and the mask m of
    the maximum (1 where the first is the larger, 1/2 where both are equal, as autograd has it):
    ``sum_t g m xhat`` for gamma, ``sum_t g m`` for beta, ``sum_t g (1 - m)`` for tau, and
    ``gamma * r * (g m - xhat * mean(g m xhat))`` for x.

    Source: Singh and Krishnan 2020, "Filter Response Normalization Layer", Eqs. 1-3.

    Args:
        g: (q, b, c, h, w).
        xhat: (b, c, h, w).
        mask: (b, c, h, w).
        scale: (b, c, 1, 1), ``gamma * r``.

    Returns:
        (q, b, c, h, w) for x, and (q, b, 3, c) for gamma, beta and tau.
    """
    factors = torch.stack([mask * xhat, mask, 1 - mask], dim=2).flatten(3)  # (b, c, 3, t)
    sums = (factors @ g.flatten(3).permute(1, 2, 3, 0)).permute(3, 0, 2, 1)  # (q, b, 3, c)
    means = (sums[:, :, 0] / factors.shape[-1])[..., None, None] * scale
    return (g * (mask * scale)).addcmul_(xhat, means, value=-1), sums


class _FilterResponse(torch.autograd.Function):
    """Filter response normalisation with a short way back: autograd's own takes some fifteen passes over the maps.

    The parameters come as (b, 3, c), a copy for each example, so their gradients are per example. The tensors that
    the way back needs are its own: what becomes of x afterwards does not matter.
    """

    @staticmethod
    def forward(ctx, a: Tensor, parameters: Tensor, output: Tensor, eps: float) -> Tensor:
        gamma, beta, tau = parameters[..., None, None].unbind(1)  # (b, c, 1, 1)
        inverse = (a.square().mean((2, 3), keepdim=True) + eps).rsqrt()
        scale = gamma * inverse
        above = (a * scale).add_(beta).sub_(tau)  # rounded as the module rounds it: what is equal there is equal here
        mask = above.sign_().add_(1).mul_(0.5)
        ctx.constants = a * inverse, mask, scale
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        return *all_rows(_filter_response_maps, g, *ctx.constants), None, None


def filter_response_tap(module: FilterResponseNorm, a: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """See `src.jacobians.contract.Kind.tap`; the gradients that it leads to are (q, b, 3, c)."""
    parameters = torch.stack([p.flatten() for p in (module.gamma, module.beta, module.tau)])
    parameters = parameters.expand(len(a), -1, -1)
    return _FilterResponse.apply(a, parameters, output.detach(), module.eps), parameters


def filter_response_gradients(
    module: FilterResponseNorm, a: Tensor, g: Tensor, names: Collection[str]
) -> dict[str, Tensor]:
    """Pick each parameter's (q, b, 1, c, 1, 1) out of the gradients g (q, b, 3, c) at the tap."""
    found = dict(zip(("gamma", "beta", "tau"), g.unbind(2), strict=True))
    return {name: found[name].unflatten(2, getattr(module, name).shape) for name in names}


def _has_batch(module: nn.Module, a: Tensor) -> bool:
    return a.ndim >= 2


BATCHNORM = plain_kind({"weight", "bias"}, batchnorm_gradients, _has_batch)
LAYERNORM = plain_kind(
    {"weight", "bias"}, layernorm_gradients, lambda module, a: a.ndim > len(module.normalized_shape)
)
FILTER_RESPONSE_NORM = replace(
    plain_kind({"tau", "beta", "gamma"}, filter_response_gradients, lambda module, a: a.ndim == 4),
    tap=filter_response_tap,
)
