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


def _filter_response(module: FilterResponseNorm, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``max(y, tau)``, ``y = gamma * xhat + beta``: xhat, gamma / sqrt(mean x^2 + eps) and the mask.

    The mask is 1 where y is the larger, 1/2 where both are equal, as autograd has it.
    """
    inverse = (a.square().mean((2, 3), keepdim=True) + module.eps).rsqrt()
    scale = module.gamma * inverse
    y = a * scale + module.beta  # rounded as the module rounds it: what is equal there is equal here
    mask = (y > module.tau).to(a).add_((y == module.tau).to(a), alpha=0.5)
    return a * inverse, scale, mask


def filter_response_gradients(
    module: FilterResponseNorm, a: Tensor, g: Tensor, names: Collection[str]
) -> dict[str, Tensor]:
    """Filter response normalisation, ``z = max(gamma * xhat + beta, tau)``, ``xhat = x / sqrt(mean x^2 + eps)``.

    With the mask m of the maximum: ``sum_t g m xhat`` for gamma, ``sum_t g m`` for beta, ``sum_t g (1 - m)`` for
    tau, each (q, b, 1, c, 1, 1), in one product that reads g once.

    Source: Singh and Krishnan 2020, "Filter Response Normalization Layer", Eqs. 1-3.
    """
    xhat, _, mask = _filter_response(module, a)
    factors = torch.stack([mask * xhat, mask, 1 - mask], dim=2).flatten(3)  # (b, c, 3, t)
    products = factors @ g.flatten(3).permute(1, 2, 3, 0)  # (b, c, 3, q)
    found = dict(zip(("gamma", "beta", "tau"), products.permute(2, 3, 0, 1), strict=True))
    return {name: found[name].reshape(*g.shape[:2], *getattr(module, name).shape) for name in names}


class _FilterResponseToInputs(torch.autograd.Function):
    """Filter response normalisation whose backward pass knows the inputs only, in four passes over the maps.

    ``dx = p - xhat * mean(p * xhat)`` with ``p = g * m * gamma / sqrt(mean x^2 + eps)``; autograd's own chain makes
    about fifteen passes, which on small maps is most of a network's time. The tensors it needs are its own, so what
    becomes of x afterwards does not matter (nor are they left to hooks on saved tensors, such as checkpointing's).
    """

    @staticmethod
    def forward(ctx, a: Tensor, output: Tensor, module: FilterResponseNorm, *parameters: Tensor) -> Tensor:
        ctx.xhat, scale, mask = _filter_response(module, a)
        ctx.slope = mask.mul_(scale)
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        passed = g * ctx.slope
        mean = (passed * ctx.xhat).mean((-2, -1), keepdim=True)
        return torch.addcmul(passed, ctx.xhat, mean, value=-1), *[None] * 5


def filter_response_output(module: FilterResponseNorm, a: Tensor, output: Tensor) -> Tensor:
    """See `src.jacobians.contract.Kind.output`."""
    return _FilterResponseToInputs.apply(a, output.detach(), module, module.tau, module.beta, module.gamma)


def _has_batch(module: nn.Module, a: Tensor) -> bool:
    return a.ndim >= 2


BATCHNORM = plain_kind({"weight", "bias"}, batchnorm_gradients, _has_batch)
LAYERNORM = plain_kind(
    {"weight", "bias"}, layernorm_gradients, lambda module, a: a.ndim > len(module.normalized_shape)
)
FILTER_RESPONSE_NORM = replace(
    plain_kind({"tau", "beta", "gamma"}, filter_response_gradients, lambda module, a: a.ndim == 4),
    output=filter_response_output,
)
