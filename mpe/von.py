"""Variational online Newton (VON): Bayesian softmax regression with a full covariance (Nickl et al. 2023, Eq. 29)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import TrainingError


def row_basis(features: Tensor) -> Tensor:
    """Compute an orthonormal basis (D, r) of the space that features (n, D) span.

    VON on ``features @ basis`` is VON on the features: in the remaining directions, the mean stays 0 and the
    precision stays a multiple of the identity, and neither affects the logits of these examples.
    """
    _, values, rows = torch.linalg.svd(features.double(), full_matrices=False)
    least = values.max() * max(features.shape) * torch.finfo(torch.float64).eps
    return rows[values > least].mT.to(features.dtype)


class Von:
    """A Gaussian N(m, S^-1) over the weights of a softmax regression, updated by variational online Newton.

    The loss is the sum of the cross-entropies of all N examples, and the prior N(0, I / delta). With a batch of b
    examples and learning rates rho and rho_S, an update computes::

        g = N/b sum_i E_q[grad l_i] + delta m
        H = N/b sum_i E_q[Hessian l_i] + delta I
        S = (1 - rho_S) S + rho_S H
        m = m - rho S^-1 g

    Expectations are means over samples from N(m, S^-1). At a fixed point, ``E_q[sum of grad l_i] + delta m = 0`` and
    ``S = E_q[sum of Hessians] + delta I``, the conditions for the best Gaussian approximation of the posterior.

    Args:
        classes: C.
        features: D, with a constant feature for the bias.
        num_examples: N.
        delta: Prior precision.
        precision_init: The initial S is this multiple of the identity; the initial m is 0.
        like: A tensor with the dtype and device of the parameters.

    Attributes:
        mean: m, (C, D).
        precision: S, (C D, C D), for ``mean.flatten()``.
    """

    def __init__(
        self, classes: int, features: int, *, num_examples: int, delta: float, precision_init: float, like: Tensor
    ) -> None:
        self.num_examples, self.delta = num_examples, delta
        self.mean = like.new_zeros(classes, features)
        self.precision = torch.diag(like.new_full((self.mean.numel(),), precision_init))
        self._root = self.precision.sqrt()

    def step(self, features: Tensor, labels: Tensor, noise: Tensor, rate: float, precision_rate: float) -> None:
        """Update mean and precision.

        Args:
            features: (b, D).
            labels: int64 (b,).
            noise: Standard normal (samples, C D).
            rate: rho.
            precision_rate: rho_S.

        Raises:
            TrainingError: The mean is not finite, or the precision is not positive definite.
        """
        (c, d), scale = self.mean.shape, self.num_examples / len(features)
        offsets = torch.linalg.solve_triangular(self._root.mT, noise.mT, upper=True).mT
        p = (features @ (self.mean + offsets.view(-1, c, d)).mT).softmax(2)  # (samples, b, C)
        curvature = (torch.diag_embed(p) - p.unsqueeze(3) * p.unsqueeze(2)).mean(0)  # (b, C, C)
        errors = p.mean(0) - nn.functional.one_hot(labels, c)
        gradient = scale * errors.mT @ features + self.delta * self.mean
        self.precision.mul_(1.0 - precision_rate).diagonal().add_(precision_rate * self.delta)
        blocks = self.precision.view(c, d, c, d)
        for i in range(c):
            for j in range(i + 1):  # only the lower triangle is used
                weighted = curvature[:, i, j].unsqueeze(1) * features
                blocks[i, :, j].addmm_(features.mT, weighted, alpha=precision_rate * scale)
        self._root, failed = torch.linalg.cholesky_ex(self.precision)
        self.mean -= rate * torch.cholesky_solve(gradient.reshape(-1, 1), self._root).view(c, d)
        if bool(failed) or not bool(self.mean.isfinite().all()):
            raise TrainingError(
                "the mean of VON is not finite, or its precision is not positive definite; lower --lr or "
                "--lr_precision, or increase --delta or --hess_init"
            )

    def predict(self, features: Tensor, *, full: bool) -> tuple[Tensor, Tensor]:
        """Compute the logits (n, C) at the mean, and their variances (n, C), or covariances (n, C, C) if ``full``."""
        c, d = self.mean.shape
        covariance = torch.cholesky_inverse(self._root).view(c, d, c, d)
        found = features.new_empty(len(features), c, c)
        for i in range(c):
            for j in range(i + 1) if full else (i,):
                found[:, i, j] = found[:, j, i] = ((features @ covariance[i, :, j]) * features).sum(1)
        return features @ self.mean.mT, found if full else found.diagonal(dim1=1, dim2=2)

    def state(self) -> dict[str, Tensor]:
        """Return what the next update depends on."""
        return {"mean": self.mean, "precision": self.precision}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by ``state``."""
        self.mean, self.precision = (state[name].to(self.mean) for name in ("mean", "precision"))
        self._root = torch.linalg.cholesky(self.precision)
