"""Gaussian posteriors over the weights: read off an optimiser's state, or fitted by Laplace's method.

The covariances (Nickl et al. 2023, Table 1 and App. I.5), for N training examples, prior precision delta, and
the loss ``sum of cross-entropies + delta/2 |w|^2``: iBLR ``1 / (N h + delta)``, Adam
``1 / (N sqrt(second moments) + delta)``, Laplace ``1 / (GGN + delta)``, entry by entry or in KFAC's eigenbases.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from tqdm import tqdm

from mpe.choices import STRUCTURES
from src.jacobians import Posterior, ggn_diagonal, kronecker_factors

log = logging.getLogger(__name__)

Batches = Iterable[Tensor | Sequence[Tensor]]


def optimizer_posterior(
    optimizer: Optimizer, model: nn.Module, *, num_examples: int | None = None, delta: float | None = None
) -> Posterior:
    """The posterior that an optimiser's state holds, at the present parameters of the model.

    Call it outside of ``sampled_params``: the mean of the posterior is the model.

    Args:
        optimizer: ``src.optimizers.IBLR`` or ``ivon.IVON``, whose state says N and delta; or torch's ``Adam`` or
            ``AdamW`` after a step of every parameter (second moments as they are, not corrected for their start).
        model: the network; parameters are recognised by identity, in any number of groups. Frozen ones are left out.
        num_examples: N, the number of examples whose mean loss was trained. Needed for Adam; if given for iBLR, it
            must be the state's.
        delta: prior precision, N times the weight of the L2 term (or of the decoupled decay). As above.

    Returns:
        Variances for each trainable parameter, by its name.

    Raises:
        ValueError: another optimiser, a trainable parameter without state, missing or contradicting numbers, or
            variances that are not positive and finite.
    """
    model = getattr(model, "_orig_mod", model)
    if _is_ivon(optimizer):
        found = _ivon_variances(optimizer, num_examples, delta)
    elif isinstance(optimizer, Adam | AdamW):
        found = _adam_variances(optimizer, num_examples, delta)
    else:
        raise ValueError(
            f"{type(optimizer).__name__} learns no variances; give an iBLR (IVON), Adam or AdamW optimiser, "
            "or take a Laplace posterior"
        )
    blocks = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) not in found:
            raise ValueError(
                f"the optimiser holds no state of the parameter {name!r}: it must be this model's, after a step that "
                "reached every trainable parameter"
            )
        blocks[name] = found[id(p)].view(p.shape)
        if not bool((blocks[name].isfinite() & (blocks[name] > 0)).all()):
            raise ValueError(f"the optimiser's state gives {name!r} variances that are not positive and finite")
    return Posterior(blocks)


def _is_ivon(optimizer: Optimizer) -> bool:
    """Whether the groups hold IVON's state (this package need not be installed for the others)."""
    return all({"ess", "hess", "weight_decay"} <= group.keys() for group in optimizer.param_groups)


def _ivon_variances(optimizer: Optimizer, num_examples: int | None, delta: float | None) -> dict[int, Tensor]:
    """``1 / (N (h + delta/N))`` by the parameter's identity; the state is flat, in the order of the parameters."""
    found = {}
    for group in optimizer.param_groups:
        own = {"num_examples": (num_examples, group["ess"]), "delta": (delta, group["ess"] * group["weight_decay"])}
        for name, (given, held) in own.items():
            if given is not None and abs(given - held) > 1e-6 * abs(held):
                raise ValueError(f"{name}={given} contradicts the optimiser's own {held:g}; leave it out")
        flat = 1.0 / (group["ess"] * (group["hess"].detach().double() + group["weight_decay"]))
        pieces = flat.split([p.numel() for p in group["params"]])
        found.update((id(p), piece) for p, piece in zip(group["params"], pieces, strict=True))
    return found


def _adam_variances(optimizer: Optimizer, num_examples: int | None, delta: float | None) -> dict[int, Tensor]:
    """``1 / (N sqrt(second moments) + delta)`` by the parameter's identity, of those that were stepped."""
    if num_examples is None or delta is None:
        raise ValueError("the posterior of Adam needs num_examples and delta, which its state does not hold")
    if num_examples < 1 or not 0.0 < delta < float("inf"):
        raise ValueError(f"num_examples must be at least 1 and delta positive, got {num_examples} and {delta}")
    return {
        id(p): 1.0 / (num_examples * optimizer.state[p]["exp_avg_sq"].detach().double().sqrt() + delta)
        for group in optimizer.param_groups
        for p in group["params"]
        if "exp_avg_sq" in optimizer.state.get(p, {})
    }


def laplace_posterior(
    model: nn.Module,
    batches: Batches,
    delta: float,
    *,
    structure: str = "kfac",
    memory_mb: float = 128.0,
    progress: bool = False,
) -> Posterior:
    """Laplace's posterior from the GGN of the summed cross-entropy over all batches, at the present parameters.

    With ``kfac``, linear layers and convolutions get Kronecker factors (Martens and Grosse 2015), and every other
    parameter (FRN, BatchNorm, ...) the diagonal of its GGN, which is logged.

    Args:
        model: the network, with outputs (b, C); left as it was.
        batches: the training examples, as images or as ``(images, ...)``; labels are not used.
        delta: prior precision: delta, not delta/N.
        structure: a name of ``STRUCTURES``.
        memory_mb: see `src.jacobians.OutputVariances`.
        progress: whether to show a progress bar.

    Raises:
        ValueError: an unknown structure, a delta that is not positive, no examples, or a model that the engine
            refuses.
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure {structure!r} is not one of {', '.join(STRUCTURES)}")
    if not 0.0 < delta < float("inf"):
        raise ValueError(f"the prior precision delta must be positive and finite, got {delta}")
    batches = tqdm(batches, desc=f"Laplace {structure}", leave=False, disable=None if progress else True)
    with _without_tf32():
        if structure == "diag":
            return ggn_diagonal(model, batches, memory_mb).posterior(delta)
        curvature = kronecker_factors(model, batches, memory_mb)
    if curvature.diagonals:
        names = list(curvature.diagonals)
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        log.info("KFAC: diagonal GGN blocks for %d parameters that have no Kronecker factors: %s", len(names), shown)
    return curvature.posterior(delta)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """TF32 off for a while: factors are sums of many products, and their small eigenvalues matter."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed
