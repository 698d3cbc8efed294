"""Which kind each exact module type is of. A type that is not here goes through the exact fallback."""

from torch import nn

from src.jacobians.contract import CONVOLUTION, LINEAR, Kind
from src.jacobians.norms import BATCHNORM, FILTER_RESPONSE_NORM, LAYERNORM
from src.models.frn import FilterResponseNorm

KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: LINEAR,
    nn.Conv2d: CONVOLUTION,
    nn.BatchNorm1d: BATCHNORM,
    nn.BatchNorm2d: BATCHNORM,
    nn.BatchNorm3d: BATCHNORM,
    nn.SyncBatchNorm: BATCHNORM,
    nn.LayerNorm: LAYERNORM,
    FilterResponseNorm: FILTER_RESPONSE_NORM,
}


def register_kind(module_type: type[nn.Module], kind: Kind) -> None:
    """Have modules of exactly this type contracted by a rule of their own instead of the fallback.

    Args:
        module_type: the module's class; subclasses stay with the fallback.
        kind: the rule; `src.jacobians.norms.plain_kind` makes one from a function of gradients.

    Raises:
        ValueError: the type has a rule already.
    """
    if KINDS.get(module_type, kind) is not kind:
        raise ValueError(f"{module_type.__name__} has a contraction rule already")
    KINDS[module_type] = kind
