"""Generalized Gauss-Newton matrices of the summed cross-entropy: diagonal and Kronecker factors (KFAC).

``GGN = sum_n J_n^T Lambda_n J_n`` with ``Lambda = diag(p) - p p^T``. It is exact (labels are not used), and neither
averaged nor damped. With a square root ``Lambda = R^T R`` with C - 1 rows, differentiating ``R z`` instead of the
logits z turns every sum below into a sum of squares or of outer products.

Sources: Martens and Grosse 2015 (KFAC), Grosse and Martens 2016 (convolutions). The scaling follows laplace-torch
(Daxberger et al. 2021): weight and bias are separate blocks; see `KroneckerFactors`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from src.jacobians.capture import Record, trainable
from src.jacobians.engine import CAPTURED, PerExampleEngine
from src.jacobians.layer_rules import outer_gradients
from src.jacobians.posterior import Curvature, KroneckerFactors
from src.jacobians.variances import logit_rows

ImageBatches = Iterable[Tensor | Sequence[Tensor]]
"""Images, or sequences whose first item is images (labels are not needed)."""


def root_of_softmax_covariance(logits: Tensor) -> Tensor:
    """R with ``R^T R = diag(p) - p p^T``: the transposed Cholesky factor in closed form, computed in log space.

    With tails ``s_j = sum_{i >= j} p_i``: ``R_jj = sqrt(p_j s_{j+1} / s_j)``, ``R_ji = -R_jj p_i / s_{j+1}`` (i > j).

    Args:
        logits: (b, C), C >= 2.

    Returns:
        (b, C - 1, C) in the logits' dtype, computed in float64.
    """
    log_p = logits.detach().double().log_softmax(1)
    log_s = log_p.flip(1).logcumsumexp(1).flip(1)  # (b, C)
    scale = (0.5 * (log_p[:, :-1] + log_s[:, 1:] - log_s[:, :-1])).exp()  # (b, C-1)
    ratio = (log_p.unsqueeze(1) - log_s[:, 1:].unsqueeze(2)).clamp(max=0.0).exp()  # (b, C-1, C); below the diagonal
    root = torch.eye(log_p.shape[1], dtype=ratio.dtype, device=ratio.device)[:-1] - ratio.triu(1)
    return (scale.unsqueeze(2) * root).to(logits.dtype)


def ggn_rows(outputs: Tensor, targets: Tensor) -> Tensor:
    """``R z`` as quantities to differentiate, (C - 1, b); R is a constant.

    Raises:
        ValueError: The outputs are not (b, C) with at least two classes.
    """
    if logit_rows(outputs, targets).shape[0] < 2:
        raise ValueError("the cross-entropy of a model with a single output has no curvature")
    return (root_of_softmax_covariance(outputs) @ outputs.unsqueeze(2)).squeeze(2).T


def second_moments(x: Tensor) -> Tensor:
    """``sum_t x x^T``, also summed over the first axis.

    Args:
        x: (m, n, d, t).

    Returns:
        (n, d, d).
    """
    _, n, d, t = x.shape
    rows = x[..., 0].transpose(0, 1) if t == 1 else x.permute(1, 0, 3, 2).reshape(n, -1, d)  # (n, m * t, d)
    return rows.mT @ rows


class _Fit(PerExampleEngine):
    """Kronecker factors if one call contains all uses of a module; otherwise sums of squared gradients per entry.

    Args:
        model: See `PerExampleEngine`.
        memory_mb: See `PerExampleEngine`.
        kronecker: Whether to compute Kronecker factors.
    """

    def __init__(self, model: nn.Module, memory_mb: float, kronecker: bool) -> None:
        super().__init__(model, memory_mb)
        self.diagonals: dict[str, Tensor] = {}
        self.factors: dict[str, KroneckerFactors] = {}
        # parameters with factors: those captured in the first batch
        self._chosen: set[str] | None = None if kronecker else set()

    def begin(self, rows: Tensor) -> None:
        """See `PerExampleEngine`.

        Raises:
            ValueError: A module is used differently than in the first batch.
        """
        calls = {self._names[id(p)]: r for r in self._capture.records for p in trainable(r.module).values()}
        captured = {name: calls[name] for name, route in self.routes.items() if route == CAPTURED}
        found = {
            name
            for name, record in captured.items()
            if record.rule.outer is not None
            # all trained parameters of the module belong to this one call
            and all(self._names[id(p)] in captured for p in trainable(record.module).values())
        }
        if self._chosen is None:
            self._chosen = found
        elif self._chosen - found:
            raise ValueError(
                f"Kronecker factors need every batch to use {min(self._chosen - found)!r} in the same way; "
                "use the diagonal instead"
            )

    def take_outer(self, record: Record, names: dict[str, str], g: Tensor, part: slice) -> None:
        """See `PerExampleEngine`."""
        a, t = record.rule.outer.inputs(record.module, record.inputs[part]), g.shape[-1]
        if not self._chosen.issuperset(names.values()):
            if "bias" in names:
                self.take_gradients(names["bias"], g.sum(-1).flatten(2), part)
            if "weight" in names:
                if t == 1:
                    squares = torch.einsum("bno,bnk->nok", g[..., 0].square().sum(0), a[..., 0].square())
                else:
                    squares = outer_gradients(a, g).square_().sum((0, 2))
                self._add_diagonal(names["weight"], squares)
            return
        inputs = second_moments(a)
        outputs = second_moments(g.transpose(0, 1).reshape(-1, *g.shape[2:])) / t
        if record.name not in self.factors:
            empty = (torch.zeros_like(x, dtype=torch.float64) for x in (inputs, outputs))
            self.factors[record.name] = KroneckerFactors(*empty, t, names.get("weight"), names.get("bias"))
        factors = self.factors[record.name]
        if factors.positions != t:
            raise ValueError(
                f"Kronecker factors need images of one size; {record.name!r} has {t} positions here and had "
                f"{factors.positions} before"
            )
        factors.inputs.add_(inputs)
        factors.outputs.add_(outputs)

    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """See `PerExampleEngine`."""
        self._add_diagonal(name, gradients.square().sum((0, 1)))

    def _add_diagonal(self, name: str, diagonal: Tensor) -> None:
        if name not in self.diagonals:
            plain: dict[str, Any] = {"dtype": torch.float64, "memory_format": torch.contiguous_format}
            self.diagonals[name] = torch.zeros_like(self._parameters[name], **plain)
        self.diagonals[name] += diagonal.view_as(self.diagonals[name])


def _fit(model: nn.Module, batches: ImageBatches, memory_mb: float, kronecker: bool) -> Curvature:
    count = 0
    with _Fit(model, memory_mb, kronecker) as fit:
        device = next(p.device for p in model.parameters() if p.requires_grad)
        for batch in batches:
            images = (batch if isinstance(batch, Tensor) else batch[0]).to(device)
            for part in fit.sub_batches(images):
                fit.run(images[part], images.new_empty(part.stop - part.start), ggn_rows)
            count += len(images)
    if count == 0:
        raise ValueError("a curvature needs at least one example")
    for factors in fit.factors.values():
        factors.inputs.div_(count)
    return Curvature(fit.diagonals, count, fit.factors)


def ggn_diagonal(model: nn.Module, batches: ImageBatches, memory_mb: float = 128.0) -> Curvature:
    """Compute the diagonal of the GGN of the summed cross-entropy.

    Args:
        model: The model; its outputs are logits (b, C).
        batches: The examples, in batches of any size.
        memory_mb: See `src.jacobians.OutputVariances`.

    Returns:
        The diagonal for each trainable parameter.

    Raises:
        ValueError: There are no examples, or `PerExampleEngine` refuses the model.
    """
    return _fit(model, batches, memory_mb, kronecker=False)


def kronecker_factors(model: nn.Module, batches: ImageBatches, memory_mb: float = 128.0) -> Curvature:
    """Compute KFAC of the summed cross-entropy, with all C classes, in float64.

    Linear layers and convolutions (per group) get Kronecker factors if one call in each batch contains all uses of
    the weight. Every other parameter gets the diagonal of its GGN.

    Args:
        model: The model; its outputs are logits (b, C).
        batches: The examples, in batches of any size.
        memory_mb: See `src.jacobians.OutputVariances`.

    Raises:
        ValueError: There are no examples, a module is used in different ways or at different image sizes, or
            `PerExampleEngine` refuses the model.
    """
    return _fit(model, batches, memory_mb, kronecker=True)
