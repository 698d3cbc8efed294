"""Graph cut: examples that are similar to all others but not to each other (Iyer et al., ALT 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from src import rng
from src.coresets.inputs import (
    CandidateGroup,
    Draws,
    GreedyOptions,
    LastLayer,
    Method,
    Needs,
    Selection,
    SelectionInputs,
    gradient_sum,
    inner_products,
    products_with,
)
from src.lazy import torch

_LAMBDA = 1.0
_NOISE = 1e-12  # per candidate: gains are sums over all candidates, and closer gains are ties
_ROWS = 256  # rows of the dense matrix computed at once, so that a block stays in cache while it is mirrored
_DENSE_SHARE = 0.2  # fraction of candidates picked, below which single columns cost less than the matrix


@dataclass(frozen=True)
class Similarities:
    """Similarities ``s_ij = (1 + cos(g_i, g_j)) / 2`` of last-layer gradients, as factors.

    With errors divided by gradient norms, ``cos(g_i, g_j) = <e_i, e_j> (1 + <h_i, h_j>)``. A zero gradient has cosine
    0, and so s = 0.5, with all examples including itself.

    Memory: ``n (C + d)`` float64 numbers.

    Attributes:
        errors: ``e_i / ||g_i||``, float64 ``(n, C)``; zeros for a zero gradient.
        embeddings: h, float64 ``(n, d)``.
    """

    errors: torch.Tensor
    embeddings: torch.Tensor

    @classmethod
    def of(cls, layer: LastLayer) -> Similarities:
        """Build the similarities between a layer's candidates."""
        errors, embeddings = layer.errors.double(), layer.embeddings.double()
        largest = errors.abs().amax(dim=1, keepdim=True)
        errors = errors / largest.where(largest > 0, 1.0)  # squares of tiny errors would underflow
        norms = torch.linalg.vector_norm(errors, dim=1) * (1.0 + embeddings.square().sum(dim=1)).sqrt()
        return cls(errors / norms.where(norms > 0, 1.0)[:, None], embeddings)

    def __len__(self) -> int:
        return len(self.errors)

    def sums(self) -> np.ndarray:
        """``sum_i s_ij`` over all candidates i, ``(n,)``, from one product with the sum of normalized gradients."""
        bias, weight = gradient_sum(self.errors, self.embeddings)
        cosines = products_with(bias, weight, self.errors, self.embeddings)
        return ((len(self) + cosines) / 2.0).cpu().numpy()

    def column(self, position: int) -> np.ndarray:
        """``s_ij`` for one j, ``(n,)``, in time n (C + d)."""
        cosines = inner_products(
            self.errors,
            self.embeddings,
            self.errors[position : position + 1],
            self.embeddings[position : position + 1],
        )
        return cosines[:, 0].add_(1.0).div_(2.0).cpu().numpy()

    def matrix(self) -> np.ndarray:
        """All similarities, ``(n, n)``. Only those on and above the diagonal are computed; the others are copies."""
        matrix = np.empty((len(self), len(self)))
        for first in range(0, len(self), _ROWS):
            last = first + _ROWS
            rows = slice(first, last)
            block = inner_products(
                self.errors[rows], self.embeddings[rows], self.errors[first:], self.embeddings[first:]
            )
            matrix[rows, first:] = block.add_(1.0).div_(2.0).cpu().numpy()
            matrix[last:, rows] = matrix[rows, last:].T
        return matrix


def greedy_graph_cut(sums: np.ndarray, column: Callable[[int], np.ndarray], budget: int) -> np.ndarray:
    """Greedily maximize ``lambda sum_{i in V, j in S} s_ij - sum_{i, j in S} s_ij``.

    The gain of x is ``lambda sum_i s_ix - 2 sum_{j in S} s_jx`` (without the self term ``s_xx``, as in the published
    code). Gains are stored, and each pick subtracts one column. They only decrease, and picking continues when they
    are negative. Gains that differ only by rounding count as equal; ties go to the lower index.

    Time: ``k n`` and k columns. Memory: a few times n.

    Args:
        sums: ``sum_i s_ij``, float64 ``(n,)``.
        column: Returns ``s_ij`` ``(n,)`` for a position j.
        budget: k, at most n.

    Returns:
        Positions ``(k,)`` in selection order.
    """
    halves = _LAMBDA / 2.0 * sums  # half the gain
    noise = _NOISE * len(sums)
    picks = np.empty(budget, dtype=np.int64)
    for step in range(budget):
        top = halves.argmax()  # ties can only be before it, as numpy's argmax returns the first match
        position = picks[step] = (halves[: top + 1] >= halves[top] - noise).argmax()
        halves -= column(position)
        halves[position] = -np.inf
    return picks


