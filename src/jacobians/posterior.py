"""Gaussian posteriors over a model's parameters, and the curvatures that they are computed from.

A posterior gives each parameter a covariance of its own (blocks; no parameter is correlated with another): entry by
entry, or diagonal after a rotation of the parameter's outputs and inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotated:
    """A covariance that is diagonal in a Kronecker basis: ``(QB (x) QA) diag(variances) (QB (x) QA)^T``.

    Letters: n groups of a convolution (else 1), o outputs and k inputs of a group.

    Attributes:
        variances: (n, o, k) for a weight, (n, o) for a bias.
        outputs: (n, o, o), the columns QB; None without a rotation.
        inputs: (n, k, k), the columns QA; None for a bias, or without a rotation.
    """

    variances: Tensor
    outputs: Tensor | None = None
    inputs: Tensor | None = None


Block = Tensor | Rotated
"""Variances in the parameter's own shape, or `Rotated` ones."""


@dataclass(frozen=True)
class Posterior:
    """Covariances of a model's parameters.

    Attributes:
        blocks: for each trainable parameter, by its name in the model, its covariance. The posterior of an optimizer
            is a dictionary of variances: ``Posterior({"head.weight": 1 / (n * h + delta), ...})``.
    """

    blocks: Mapping[str, Block]

    def fitted_to(self, parameters: Mapping[str, Tensor]) -> dict[str, Rotated]:
        """The blocks in the parameters' type and on their device; those that are not rotated have no bases.

        Args:
            parameters: name in the model -> parameter.

        Raises:
            ValueError: a parameter has no block or one of another shape, a block has no parameter, or a variance is
                negative or not finite.
        """
        odd = sorted(set(self.blocks) ^ set(parameters))
        if odd:
            why = "no such trainable parameter" if odd[0] in self.blocks else "no variances in the posterior"
            raise ValueError(f"posterior and model have other parameters; {odd[0]!r}: {why}")
        bases: dict[int, Tensor] = {}  # a weight's and its bias's common basis stays one tensor
        fitted = {}
        for name, p in parameters.items():
            block = self.blocks[name]
            rotated = isinstance(block, Rotated)
            if not rotated:
                block = Rotated(block.detach())
            shape = block.variances.shape
            if block.variances.numel() != p.numel() if rotated else shape != p.shape:
                raise ValueError(f"variances of {name!r} have shape {tuple(shape)}, the parameter {tuple(p.shape)}")
            if not ((block.variances >= 0) & block.variances.isfinite()).all():
                raise ValueError(f"variances of {name!r} must be finite and not negative")
            outputs, inputs = (
                None if basis is None else bases.setdefault(id(basis), basis.to(p))
                for basis in (block.outputs, block.inputs)
            )
            fitted[name] = Rotated(block.variances.to(p).contiguous(), outputs, inputs)  # whatever p's layout
        return fitted


@dataclass(frozen=True)
class KroneckerFactors:
    """The factors of one module: the weight's GGN is taken as ``B (x) A``, the bias's as ``t B``.

    Letters: n groups, o outputs and k inputs of a group, t positions (1 for a linear layer of features).

    Attributes:
        inputs: (n, k, k), ``A = 1/N sum_n sum_t a a^T``, float64.
        outputs: (n, o, o), ``B = 1/t sum_n sum_t g^T Lambda g``, float64.
        positions: t.
        weight: the weight's name in the model, None where it is not trained.
        bias: the same for the bias.
    """

    inputs: Tensor
    outputs: Tensor
    positions: int
    weight: str | None
    bias: str | None

    @cached_property
    def eigen(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Eigenvalues (negative ones, which are rounding, as 0) and eigenvectors of A and of B, in float64."""
        found = (torch.linalg.eigh(factor, UPLO="U") for factor in (self.inputs, self.outputs))
        of_inputs, of_outputs = ((values.clamp(min=0), vectors) for values, vectors in found)
        return of_inputs, of_outputs

    def blocks(self, delta: float) -> dict[str, Rotated]:
        """Covariances of the module's parameters under prior precision delta."""
        (input_values, inputs), (output_values, outputs) = self.eigen
        found = {}
        if self.weight is not None:
            curvature = output_values.unsqueeze(-1) * input_values.unsqueeze(-2)  # (n, o, k)
            found[self.weight] = Rotated(1.0 / (curvature + delta), outputs, inputs)
        if self.bias is not None:
            curvature = self.positions * output_values  # (n, o)
            found[self.bias] = Rotated(1.0 / (curvature + delta), outputs)
        return found


@dataclass(frozen=True)
class Curvature:
    """The GGN of the summed cross-entropy, by Kronecker factors (KFAC) and diagonals.

    Attributes:
        diagonals: name of each parameter without factors -> float64 diagonal, in the parameter's shape.
        count: N, the examples that were summed over.
        factors: module's name -> its factors; none where only the diagonal was asked for.
    """

    diagonals: Mapping[str, Tensor]
    count: int
    factors: Mapping[str, KroneckerFactors] = field(default_factory=dict)

    def posterior(self, delta: float) -> Posterior:
        """Laplace's posterior: precisions ``l_i m_j + delta`` in the factors' eigenbases, else ``GGN + delta``.

        Args:
            delta: prior precision, that is the factor of ``|w|^2 / 2`` beside the summed loss.

        Raises:
            ValueError: delta is not positive.
        """
        if not 0 < delta < float("inf"):
            raise ValueError(f"the prior precision delta must be positive and finite, got {delta}")
        blocks: dict[str, Block] = {name: 1.0 / (diagonal + delta) for name, diagonal in self.diagonals.items()}
        for factors in self.factors.values():
            blocks.update(factors.blocks(delta))
        return Posterior(blocks)
