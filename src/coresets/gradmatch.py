"""GradMatch: few weighted examples whose gradients add up to the gradient of all (Killamsetty et al., ICML 2021).

Orthogonal matching pursuit on last-layer gradients that are never written down. With A the gradients as columns and
G = A^T A, everything the pursuit needs follows from columns of G and from A^T b: the Cholesky factor L of
A_S^T A_S + lambda I grows by one row per pick, and with ``Q = A^T A_S L^-T`` that row is a row of Q, the next column
of Q is ``(G_j - Q l) / pivot``, and the correlations A^T r fall by a multiple of it. A pick costs one column of G and
one product with Q.
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

_CLOSE = 1e-4  # residual over target at which the pursuit stops
_TIE = 1e-12  # of the largest correlation at the start: differences below are rounding, and the index decides
_DEPENDENT = 1e-11  # pivot over squared norm below which a gradient lies in the span of the picks
_NOTHING = 1e-14  # target over the sum of all norms below which it is rounding
_SLACK = 1e-10  # of the largest product: slopes down to minus this count as not negative
_ROUNDS = 100  # of block pivoting; it settles in about ten


@dataclass(frozen=True)
class GradMatchOptions(GreedyOptions):
    """Options of GradMatch.

    Attributes:
        gradmatch_lambda: Ridge.
    """

    gradmatch_lambda: float = option(1.0, "gradmatch: its ridge", number(float, 0))


def gradmatch(inputs: SelectionInputs, groups: Sequence[CandidateGroup], options: GradMatchOptions) -> Selection:
    """GradMatch with weights, group by group (Killamsetty et al. 2021, algorithms 1 and 2; fill as in CORDS).

    The target of a group is the *sum* of its last-layer gradients. The mean would give the same picks and weights
    that differ by the factor n alone (ridge and non-negative least squares are homogeneous in the target); with the
    sum, large classes keep their weight against small ones. Picks that the final non-negative solve gives weight 0
    stay, to fill the budget; what an early stop leaves of it is drawn from the unused examples, with weight 1.

    Memory: n k + k^2 + n (C + d) numbers of 8 bytes; where the first is more than ``selection_memory``, the residual
    itself (C (d + 1) numbers) replaces it, and a pick costs n C d + k^2.

    Subsampled, each of a group's random parts is matched on its own: the sums of their gradients add up to the
    group's, and so do their errors at most. (Random candidates for each pick would leave the cost of solving for the
    weights, k^3; the objective is not submodular, and neither way has a bound.)
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
        log.info("gradmatch: fewer examples match the gradient; %d of the budget are drawn at random", filled)
    return Selection.of(picks, weights).rescaled()


def pursue(
    errors: torch.Tensor, embeddings: torch.Tensor, budget: int, ridge: float, memory: int = 2048
) -> tuple[np.ndarray, np.ndarray]:
    """Orthogonal matching pursuit for the sum of all gradients.

    Each pick is the unused example of the largest <g_j, r> (of equals the first), r = b - A_S x with
    ``(A_S^T A_S + lambda I) x = A_S^T b``; it ends at the budget, or where ||r|| < 1e-4 ||b||.

    Args:
        errors: float64 ``(n, C)``.
        embeddings: float64 ``(n, d)``.
        budget: Most picks.
        ridge: lambda.
        memory: MiB that ``(k, n)`` numbers may take; above, correlations come from the residual itself.

    Returns:
        The picks in their order, int64 ``(m,)`` with m <= budget, and their weights >= 0, float64 ``(m,)``.
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
    """The first index whose value is within ``slack`` of the largest (``argmax`` promises no order of equals)."""
    if values.device.type == "cpu":
        array = values.numpy()
        return int(np.argmax(array >= array.max() - slack))
    best = values >= values.max() - slack
    return int(torch.where(best, torch.arange(len(values), device=values.device), len(values)).min())


class _Factor:
    """L with ``L L^T = A_S^T A_S + lambda I`` and ``y = L^-1 A_S^T b``, over the picks that are independent.

    Attributes:
        size: How many those are, m.
        members: Numbers of those picks, in the order of all picks.
        lower: L in its first m rows and columns, ``(k, k)``; on the host, as each pick needs single numbers of it.
        image: y in its first m positions, ``(k,)``.
        explained: ||y||^2.
    """

    def __init__(self, budget: int, ridge: float) -> None:
        self.ridge, self.size, self.explained = ridge, 0, 0.0
        self.members: list[int] = []
        self.lower, self.image = np.zeros((budget, budget)), np.zeros(budget)

    def append(self, number: int, row: np.ndarray, squared_norm: float, product: float) -> tuple[float, float] | None:
        """Add a pick, and return its pivot and its entry of y; None where its gradient is in the span of the others.

        Args:
            number: Its position among all picks.
            row: ``L^-1 A_S^T g``, ``(m,)``.
            squared_norm: ||g||^2.
            product: <g, r>, which is ``<g, b> - row^T y``.
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
        """``L^-1 columns``, of shape ``(m,)`` or ``(m, p)``."""
        lower = self.lower[: self.size, : self.size]
        return scipy.linalg.solve_triangular(lower, columns, lower=True, check_finite=False)

    def solution(self) -> np.ndarray:
        """``x = L^-T y``, ``(m,)``."""
        lower, image = self.lower[: self.size, : self.size], self.image[: self.size]
        return scipy.linalg.solve_triangular(lower, image, lower=True, trans="T", check_finite=False)

    def close(self, target: float) -> bool:
        """Whether the residual is below 1e-4 of the target, whose squared norm is given.

        ``||r||^2 = ||b||^2 - ||y||^2 - lambda ||x||^2``. As <r, b> = ||b||^2 - ||y||^2 is at most ||r|| ||b||, x is
        needed only where that product is small.
        """
        if target - self.explained >= _CLOSE * target:
            return False
        shrunk = self.ridge * float(np.square(self.solution()).sum()) if self.ridge else 0.0
        return target - self.explained - shrunk < _CLOSE**2 * target


