"""GradMatch: a few weighted examples whose gradients sum to the full gradient (Killamsetty et al., ICML 2021).

Orthogonal matching pursuit on last-layer gradients that are never materialized. Let A be the matrix with the
gradients as columns and G = A^T A. The pursuit needs only columns of G and A^T b. The Cholesky factor L of
A_S^T A_S + lambda I grows by one row per pick. With ``Q = A^T A_S L^-T``, that row is a row of Q, the next column
of Q is ``(G_j - Q l) / pivot``, and the correlations A^T r decrease by a multiple of it. A pick costs one column of
G and one product with Q.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from src import rng
from src.cli import number, option
from src.coresets.inputs import (
    CandidateGroup,
    GreedyOptions,
    Method,
    Needs,
    Selection,
    SelectionInputs,
    gradient_norms,
    gradient_sum,
    inner_products,
    products_with,
    random_parts,
)
from src.lazy import scipy, torch

log = logging.getLogger(__name__)

_CLOSE = 1e-4  # ratio of residual to target at which the pursuit stops
_TIE = 1e-12  # relative to the largest initial correlation; smaller differences are rounding, and the index decides
_DEPENDENT = 1e-11  # ratio of pivot to squared norm below which a gradient lies in the span of the picks
_NOTHING = 1e-14  # ratio of the target to the sum of all norms below which the target is rounding noise
_SLACK = 1e-10  # relative to the largest product; slopes above the negative of this count as nonnegative
_ROUNDS = 100  # limit for block pivoting, which typically takes about ten


@dataclass(frozen=True)
class GradMatchOptions(GreedyOptions):
    """Options of GradMatch.

    Attributes:
        gradmatch_lambda: Ridge penalty lambda.
    """

    gradmatch_lambda: float = option(1.0, "gradmatch: ridge penalty", number(float, 0))


def gradmatch(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: GradMatchOptions) -> Selection:
    """GradMatch with weights, group by group (Killamsetty et al. 2021, algorithms 1 and 2; fill as in CORDS).

    The target of a group is the *sum* of its last-layer gradients. The mean would give the same picks and weights
    that differ only by the factor n (ridge and nonnegative least squares are homogeneous in the target). With the
    sum, large classes keep their weight relative to small ones. Picks with weight 0 in the final nonnegative solve
    stay in the selection to fill the budget. If the pursuit stops early, the rest of the budget is drawn from the
    unused examples, with weight 1.

    Memory: n k + k^2 + n (C + d) numbers of 8 bytes. If the first term exceeds ``selection_memory``, it is replaced
    by the residual itself (C (d + 1) numbers), and a pick costs n C d + k^2.

    With subsampling, each random part of a group is matched independently: the parts' gradient sums add up to the
    group's, and their errors add up at most. Random candidates for each pick would still leave the cost k^3 of
    solving for the weights. The objective is not submodular, so neither approach has an approximation bound.
    """
    epsilon = options.epsilon(groups)
    if epsilon is not None:
        groups = random_parts(groups, epsilon, rng.numpy_generator(inputs.seed, 0, "gradmatch parts"))
    ridge = options.gradmatch_lambda
    layer, generator = inputs.layers[0], rng.numpy_generator(inputs.seed, 0, "gradmatch fill")
    picks, weights, filled = [], [], 0
    for group in groups:
        members = layer.at(group.positions)
        chosen, values = pursue(
            members.errors.double(), members.embeddings.double(), group.budget, ridge, options.selection_memory
        )
        lacking = group.budget - len(chosen)
        if lacking:
            unused = np.setdiff1d(np.arange(len(group.positions)), chosen)
            chosen = np.concatenate([chosen, generator.choice(unused, lacking, replace=False)])
            values = np.concatenate([values, np.ones(lacking)])
            filled += lacking
        picks.append(group.positions[chosen])
        weights.append(values)
    if filled:
        log.info("gradmatch: the gradients match before the budget is spent; drawing %d examples at random", filled)
    return Selection.of(picks, weights).rescaled()


def pursue(
    errors: torch.Tensor, embeddings: torch.Tensor, budget: int, ridge: float, memory: int = 2048
) -> tuple[np.ndarray, np.ndarray]:
    """Orthogonal matching pursuit for the sum of all gradients.

    Each pick is the unused example with the largest <g_j, r> (ties go to the first), with r = b - A_S x and
    ``(A_S^T A_S + lambda I) x = A_S^T b``. The pursuit stops at the budget, or when ||r|| < 1e-4 ||b||.

    Args:
        errors: float64 ``(n, C)``.
        embeddings: float64 ``(n, d)``.
        budget: Maximum number of picks.
        ridge: lambda.
        memory: Memory limit of ``(k, n)`` numbers in MiB; above it, correlations are computed from the residual.

    Returns:
        Picks in selection order, int64 ``(m,)`` with m <= budget, and their weights >= 0, float64 ``(m,)``.
    """
    stored = 8 * budget * len(errors) <= memory * 2**20
    state = (_Stored if stored else _Recomputed)(errors, embeddings, budget, ridge)
    target = float(sum(part.square().sum() for part in state.target))  # ||b||^2
    if target <= (_NOTHING * float(state.norms.sum())) ** 2:
        return np.empty(0, dtype=np.int64), np.empty(0)
    slack = _TIE * float(state.correlations.abs().max())
    while len(state.picks) < budget and not state.factor.close(target):
        state.take(first_largest(state.correlations, slack))
    return np.array(state.picks, dtype=np.int64), _nonnegative_weights(state)


def first_largest(values: torch.Tensor, slack: float = 0.0) -> int:
    """Return the first index whose value is within ``slack`` of the largest (torch's argmax may return any tie)."""
    if values.device.type == "cpu":
        array = values.numpy()
        return int(np.argmax(array >= array.max() - slack))
    best = values >= values.max() - slack
    return int(torch.where(best, torch.arange(len(values), device=values.device), len(values)).min())


class _Factor:
    """L with ``L L^T = A_S^T A_S + lambda I`` and ``y = L^-1 A_S^T b``, over the linearly independent picks.

    Attributes:
        size: The number m of independent picks.
        members: Indices of the independent picks among all picks.
        lower: L in its first m rows and columns, ``(k, k)``; on the CPU, because each pick needs single entries.
        image: y in its first m entries, ``(k,)``.
        explained: ||y||^2.
    """

    def __init__(self, budget: int, ridge: float) -> None:
        self.ridge, self.size, self.explained = ridge, 0, 0.0
        self.members: list[int] = []
        self.lower, self.image = np.zeros((budget, budget)), np.zeros(budget)

    def append(self, number: int, row: np.ndarray, squared_norm: float, product: float) -> tuple[float, float] | None:
        """Add a pick; return its pivot and its entry of y, or None if its gradient is in the span of the others.

        Args:
            number: Its index among all picks.
            row: ``L^-1 A_S^T g``, ``(m,)``.
            squared_norm: ||g||^2.
            product: <g, r>, which equals ``<g, b> - row^T y``.
        """
        m, full = self.size, squared_norm + self.ridge
        pivot = full - float(row @ row)
        if pivot <= _DEPENDENT * full:
            return None
        pivot = math.sqrt(pivot)
        entry = product / pivot
        self.lower[m, :m] = row
        self.lower[m, m] = pivot
        self.image[m] = entry
        self.members.append(number)
        self.size += 1
        self.explained += entry * entry
        return pivot, entry

    def forward(self, columns: np.ndarray) -> np.ndarray:
        """``L^-1 columns``, with columns of shape ``(m,)`` or ``(m, p)``."""
        lower = self.lower[: self.size, : self.size]
        return scipy.linalg.solve_triangular(lower, columns, lower=True, check_finite=False)

    def solution(self) -> np.ndarray:
        """``x = L^-T y``, ``(m,)``."""
        lower, image = self.lower[: self.size, : self.size], self.image[: self.size]
        return scipy.linalg.solve_triangular(lower, image, lower=True, trans="T", check_finite=False)

    def close(self, target: float) -> bool:
        """Whether the residual is below 1e-4 of the target, given the target's squared norm.

        ``||r||^2 = ||b||^2 - ||y||^2 - lambda ||x||^2``. Because <r, b> = ||b||^2 - ||y||^2 is at most ||r|| ||b||,
        x is needed only if that product is small.
        """
        if target - self.explained >= _CLOSE * target:
            return False
        shrunk = self.ridge * float(np.square(self.solution()).sum()) if self.ridge else 0.0
        return target - self.explained - shrunk < _CLOSE**2 * target


class _State:
    """The state of the pursuit; ``correlations`` ``(n,)`` are A^T r, with -inf at the picks."""

    def __init__(self, errors: torch.Tensor, embeddings: torch.Tensor, budget: int, ridge: float) -> None:
        self.errors, self.embeddings = errors, embeddings
        self.target = gradient_sum(errors, embeddings)  # b
        self.correlations = products_with(*self.target, errors, embeddings)  # A^T b
        self.norms = gradient_norms(errors, embeddings)
        self.squared_norms = self.norms.square().tolist()
        self.factor = _Factor(budget, ridge)
        self.picks: list[int] = []

    def add(self, pick: int, row: np.ndarray) -> tuple[float, float] | None:
        """Add a pick to the factor."""
        product = float(self.correlations[pick])
        self.correlations[pick] = -math.inf
        self.picks.append(pick)
        return self.factor.append(len(self.picks) - 1, row, self.squared_norms[pick], product)


class _Stored(_State):
    """Stores the columns of Q: a pick costs a column of G and a product with Q, n (C + d + k)."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.columns = self.errors.new_empty(len(self.factor.image), len(self.errors))  # Q^T, (k, n)

    def take(self, pick: int) -> None:
        """Add a pick and update the correlations."""
        m = self.factor.size
        row = self.columns[:m, pick].clone()  # a row of Q: L^-1 A_S^T g without a solve
        added = self.add(pick, row.cpu().numpy())
        if added is None:
            return
        pivot, entry = added
        column = torch.mv(self.errors, self.errors[pick])
        column.addcmul_(column.clone(), torch.mv(self.embeddings, self.embeddings[pick]))  # a column of G
        new = self.columns[m]
        torch.addmv(column, self.columns[:m].T, row, beta=1 / pivot, alpha=-1 / pivot, out=new)
        self.correlations.sub_(new, alpha=entry)


class _Recomputed(_State):
    """Stores the residual, C (d + 1) numbers, and nothing of size n k: a pick costs (n + k) C d + k^2."""

    def take(self, pick: int) -> None:
        """Add a pick and update the correlations."""
        independent = [self.picks[number] for number in self.factor.members]
        ours = self.errors[independent], self.embeddings[independent]
        column = inner_products(*ours, self.errors[pick : pick + 1], self.embeddings[pick : pick + 1])[:, 0]
        row = self.factor.forward(column.cpu().numpy()) if independent else np.empty(0)
        if self.add(pick, row) is None:
            return
        independent.append(pick)
        solution = torch.from_numpy(self.factor.solution()).to(self.errors.device)
        bias, weight = gradient_sum(self.errors[independent] * solution[:, None], self.embeddings[independent])
        residual = self.target[0] - bias, self.target[1] - weight
        self.correlations = products_with(*residual, self.errors, self.embeddings)
        self.correlations[self.picks] = -math.inf


def _nonnegative_weights(state: _State) -> np.ndarray:
    """The minimizer of ||A_S w - b||^2 + lambda ||w||^2 over w >= 0, ``(m,)`` in selection order.

    If the pursuit's last x has no negative entry, it is the minimizer. Otherwise, block pivoting starts from its
    positive entries, most of which stay positive. The general solver, applied to the equivalent problem L^T w = y, is
    the fallback if pivoting does not converge, or if picks are dependent (no ridge, more picks than dimensions).
    """
    factor, count = state.factor, len(state.picks)
    weights = np.zeros(count)
    weights[factor.members] = factor.solution()
    if (weights >= 0).all():
        return weights
    errors, embeddings = state.errors[state.picks], state.embeddings[state.picks]
    gram = inner_products(errors, embeddings).cpu().numpy()
    if factor.size == count:
        ridged = gram + factor.ridge * np.eye(count)
        found = pivoted(ridged, factor.lower[:count, :count] @ factor.image[:count], weights > 0)
        if found is not None:
            return found
    columns = factor.forward(gram[factor.members])  # dependent gradients in the basis of the independent ones
    columns[:, factor.members] = factor.lower[: factor.size, : factor.size].T
    return scipy.optimize.nnls(columns, factor.image[: factor.size], maxiter=30 * count)[0]


def pivoted(gram: np.ndarray, product: np.ndarray, positive: np.ndarray) -> np.ndarray | None:
    """Minimize ``w^T M w / 2 - q^T w`` over w >= 0 by block principal pivoting (Portugal et al. 1994).

    Each round solves for the entries in the positive set and moves every entry with the wrong sign to the other set.
    If that stops making progress, only the last such entry is moved, which guarantees termination. The method is
    exact: the result satisfies the optimality conditions.

    Args:
        gram: M, positive definite, ``(m, m)``.
        product: q, ``(m,)``.
        positive: Initial positive set, bool ``(m,)``.

    Returns:
        w, ``(m,)``; None if it does not converge or M is numerically singular.
    """
    positive, slack = positive.copy(), _SLACK * np.abs(product).max()
    fewest, chances = len(product) + 1, 3
    for _ in range(_ROUNDS):
        weights = np.zeros(len(product))
        held = np.flatnonzero(positive)
        try:
            solver = scipy.linalg.cho_factor(gram[np.ix_(held, held)], lower=True, overwrite_a=True)
        except np.linalg.LinAlgError:
            return None
        weights[held] = scipy.linalg.cho_solve(solver, product[held])
        wrong = np.where(positive, weights < 0, gram @ weights - product < -slack)
        count = int(wrong.sum())
        if not count:
            return weights
        if count < fewest:
            fewest, chances = count, 3
        elif chances:
            chances -= 1
        else:
            wrong[: np.flatnonzero(wrong)[-1]] = False
        positive ^= wrong
    return None


METHODS = (
    Method(
        "gradmatch",
        gradmatch,
        Needs(logits=True, embeddings=True),
        paper="Killamsetty et al. 2021 (GradMatch)",
        equation="orthogonal matching pursuit: min ||sum_S w_i g_i - sum_j g_j||^2 + lambda ||w||^2, w >= 0 (alg. 2)",
        cost="n k (C + d) + n k^2; subsampled: n (C + d)",
        weighted=True,
        options=GradMatchOptions,
    ),
)
