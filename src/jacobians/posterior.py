"""Gaussian posteriors over a model's parameters, and the curvatures from which they are computed.

A posterior has one covariance block per parameter, and no correlation between parameters. A block is diagonal in the
parameter's entries, or diagonal after a rotation of the parameter's outputs and inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotated:
    """A covariance that is diagonal in a Kronecker basis: ``(QB (x) QA) diag(variances) (QB (x) QA)^T``.

    Notation: n groups of a convolution (otherwise 1), o outputs and k inputs of a group.

    Attributes:
        variances: (n, o, k) for a weight, (n, o) for a bias.
        outputs: (n, o, o), with the columns of QB; None without a rotation.
        inputs: (n, k, k), with the columns of QA; None for a bias, or without a rotation.
    """

    variances: Tensor
    outputs: Tensor | None = None
    inputs: Tensor | None = None


def laplace_variances(curvature: Tensor, delta: float, time: float | None = None) -> Tensor:
    """Variances of a Laplace posterior along directions with the given curvature of the summed loss.

    The posterior of Nickl et al. (2023) is ``1 / (curvature + delta)``: the covariance with which removing an example
    moves the minimum. Gradient descent reaches the new minimum only along directions with enough curvature. In a
    quadratic model, after a finite time, it has moved by the fraction ``1 - exp(-time (curvature + delta))``.

    Args:
        curvature: Of any shape, nonnegative.
        delta: Prior precision: the coefficient of ``|w|^2 / 2``, which is added to the summed loss.
        time: Sum of the learning rates of all steps, divided by ``1 - momentum`` and by N, the number of examples in
            the mean loss; None for infinite time.

    Raises:
        ValueError: delta is not positive, or the time is not.
    """
    if not 0 < delta < float("inf"):
        raise ValueError(f"the prior precision delta must be positive and finite, got {delta}")
    if time is not None and not time > 0:
        raise ValueError(f"the time must be positive, got {time}")
    precisions = curvature + delta
    return 1.0 / precisions if time is None else -torch.expm1(-time * precisions) / precisions


Block = Tensor | Rotated
"""Variances in the parameter's own shape, or a `Rotated` covariance."""


@dataclass(frozen=True)
class Posterior:
    """Covariances of a model's parameters.

    Attributes:
        blocks: The covariance of each trainable parameter, by its name in the model. An optimizer's posterior is a
            dictionary of variances: ``Posterior({"head.weight": 1 / (n * h + delta), ...})``.
    """

    blocks: Mapping[str, Block]

    def fitted_to(self, parameters: Mapping[str, Tensor]) -> dict[str, Rotated]:
        """Convert the blocks to the parameters' dtype and device; blocks without a rotation get no bases.

        Args:
            parameters: Name in the model -> parameter.

        Raises:
            ValueError: A parameter has no block or one with a different shape, a block has no parameter, or a
                variance is negative or not finite.
        """
        odd = sorted(set(self.blocks) ^ set(parameters))
        if odd:
            why = "no such trainable parameter" if odd[0] in self.blocks else "no variances in the posterior"
            raise ValueError(f"posterior and model have different parameters; {odd[0]!r}: {why}")
        bases: dict[int, Tensor] = {}  # a basis shared by a weight and its bias stays one tensor
        fitted = {}
        for name, p in parameters.items():
            stored = self.blocks[name]
            rotated = isinstance(stored, Rotated)
            block = stored if isinstance(stored, Rotated) else Rotated(stored.detach())
            shape = block.variances.shape
            if block.variances.numel() != p.numel() if rotated else shape != p.shape:
                raise ValueError(
                    f"variances of {name!r} have shape {tuple(shape)}, but the parameter has {tuple(p.shape)}"
                )
            if not ((block.variances >= 0) & block.variances.isfinite()).all():
                raise ValueError(f"variances of {name!r} must be finite and nonnegative")
            outputs, inputs = (
                None if basis is None else bases.setdefault(id(basis), basis.to(p))
                for basis in (block.outputs, block.inputs)
            )
            fitted[name] = Rotated(
                block.variances.to(p).contiguous(), outputs, inputs
            )  # contiguous for any layout of p
        return fitted


@dataclass(frozen=True)
class KroneckerFactors:
    """The Kronecker factors of one module: the weight's GGN is approximated by ``B (x) A``, the bias's by ``t B``.

    Notation: n groups, o outputs and k inputs of a group, t positions (1 for a linear layer on features).

    Attributes:
        inputs: (n, k, k), ``A = 1/N sum_n sum_t a a^T``, float64.
        outputs: (n, o, o), ``B = 1/t sum_n sum_t g^T Lambda g``, float64.
        positions: t.
        weight: The weight's name in the model; None if it is not trained.
        bias: The bias's name in the model; None if it is not trained.
    """

    inputs: Tensor
    outputs: Tensor
    positions: int
    weight: str | None
    bias: str | None

    @cached_property
    def eigen(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Eigenvalues (negative rounding errors set to 0) and eigenvectors of A and of B, in float64."""
        found = (torch.linalg.eigh(factor, UPLO="U") for factor in (self.inputs, self.outputs))
        of_inputs, of_outputs = ((values.clamp(min=0), vectors) for values, vectors in found)
        return of_inputs, of_outputs

    def blocks(self, delta: float, time: float | None = None) -> dict[str, Rotated]:
        """Covariances of the module's parameters; see `laplace_variances`."""
        (input_values, inputs), (output_values, outputs) = self.eigen
        found = {}
        if self.weight is not None:
            curvature = output_values.unsqueeze(-1) * input_values.unsqueeze(-2)  # (n, o, k)
            found[self.weight] = Rotated(laplace_variances(curvature, delta, time), outputs, inputs)
        if self.bias is not None:
            curvature = self.positions * output_values  # (n, o)
            found[self.bias] = Rotated(laplace_variances(curvature, delta, time), outputs)
        return found


@dataclass(frozen=True)
class Curvature:
    """The GGN of the summed cross-entropy, as Kronecker factors (KFAC) and diagonals.

    Attributes:
        diagonals: Name of each parameter without factors -> float64 diagonal, in the parameter's shape.
        count: N, the number of examples summed over.
        factors: Module name -> its factors; empty if only the diagonal was computed.
    """

    diagonals: Mapping[str, Tensor]
    count: int
    factors: Mapping[str, KroneckerFactors] = field(default_factory=dict)

    def posterior(self, delta: float, time: float | None = None) -> Posterior:
        """Laplace posterior: precisions ``l_i m_j + delta`` in the factors' eigenbases, otherwise ``GGN + delta``.

        See `laplace_variances` for the arguments and errors.
        """
        blocks: dict[str, Block] = {
            name: laplace_variances(diagonal, delta, time) for name, diagonal in self.diagonals.items()
        }
        for factors in self.factors.values():
            blocks.update(factors.blocks(delta, time))
        return Posterior(blocks)