class _State:
    """The pursuit after some picks; ``correlations`` ``(n,)`` are A^T r, minus infinity at the picks."""

    def __init__(self, errors: torch.Tensor, embeddings: torch.Tensor, budget: int, ridge: float) -> None:
        self.errors, self.embeddings = errors, embeddings
        self.target = gradient_sum(errors, embeddings)  # b
        self.correlations = products_with(*self.target, errors, embeddings)  # A^T b
        self.norms = gradient_norms(errors, embeddings)
        self.squared_norms = self.norms.square().tolist()
        self.factor = _Factor(budget, ridge)
        self.picks: list[int] = []

    def add(self, pick: int, row: np.ndarray) -> tuple[float, float] | None:
        """Bring a pick into the factor."""
        product = float(self.correlations[pick])
        self.correlations[pick] = -math.inf
        self.picks.append(pick)
        return self.factor.append(len(self.picks) - 1, row, self.squared_norms[pick], product)


class _Stored(_State):
    """With the columns of Q kept: a pick costs a column of G and a product with Q, n (C + d + k)."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.columns = self.errors.new_empty(len(self.factor.image), len(self.errors))  # Q^T, (k, n)

    def take(self, pick: int) -> None:
        """Add a pick and update the correlations."""
        m = self.factor.size
        row = self.columns[:m, pick].clone()  # of Q: L^-1 A_S^T g without a solve
        added = self.add(pick, row.cpu().numpy())
        if added is None:
            return
        pivot, entry = added
        column = torch.mv(self.errors, self.errors[pick])
        column.addcmul_(column.clone(), torch.mv(self.embeddings, self.embeddings[pick]))  # of G
        new = self.columns[m]
        torch.addmv(column, self.columns[:m].T, row, beta=1 / pivot, alpha=-1 / pivot, out=new)
        self.correlations.sub_(new, alpha=entry)


class _Recomputed(_State):
    """With the residual itself, C (d + 1) numbers: nothing of size n k is kept, a pick costs (n + k) C d + k^2."""

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
    """The minimizer of ||A_S w - b||^2 + lambda ||w||^2 over w >= 0, ``(m,)`` in the order of the picks.

    Where the last x of the pursuit has no negative entry, it is the minimizer. Else block pivoting starts from its
    positive entries, most of which stay; the general solver on L^T w = y, the same problem, steps in where pivoting
    does not settle, or where picks are dependent (no ridge, more picks than dimensions).
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
    columns = factor.forward(gram[factor.members])  # a dependent gradient in the coordinates of the others
    columns[:, factor.members] = factor.lower[: factor.size, : factor.size].T
    return scipy.optimize.nnls(columns, factor.image[: factor.size], maxiter=30 * count)[0]


def pivoted(gram: np.ndarray, product: np.ndarray, positive: np.ndarray) -> np.ndarray | None:
    """The minimizer of ``w^T M w / 2 - q^T w`` over w >= 0 by block principal pivoting (Portugal et al. 1994).

    Each round solves for the entries held positive and moves every entry of the wrong sign to the other side; where
    that stops making progress, the last of them alone, which ends. It is exact: what it returns meets the optimality
    conditions.

    Args:
        gram: M, positive definite, ``(m, m)``.
        product: q, ``(m,)``.
        positive: Entries to start from, bool ``(m,)``.

    Returns:
        w, ``(m,)``; None where it does not settle, or M is numerically singular.
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
        Needs(embeddings=True),
        paper="Killamsetty et al. 2021 (GradMatch)",
        equation="orthogonal matching pursuit: min ||sum_S w_i g_i - sum_j g_j||^2 + lambda ||w||^2, w >= 0 (alg. 2)",
        cost="n k (C + d) + n k^2; subsampled: n (C + d)",
        weighted=True,
        options=GradMatchOptions,
    ),
)
