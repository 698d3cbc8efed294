"""Layer rules: how each layer type turns its inputs and output gradients into per-example gradients.

Notation: q quantities (loss: one; logits: one per class), b examples, n groups, o outputs and k inputs of a group, t
positions (pixels, tokens), f families of weights. A weight's gradient is ``G = sum_t g_t a_t^T``.

A rule has two functions: `squares` (the engine's main operation) and `gradients` (the full gradients, for parameters
whose contributions must be added before squaring). If the weight's gradient is a sum of outer products, the rule also
converts ``a`` and ``g`` to a standard form (`Outer`), used by posteriors and curvatures. Normalization layers have
only a few parameters per channel, so their per-example gradients are formed in full. Layer types without a rule use
the exact fallback in `src.jacobians.engine`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from src.models.base import FilterResponseNorm

Maps = Callable[..., tuple[Tensor, ...]]
"""(g, *constants) -> gradients; g and the gradients are (q, b, ...); the constants (any type) have no row axis."""


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(maps: Maps, g: Tensor, *constants: object) -> tuple[Tensor, ...]:
        return tuple(found[0] for found in maps(g.unsqueeze(0), *constants))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass  # second derivatives are not supported

    @staticmethod
    def vmap(info: Any, in_dims: tuple, maps: Maps, g: Tensor, *constants: object) -> tuple[tuple, tuple]:
        found = maps(g.movedim(in_dims[1], 0), *constants)
        return found, (0,) * len(found)


def all_rows(maps: Maps, g: Tensor, *constants: object) -> tuple[Tensor, ...]:
    """Apply ``maps`` to all rows that `vmap` carries, (q, b, ...), or without `vmap` to a single row, (1, b, ...).

    The batching rules of many operations copy data shared by all rows for each row, or lose the memory layout.

    Args:
        maps: See `Maps`.
        g: (b, ...) gradients, as passed to a `torch.autograd.Function`.
        constants: Values shared by all rows.

    Returns:
        The result of ``maps``, without the row axis.
    """
    return _AllRows.apply(maps, g, *constants)


Weights = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class LayerRule:
    """How to contract the gradients of one module type.

    Attributes:
        parameters: Names of the parameters that the rule handles.
        fits: (module, inputs) -> whether the formulas cover a call of this shape.
        squares: (module, a, g, weights) -> (f, q, b), summed over the parameters named in ``weights``; for each name,
            ``weights`` has a tensor (f, *shape), or None for a single family of ones.
        gradients: (module, a, g, names) -> for each name, (q, b, *shape).
        bytes_per_example: (module, a, g) -> memory that either function takes per example.
        outer: The standard form of ``a`` and ``g`` if the weight's gradient is a sum of outer products, else None.
        tap: (module, inputs, output) -> an output with the same values that replaces the module's output, and the
            tensor at which the gradients ``g`` are taken, with examples on its first axis; None to use the output.
    """

    parameters: frozenset[str]
    fits: Callable[[nn.Module, Tensor], bool]
    squares: Callable[[nn.Module, Tensor, Tensor, Weights], Tensor]
    gradients: Callable[[nn.Module, Tensor, Tensor, Collection[str]], dict[str, Tensor]]
    bytes_per_example: Callable[[nn.Module, Tensor, Tensor], int]
    outer: "Outer | None" = None
    tap: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


# ---------------------------------------------------------------------------------------------- full gradients


def weighted_squares(gradients: Tensor, weights: Tensor | None) -> Tensor:
    """``sum(S * G * G)`` over a parameter's entries.

    Args:
        gradients: (q, b, *shape).
        weights: (f, *shape), or None for one family of ones.

    Returns:
        (f, q, b).
    """
    squared = gradients.square().reshape(*gradients.shape[:2], -1)  # (q, b, p), p = 1 for a scalar
    if weights is None:
        return squared.sum(-1).unsqueeze(0)
    return (squared @ weights.reshape(len(weights), -1).mT).permute(2, 0, 1)  # (q, b, f) -> (f, q, b)


def outer_gradients(a: Tensor, g: Tensor) -> Tensor:
    """``G = sum_t g_t a_t^T``, as one batched product.

    Args:
        a: (b, n, k, t).
        g: (q, b, n, o, t).

    Returns:
        (b, n, q, o, k).
    """
    q, b, n, o, t = g.shape
    stacked = g.permute(1, 2, 0, 3, 4).reshape(b, n, q * o, t)
    return (stacked @ a.mT).view(b, n, q, o, a.shape[2])


def outer_squares(a: Tensor, g: Tensor, weights: Tensor | None) -> Tensor:
    """``sum(S * G * G)`` for ``G = sum_t g_t a_t^T``, in the cheapest of three exact forms.

    For one position: ``(g * g) S (a * a)``, without an outer product. For weights of one and few positions:
    ``sum_{t,t'} (g_t . g_t')(a_t . a_t')``. Otherwise, G itself.

    Args:
        a: (b, n, k, t).
        g: (q, b, n, o, t).
        weights: (f, n*o, ...) in the shape of the module's weight, or None for one family of ones.

    Returns:
        (f, q, b).
    """
    q, b, n, o, t = g.shape
    k = a.shape[2]
    if t == 1:
        a2, g2 = a[..., 0].square(), g[..., 0].square()  # (b, n, k), (q, b, n, o)
        if weights is None:
            return (a2.sum(-1) * g2.sum(-1)).sum(-1).unsqueeze(0)
        mixed = torch.einsum("bnk,fnok->bfno", a2, weights.reshape(-1, n, o, k))
        return torch.einsum("bfno,qbno->fqb", mixed, g2)
    if weights is None and prefers_pairs(o, k, t):
        return ((a.mT @ a) * (g.mT @ g)).sum((-1, -2, -3)).unsqueeze(0)
    squared = outer_gradients(a, g).square_()
    if weights is None:
        return squared.sum((1, 3, 4)).mT.unsqueeze(0)
    squared = squared.transpose(1, 2).reshape(b * q, n * o * k)
    return (squared @ weights.flatten(1).mT).view(b, q, -1).permute(2, 1, 0)


def prefers_pairs(o: int, k: int, t: int) -> bool:
    """Whether the ``t^2 (o + k)`` multiplications for position pairs are fewer than the ``t o k`` for G."""
    return t * (o + k) < o * k


# ------------------------------------------------------------------------- modules whose weight gradient is outer


@dataclass(frozen=True)
class Outer:
    """Functions of a `LayerRule` for modules with a bias and a weight whose gradient is ``sum_t g_t a_t^T``.

    Attributes:
        inputs: (module, a) -> (b, n, k, t), k in the order of the weight.
        outputs: (module, g) -> (q, b, n, o, t).
        rows: (module, a) -> (b, n, t, k), each position's inputs contiguous in memory, k in a rule-specific order.
        in_row_order: (module, S in the weight's shape) -> (n, o, k) in the order of ``rows``.
    """

    inputs: Callable[[Any, Tensor], Tensor]
    outputs: Callable[[Any, Tensor], Tensor]
    rows: Callable[[Any, Tensor], Tensor]
    in_row_order: Callable[[Any, Tensor], Tensor]

    def squares(self, module: nn.Module, a: Tensor, g: Tensor, weights: Weights) -> Tensor:
        """See `LayerRule.squares`."""
        g = self.outputs(module, g)
        parts = []
        if "bias" in weights:
            parts.append(weighted_squares(g.sum(-1).flatten(2), weights["bias"]))
        if "weight" in weights:
            parts.append(outer_squares(self.inputs(module, a), g, weights["weight"]))
        return sum(parts)

    def gradients(self, module: nn.Module, a: Tensor, g: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """See `LayerRule.gradients`."""
        g = self.outputs(module, g)
        found = {}
        if "bias" in names:
            found["bias"] = g.sum(-1).flatten(2)
        if "weight" in names:
            full = outer_gradients(self.inputs(module, a), g)  # (b, n, q, o, k)
            found["weight"] = full.permute(2, 0, 1, 3, 4).reshape(*g.shape[:2], *module.weight.shape)
        return found

    def bytes_per_example(self, module: nn.Module, a: Tensor, g: Tensor) -> int:
        """See `LayerRule.bytes_per_example`: unfolded inputs, gradients, and G with its square."""
        q, outputs, weight = g.shape[0], module.weight.shape[0], module.weight.numel()
        positions = g[0, 0].numel() // outputs
        unfolded = weight // outputs * getattr(module, "groups", 1) * positions
        outer = 0 if positions == 1 else 2 * q * weight
        return a.element_size() * (unfolded + 2 * q * outputs * positions + outer)


def conv_inputs(module: nn.Conv2d, a: Tensor) -> Tensor:
    """Extract patches from (b, c, h, w): (b, n, k, t), k = c/n * kh * kw.

    Makes one copy of a strided view: the result of ``F.unfold``, in about half the time on a CPU.
    """
    patches = _patches(module, pad(module, a).contiguous())
    return patches.permute(0, 1, 4, 5, 6, 2, 3).flatten(5).flatten(2, 4)


def conv_rows(module: nn.Conv2d, a: Tensor) -> Tensor:
    """The same as (b, n, t, k), k = kh * kw * c/n; with channels last, the copy moves long contiguous runs."""
    patches = _patches(module, pad(module, a).contiguous(memory_format=torch.channels_last))
    return patches.permute(0, 1, 2, 3, 5, 6, 4).flatten(4).flatten(2, 3)


def _patches(module: nn.Conv2d, a: Tensor) -> Tensor:
    """A view (b, n, h, w, c/n, kh, kw) of the patches of a padded input; h and w are the output's sizes."""
    b, c, h, w = a.shape
    n, (kh, kw), (dh, dw), (sh, sw) = module.groups, module.kernel_size, module.dilation, module.stride
    outputs = (h - dh * (kh - 1) - 1) // sh + 1, (w - dw * (kw - 1) - 1) // sw + 1
    by_b, by_c, by_h, by_w = a.stride()
    steps = (by_b, c // n * by_c, sh * by_h, sw * by_w, by_c, dh * by_h, dw * by_w)
    return a.as_strided((b, n, *outputs, c // n, kh, kw), steps, a.storage_offset())


def pad(module: nn.Conv2d, a: Tensor) -> Tensor:
    """Make the convolution's padding explicit, for any amount and padding mode."""
    sides: list[int] = []  # F.pad counts from the last axis
    for axis in (1, 0):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        elif module.padding == "valid":
            sides += [0, 0]
        else:
            sides += [module.padding[axis]] * 2
    if not any(sides):
        return a
    return F.pad(a, sides, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


def _outer_rule(outer: Outer, fits: Callable[[nn.Module, Tensor], bool]) -> LayerRule:
    names = frozenset({"weight", "bias"})
    return LayerRule(names, fits, outer.squares, outer.gradients, outer.bytes_per_example, outer)


LINEAR = _outer_rule(
    Outer(  # all axes between batch and features are positions
        inputs=lambda module, a: a.reshape(a.shape[0], 1, -1, a.shape[-1]).mT,
        outputs=lambda module, g: g.reshape(*g.shape[:2], 1, -1, g.shape[-1]).mT,
        rows=lambda module, a: a.reshape(a.shape[0], 1, -1, a.shape[-1]),
        in_row_order=lambda module, weights: weights.unsqueeze(0),
    ),
    fits=lambda module, a: a.ndim >= 2,
)
CONVOLUTION = _outer_rule(
    Outer(
        inputs=conv_inputs,
        outputs=lambda module, g: g.flatten(3).unflatten(2, (module.groups, -1)),
        rows=conv_rows,
        in_row_order=lambda module, s: s.permute(0, 2, 3, 1).reshape(module.groups, -1, s[0].numel()),
    ),
    fits=lambda module, a: a.ndim == 4,  # three axes are a single image without a batch axis
)


Gradients = Callable[[Any, Tensor, Tensor, Collection[str]], dict[str, Tensor]]


def rule_from_gradients(
    parameters: Collection[str], gradients: Gradients, fits: Callable[[nn.Module, Tensor], bool] | None = None
) -> LayerRule:
    """Build a rule from a gradient function alone, for modules with few parameters.

    Args:
        parameters: Names of all parameters that the module may have.
        gradients: (module, a, g, names) -> for each name, (q, b, *shape of the parameter).
        fits: (module, a) -> whether ``gradients`` covers inputs of this shape; always by default.
    """

    def squares(module: nn.Module, a: Tensor, g: Tensor, weights: Weights) -> Tensor:
        found = gradients(module, a, g, list(weights))
        return sum(weighted_squares(found[name], weights[name]) for name in weights)

    def bytes_per_example(module: nn.Module, a: Tensor, g: Tensor) -> int:
        return a.element_size() * (2 + g.shape[0]) * a[0].numel()

    return LayerRule(frozenset(parameters), fits or (lambda module, a: True), squares, gradients, bytes_per_example)


def batchnorm_gradients(module: nn.BatchNorm2d, a: Tensor, g: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """Scale: ``sum_t g * xhat``, shift: ``sum_t g``, with xhat from the running statistics; each (q, b, c)."""
    found = {}
    if "weight" in names:
        shape = (1, -1) + (1,) * (a.ndim - 2)
        deviation = (module.running_var + module.eps).sqrt().view(shape)
        found["weight"] = g * ((a - module.running_mean.view(shape)) / deviation)
    if "bias" in names:
        found["bias"] = g
    return {name: products.reshape(*g.shape[:3], -1).sum(-1) for name, products in found.items()}


def layernorm_gradients(module: nn.LayerNorm, a: Tensor, g: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """Scale: ``sum_t g * xhat``, shift: ``sum_t g``, over the positions t before the normalized axes."""
    shape = tuple(module.normalized_shape)
    found = {}
    if "weight" in names:
        found["weight"] = g * F.layer_norm(a, shape, eps=module.eps)
    if "bias" in names:
        found["bias"] = g
    return {name: products.reshape(*g.shape[:2], -1, *shape).sum(2) for name, products in found.items()}


def _filter_response_maps(g: Tensor, xhat: Tensor, mask: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The backward pass of filter response normalization, in few passes over the maps.

    Let ``z = max(gamma * xhat + beta, tau)``, ``xhat = x * r``, ``r = 1 / sqrt(mean x^2 + eps)``, and m the mask of
    the maximum (1 if the first argument is larger, 1/2 if both are equal, as in autograd). The gradients are
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
    """Filter response normalization with a fast backward pass; autograd's takes about fifteen passes over the maps.

    The parameters are passed as (b, 3, c), with a copy for each example, so their gradients are per example. The
    tensors needed for the backward pass are copies, so later in-place changes to x have no effect.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, parameters: Tensor, output: Tensor, eps: float) -> Tensor:
        gamma, beta, tau = parameters[..., None, None].unbind(1)  # (b, c, 1, 1)
        inverse = (a.square().mean((2, 3), keepdim=True) + eps).rsqrt()
        scale = gamma * inverse
        above = (a * scale).add_(beta).sub_(tau)  # rounded as in the module, so that ties agree
        mask = above.sign_().add_(1).mul_(0.5)
        ctx.constants = a * inverse, mask, scale
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return *all_rows(_filter_response_maps, g, *ctx.constants), None, None


def filter_response_tap(module: FilterResponseNorm, a: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """See `src.jacobians.layer_rules.LayerRule.tap`; the gradients at the tap are (q, b, 3, c)."""
    parameters = torch.stack([p.flatten() for p in (module.gamma, module.beta, module.tau)])
    parameters = parameters.expand(len(a), -1, -1)
    return _FilterResponse.apply(a, parameters, output.detach(), module.eps), parameters


def filter_response_gradients(
    module: FilterResponseNorm, a: Tensor, g: Tensor, names: Collection[str]
) -> dict[str, Tensor]:
    """Extract each parameter's (q, b, 1, c, 1, 1) from the gradients g (q, b, 3, c) at the tap."""
    found = dict(zip(("gamma", "beta", "tau"), g.unbind(2), strict=True))
    return {name: found[name].unflatten(2, getattr(module, name).shape) for name in names}


BATCHNORM = rule_from_gradients({"weight", "bias"}, batchnorm_gradients, lambda module, a: a.ndim >= 2)
LAYERNORM = rule_from_gradients(
    {"weight", "bias"}, layernorm_gradients, lambda module, a: a.ndim > len(module.normalized_shape)
)
FILTER_RESPONSE_NORM = replace(
    rule_from_gradients({"tau", "beta", "gamma"}, filter_response_gradients, lambda module, a: a.ndim == 4),
    tap=filter_response_tap,
)


LAYER_RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: LINEAR,
    nn.Conv2d: CONVOLUTION,
    nn.BatchNorm1d: BATCHNORM,
    nn.BatchNorm2d: BATCHNORM,
    nn.BatchNorm3d: BATCHNORM,
    nn.SyncBatchNorm: BATCHNORM,
    nn.LayerNorm: LAYERNORM,
    FilterResponseNorm: FILTER_RESPONSE_NORM,
}


def register_layer_rule(module_type: type[nn.Module], rule: LayerRule) -> None:
    """Register a rule to use for modules of exactly this type, instead of the fallback.

    Args:
        module_type: The module's class; subclasses still use the fallback.
        rule: The rule; `src.jacobians.layer_rules.rule_from_gradients` builds one from a gradient function.

    Raises:
        ValueError: The type already has a rule.
    """
    if LAYER_RULES.get(module_type, rule) is not rule:
        raise ValueError(f"{module_type.__name__} already has a contraction rule")
    LAYER_RULES[module_type] = rule
