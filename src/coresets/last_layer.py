"""Last-layer gradients without materialising them.

The gradient of an example's cross-entropy in the bias and weights of the last layer is ``g = [e, e (x) h]`` with the
error ``e = softmax(z) - onehot(y)`` and the embedding ``h``: C (d + 1) numbers, of which C + d matter.
"""

import torch


def gradient_norms(errors: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """``||g_i|| = ||e_i|| sqrt(1 + ||h_i||^2)``, float64 ``(n,)``, from errors ``(n, C)`` and embeddings ``(n, d)``.

    The squares are summed in float64, where those of small errors do not vanish.
    """
    error, embedding = (torch.linalg.vector_norm(t, dim=1, dtype=torch.float64) for t in (errors, embeddings))
    return error * (1.0 + embedding.square()).sqrt()


def inner_products(
    errors: torch.Tensor,
    embeddings: torch.Tensor,
    other_errors: torch.Tensor | None = None,
    other_embeddings: torch.Tensor | None = None,
) -> torch.Tensor:
    """``<g_i, g_j> = <e_i, e_j> (1 + <h_i, h_j>)``, ``(n, m)``, in the inputs' type.

    Args:
        errors: ``(n, C)``.
        embeddings: ``(n, d)``.
        other_errors: ``(m, C)``; default the same examples.
        other_embeddings: ``(m, d)``.
    """
    other_errors = errors if other_errors is None else other_errors
    other_embeddings = embeddings if other_embeddings is None else other_embeddings
    return (embeddings @ other_embeddings.T).add_(1.0).mul_(errors @ other_errors.T)


def gradient_sum(errors: torch.Tensor, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum_i g_i`` as bias part ``(C,)`` and weight part ``(C, d)``."""
    return errors.sum(dim=0), errors.T @ embeddings


def products_with(
    bias: torch.Tensor, weight: torch.Tensor, errors: torch.Tensor, embeddings: torch.Tensor
) -> torch.Tensor:
    """``<g_i, v>`` for ``v = [bias (C,), weight (C, d)]``, ``(n,)``."""
    return ((embeddings @ weight.T).add_(bias) * errors).sum(dim=1)
