"""Gaussian posteriors over a network's parameters, and the curvatures they come from. Data, and the step between.

A posterior gives each parameter a covariance of its own (blocks; no parameter is correlated with another): entry by
entry, or diagonal after a rotation of the parameter's outputs and inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotated:
    """A covariance that is diagonal in a Kronecker basis: ``(QB (x) QA) diag(variances) (QB (x) QA)^T``.

    Letters: n groups of a convolution (else 1), o outputs and k inputs of a group.

    Attributes:
        variances: (n, o, k) for a weight, (n, o) for a bias.
        outputs: (n, o, o), the columns QB.
        inputs: (n, k, k), the columns QA; None for a bias.
    """

    variances: Tensor
    outputs: Tensor
    inputs: Tensor | None = None


Block = Tensor | Rotated
"""Variances in the parameter's own shape, or `Rotated` ones."""


@dataclass(frozen=True)
class Posterior:
    """Covariances of a network's parameters.

    Attributes:
        blocks: for each trainable parameter, by its name in the model, its covariance. The posterior of an optimiser
            is a dictionary of variances: ``Posterior({"head.weight": 1 / (n * h + delta), ...})``.
    """

    blocks: Mapping[str, Block]

    def fitted_to(self, parameters: Mapping[str, Tensor]) -> dict[str, Block]:
        """The blocks in the parameters' type and on their device.

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
        return {name: _fitted(name, self.blocks[name], p, bases) for name, p in parameters.items()}


def _fitted(name: str, block: Block, p: Tensor, bases: dict[int, Tensor]) -> Block:
    rotated = isinstance(block, Rotated)
    variances = block.variances if rotated else block
    same = variances.numel() == p.numel() if rotated else variances.shape == p.shape
    if not same:
        raise ValueError(f"variances of {name!r} have shape {tuple(variances.shape)}, the parameter {tuple(p.shape)}")
    if not bool(((variances >= 0) & variances.isfinite()).all()):
        raise ValueError(f"variances of {name!r} must be finite and not negative")
    if not rotated:
        return block.detach().to(p)
    inputs, outputs = (
        None if basis is None else bases.setdefault(id(basis), basis.to(p)) for basis in (block.inputs, block.outputs)
    )
    return Rotated(variances.to(p), outputs, inputs)


def _refuse_no_prior(delta: float) -> None:
    if not 0 < delta < float("inf"):
        raise ValueError(f"the prior precision delta must be positive and finite, got {delta}")


@dataclass(frozen=True)
class DiagonalCurvature:
    """Diagonal of the GGN of the summed cross-entropy.

    Attributes:
        diagonals: parameter's name -> float64 diagonal in the parameter's shape.
        count: N, the examples it was summed over.
    """

    diagonals: Mapping[str, Tensor]
    count: int

    def posterior(self, delta: float) -> Posterior:
        """Laplace's posterior ``1 / (GGN + delta)``.

        Args:
            delta: prior precision, that is the factor of ``|w|^2 / 2`` beside the summed loss.

        Raises:
            ValueError: delta is not positive.
        """
        _refuse_no_prior(delta)
        return Posterior({name: 1.0 / (diagonal + delta) for name, diagonal in self.diagonals.items()})


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

    def decomposed(self) -> "KroneckerEigen":
        """Eigenvalues (negative ones, which are rounding, as 0) and eigenvectors, in float64."""
        input_values, inputs = torch.linalg.eigh(self.inputs, UPLO="U")
        output_values, outputs = torch.linalg.eigh(self.outputs, UPLO="U")
        return KroneckerEigen(input_values.clamp(min=0), inputs, output_values.clamp(min=0), outputs, self)


@dataclass(frozen=True)
class KroneckerEigen:
    """Eigendecompositions of `KroneckerFactors`: A = inputs diag(input_values) inputs^T, B likewise."""

    input_values: Tensor
    inputs: Tensor
    output_values: Tensor
    outputs: Tensor
    factors: KroneckerFactors

    def blocks(self, delta: float) -> dict[str, Rotated]:
        """Covariances of the module's parameters under prior precision delta."""
        found = {}
        if self.factors.weight is not None:
            curvature = self.output_values.unsqueeze(-1) * self.input_values.unsqueeze(-2)  # (n, o, k)
            found[self.factors.weight] = Rotated(1.0 / (curvature + delta), self.outputs, self.inputs)
        if self.factors.bias is not None:
            curvature = self.factors.positions * self.output_values  # (n, o)
            found[self.factors.bias] = Rotated(1.0 / (curvature + delta), self.outputs)
        return found


@dataclass(frozen=True)
class KroneckerCurvature:
    """KFAC of the summed cross-entropy, decomposed; other parameters by the diagonal of their GGN.

    Attributes:
        modules: module's name -> its decomposed factors.
        diagonals: parameters in no module above -> float64 diagonal of the GGN, in the parameter's shape.
        count: N, the examples they were summed over.
    """

    modules: Mapping[str, KroneckerEigen]
    diagonals: Mapping[str, Tensor]
    count: int

    @classmethod
    def of(cls, factors: Mapping[str, KroneckerFactors], diagonals: Mapping[str, Tensor], count: int) -> Self:
        """Decompose the factors."""
        return cls({name: found.decomposed() for name, found in factors.items()}, diagonals, count)

    def posterior(self, delta: float) -> Posterior:
        """Laplace's posterior: precisions ``l_i m_j + delta`` in the eigenbases, ``GGN + delta`` for the others.

        Args:
            delta: prior precision, that is the factor of ``|w|^2 / 2`` beside the summed loss.

        Raises:
            ValueError: delta is not positive.
        """
        _refuse_no_prior(delta)
        blocks: dict[str, Block] = {name: 1.0 / (diagonal + delta) for name, diagonal in self.diagonals.items()}
        for eigen in self.modules.values():
            blocks.update(eigen.blocks(delta))
        return Posterior(blocks)
