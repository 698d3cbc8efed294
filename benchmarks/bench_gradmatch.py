"""GradMatch: the picks of a class by matching pursuit, through inner products and on gradients written down.

    python -m benchmarks.bench_gradmatch [--quick]

The plain way holds the C (d + 1) x n matrix of last-layer gradients and solves each pick's problem from scratch: the
ridged least-squares problem itself, or its normal equations. Ours is ``pursue``. Both start from errors and
embeddings in float64; the picks and weights of both are compared on the way. The last rows have no plain way: its
matrix has 0.2 GB for 10 classes and 2 GB for 100, and its normal equations take 1e13 and 1e14 operations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.common import Row, in_turn, run
from src.coresets.gradmatch import pursue
from src.coresets.material import errors_of

RIDGE = 1.0

Solve = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Case:
    """A class of ``count`` examples, the picks, how the plain way solves, how often to time, what is asked for."""

    classes: int
    count: int
    picks: int
    plain: str | None
    repeats: int
    target: float | None = None
    width: int = 512


CASES = (
    Case(10, 1_000, 150, "least squares", 2, 50.0),
    Case(10, 1_000, 150, "normal equations", 3),
    Case(100, 1_000, 150, "normal equations", 1, 50.0),
    Case(10, 5_000, 1_500, None, 1),
    Case(100, 5_000, 1_500, None, 1),
)


def one_class(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors ``(n, C)`` of random logits that favour the label, and embeddings ``(n, d)`` as after a ReLU."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(case.count, case.classes, dtype=torch.float64, generator=generator)
    logits[:, 0] += 2
    embeddings = torch.randn(case.count, case.width, dtype=torch.float64, generator=generator).clamp_min(0)
    return errors_of(logits, torch.zeros(case.count, dtype=torch.int64)), embeddings


def least_squares(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The ridged least-squares problem by numpy's solver."""
    size = columns.shape[1]
    stacked = np.vstack([columns, math.sqrt(RIDGE) * np.eye(size)])
    return np.linalg.lstsq(stacked, np.concatenate([target, np.zeros(size)]), rcond=None)[0]


def normal_equations(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The same through its normal equations."""
    return np.linalg.solve(columns.T @ columns + RIDGE * np.eye(columns.shape[1]), columns.T @ target)


SOLVERS: dict[str, Solve] = {"least squares": least_squares, "normal equations": normal_equations}


def written_down(errors: torch.Tensor, embeddings: torch.Tensor, picks: int, solve: Solve) -> tuple:
    """Picks in their order and the last solution."""
    weight = (errors[:, :, None] * embeddings[:, None, :]).flatten(1)
    gradients = torch.cat([errors, weight], dim=1).numpy().T  # (C (d + 1), n), a gradient lies in one piece
    target = gradients.sum(axis=1)
    residual, chosen = target, []
    while len(chosen) < picks and np.linalg.norm(residual) >= 1e-4 * np.linalg.norm(target):
        products = gradients.T @ residual
        products[chosen] = -np.inf
        chosen.append(int(products.argmax()))
        columns = gradients[:, chosen]
        solution = solve(columns, target)
        residual = target - columns @ solution
    return chosen, solution


def measure_case(case: Case) -> Row:
    """Time one case.

    Raises:
        RuntimeError: The two ways disagree.
    """
    errors, embeddings = one_class(case)
    name, found = f"GradMatch, {case.picks:,} of {case.count:,}, {case.classes} classes", {}

    def ours() -> None:
        found.update(ours=pursue(errors, embeddings, case.picks, RIDGE))

    if case.plain is None:
        return Row(f"{name} (ours alone)", math.nan, *in_turn((ours,), case.repeats), "s")

    def plain() -> None:
        found.update(plain=written_down(errors, embeddings, case.picks, SOLVERS[case.plain]))

    times = in_turn((plain, ours), case.repeats)
    (picks, weights), (wanted, solution) = found["ours"], found["plain"]
    if picks.tolist() != wanted:
        raise RuntimeError(f"{name}: the two ways pick different examples")
    if (solution >= 0).all() and not np.allclose(weights, solution, rtol=1e-8):
        raise RuntimeError(f"{name}: weights differ by {np.abs(weights - solution).max()}")
    return Row(f"{name}, {case.plain}", *times, "s", case.target)


def measure(quick: bool = False) -> list[Row]:
    """Time every case on one thread.

    Raises:
        RuntimeError: The two ways disagree.
    """
    torch.set_num_threads(1)
    if not quick:
        return [measure_case(case) for case in CASES]
    toys = (replace(case, count=case.count // 20, picks=case.picks // 20, width=16, repeats=1) for case in CASES)
    return [measure_case(replace(case, plain=case.plain or "normal equations")) for case in toys]


def main() -> None:
    run(measure, __doc__)


if __name__ == "__main__":
    main()
