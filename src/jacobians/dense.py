"""The exact generalized Gauss-Newton matrix of a small model, and output variances under its Laplace posterior.

Unlike KFAC and the diagonal (`src.jacobians.ggn`), it keeps the correlations between all P parameters. It needs
memory for several P x P matrices and an eigendecomposition, so it serves as the reference for small models.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from src.jacobians.engine import Quantities
from src.jacobians.ggn import ImageBatches, ggn_rows
from src.jacobians.posterior import Posterior, laplace_variances
from src.jacobians.products import InFull
from src.jacobians.variances import OutputVariances, contracted, logit_rows

MAX_PARAMETERS = 10_000
"""The matrices of this many parameters take 800 MB each."""


def check_dense(parameters: int) -> None:
    """Raise ValueError if a model has too many trainable parameters for its exact GGN."""
    if parameters > MAX_PARAMETERS:
        raise ValueError(
            f"the exact GGN is limited to {MAX_PARAMETERS:,} parameters, but the model has {parameters:,}"
        )


@dataclass(frozen=True)
class DensePosterior:
    """A covariance of all parameters, ``Q diag(variances) Q^T``.

    Attributes:
        variances: (P,), float64.
        vectors: (P, P), float64, with the columns of Q; parameters are flattened in the order of the model.
    """

    variances: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class DenseCurvature:
    """The eigendecomposition of the GGN of the summed cross-entropy.

    Attributes:
        values: (P,), ascending, float64; negative rounding errors are set to 0.
        vectors: (P, P), with the eigenvectors as columns.
    """

    values: Tensor
    vectors: Tensor

    def posterior(self, delta: float, time: float | None = None) -> DensePosterior:
        """Laplace posterior; see `src.jacobians.posterior.laplace_variances`."""
        return DensePosterior(laplace_variances(self.values, delta, time), self.vectors)


class _Jacobian(InFull):
    """Keeps the gradients of all quantities of a batch: float64 (b, q, P)."""

    def __enter__(self) -> Self:
        super().__enter__()
        sizes = [p.numel() for p in self._parameters.values()]
        self.count = sum(sizes)
        check_dense(self.count)
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self._columns = {
            name: slice(end - size, end) for name, size, end in zip(self._parameters, sizes, ends, strict=True)
        }
        return self

    def _note_sizes(self, shape: torch.Size, q: int, b: int) -> None:
        super()._note_sizes(shape, q, b)
        size, largest = self._sizes[shape]
        self._sizes[shape] = size + 2 * q * self.count * 8, largest

    def begin(self, rows: Tensor) -> None:
        """See `PerExampleEngine`."""
        q, b = rows.shape
        self.rows = torch.zeros(b, q, self.count, dtype=torch.float64, device=rows.device)

    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """See `PerExampleEngine`."""
        self.rows[part, :, self._columns[name]] = gradients.transpose(0, 1).reshape(*gradients.shape[1::-1], -1)

    def parts(self, images: Tensor, quantities: Quantities) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield outputs and Jacobians of a batch, in parts that fit in memory."""
        for part in self.sub_batches(images):
            outputs = self.run(images[part], images.new_empty(part.stop - part.start), quantities)
            yield outputs, self.rows


def exact_ggn(model: nn.Module, batches: ImageBatches, memory_mb: float = 128.0) -> DenseCurvature:
    """Compute the GGN of the summed cross-entropy with all its P x P entries, and its eigendecomposition.

    Args:
        model: The model; its outputs are logits (b, C).
        batches: The examples, in batches of any size.
        memory_mb: See `src.jacobians.OutputVariances`.

    Raises:
        ValueError: There are no examples, the model has more than ``MAX_PARAMETERS`` trainable parameters, or
            `PerExampleEngine` refuses it.
    """
    total = None
    with _Jacobian(model, memory_mb) as engine:
        device = next(p.device for p in model.parameters() if p.requires_grad)
        for batch in batches:
            images = (batch if isinstance(batch, Tensor) else batch[0]).to(device)
            for _, jacobian in engine.parts(images, ggn_rows):
                rows = jacobian.flatten(0, 1)
                if total is None:
                    total = rows.new_zeros(engine.count, engine.count)
                total.addmm_(rows.mT, rows)
    if total is None:
        raise ValueError("a curvature needs at least one example")
    values, vectors = torch.linalg.eigh(total)
    return DenseCurvature(values.clamp(min=0), vectors)


class DenseVariances:
    """Logits and their variances under a `DensePosterior`, with the interface of `src.jacobians.OutputVariances`."""

    def __init__(
        self, model: nn.Module, posterior: DensePosterior, *, full: bool = False, memory_mb: float = 128.0
    ) -> None:
        self._engine = _Jacobian(model, memory_mb)
        self._posterior, self._full = posterior, full
        self.model = self._engine.model

    def __enter__(self) -> Self:
        self._engine.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.__exit__(*error)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits (b, C) and float64 variances (b, C), or covariances (b, C, C) with ``full``, of a batch."""
        logits, variances = [], []
        for outputs, jacobian in self._engine.parts(images, logit_rows):
            logits.append(outputs)
            rotated = jacobian @ self._posterior.vectors
            variances.append(contracted(rotated, self._posterior.variances, self._full, overwrite=True))
        return torch.cat(logits), torch.cat(variances)


def output_variances(
    model: nn.Module, posterior: Posterior | DensePosterior, *, full: bool = False, memory_mb: float = 128.0
) -> OutputVariances | DenseVariances:
    """The engine that computes output variances under a posterior; see `OutputVariances`."""
    if isinstance(posterior, DensePosterior):
        return DenseVariances(model, posterior, full=full, memory_mb=memory_mb)
    return OutputVariances(model, posterior, full=full, memory_mb=memory_mb)