def stochastic_graph_cut(similarities: Similarities, budget: int, draws: Draws) -> np.ndarray:
    """Like :func:`greedy_graph_cut`, but each pick is the best of a random subset.

    ``sum_{j in S} s_jx`` equals ``(|S| + <g_x, sum_{j in S} g_j>) / 2`` for normalized gradients g, so a candidate
    costs C d and no column is needed. Time: ``n C d ln(1 / epsilon)``.
    """
    errors, embeddings = similarities.errors, similarities.embeddings
    halves, noise = _LAMBDA / 2.0 * similarities.sums(), _NOISE * len(similarities)
    bias, weight = torch.zeros_like(errors[0]), torch.zeros_like(errors[0][:, None] * embeddings[0])
    picks = np.empty(budget, dtype=np.int64)
    for step in range(budget):
        drawn = draws.draw()
        rows = torch.from_numpy(drawn).to(errors.device)
        cosines = products_with(bias, weight, errors[rows], embeddings[rows]).cpu().numpy()
        gains = halves[drawn] - (step + cosines) / 2.0
        position = picks[step] = drawn[(gains >= gains.max() - noise).argmax()]
        draws.take(position)
        bias += errors[position]
        weight.addr_(errors[position], embeddings[position])
    return picks


def graph_cut_picks(layer: LastLayer, budget: int, memory: int) -> np.ndarray:
    """Pick ``(k,)`` of a layer's candidates, in selection order.

    Args:
        layer: The candidates.
        budget: k.
        memory: Memory limit of the dense matrix in MiB; above it, columns are computed from the factors.
    """
    similarities = Similarities.of(layer)
    size = len(similarities)
    if 8 * size**2 <= memory * 2**20 and budget > _DENSE_SHARE * size:
        return greedy_graph_cut(similarities.sums(), similarities.matrix().__getitem__, budget)
    return greedy_graph_cut(similarities.sums(), similarities.column, budget)


def graph_cut(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: GreedyOptions) -> Selection:
    """Graph cut (Iyer et al., ALT 2021, generalized graph cut with lambda 1; the form of Guo et al., 2022).

    Computed in float64. Memory: ``n (C + d)`` numbers per group, and the n x n similarity matrix in main memory if it
    fits in ``selection_memory`` and more than a fifth of the group is picked; otherwise no n x n array exists. Both
    ways give the same picks.

    With subsampling, this is stochastic greedy. The function is submodular, but it increases only while a pick's
    similarities to all examples sum to more than twice those to the picks, up to about half of a group. Beyond that,
    the bound of :class:`Draws` does not hold.

    Args:
        inputs: One layer with ``embeddings``.
        groups: The groups of candidates.
        options: ``selection_memory`` in MiB, and ``selection_subsample``.
    """
    layer, epsilon = inputs.layers[0], options.epsilon(groups)
    generator = rng.numpy_generator(inputs.seed, 0, "graph cut candidates")
    picks = []
    for group in groups:
        members, budget = layer.at(group.positions), group.budget
        if epsilon is None:
            chosen = graph_cut_picks(members, budget, options.selection_memory)
        else:
            draws = Draws(len(group.positions), budget, epsilon, generator)
            chosen = stochastic_graph_cut(Similarities.of(members), budget, draws)
        picks.append(group.positions[chosen])
    return Selection.of(picks)


METHODS = (
    Method(
        "graph_cut",
        graph_cut,
        Needs(logits=True, embeddings=True),
        paper="Iyer et al. 2021",
        equation="greedy for sum_{i in V, j in S} s_ij - sum_{i,j in S} s_ij, s = (1 + cos of last-layer "
        "gradients) / 2",
        cost="n^2 (C + d) + n k; beyond selection_memory: n k (C + d); subsampled: n C d",
        options=GreedyOptions,
    ),
)
