"""Norms and inner products of last-layer gradients, from their factors and from the gradients themselves.

    python -m benchmarks.bench_last_layer [--quick]

1,000 examples, 100 classes, embeddings of 512 numbers: a gradient has 51,300. The plain way builds them (205 MB).
Both ways' results are compared on the way.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import Row, in_turn, run
from src.coresets.last_layer import gradient_norms, inner_products

CASES: tuple[tuple[str, Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor], float], ...] = (
    ("inner products", inner_products, lambda gradients: gradients @ gradients.T, 30.0),
    ("norms", gradient_norms, lambda gradients: gradients.norm(dim=1), 100.0),
)


def materialised(errors: Tensor, embeddings: Tensor) -> Tensor:
    """The gradients ``[e, e (x) h]``, ``(n, C (d + 1))``."""
    return torch.cat([errors, (errors[:, :, None] * embeddings[:, None, :]).flatten(1)], dim=1)


def measure(quick: bool = False) -> list[Row]:
    """Time norms and inner products both ways.

    Raises:
        RuntimeError: The two ways disagree.
    """
    torch.set_num_threads(1)
    count, classes, size, repeats = (20, 5, 8, 1) if quick else (1_000, 100, 512, 5)
    draw = torch.Generator().manual_seed(0)
    errors = torch.softmax(3.0 * torch.randn(count, classes, generator=draw), dim=1)
    errors -= torch.eye(classes)[torch.randint(classes, (count,), generator=draw)]
    embeddings = torch.randn(count, size, generator=draw).relu()
    rows = []
    for name, factored, from_gradients, target in CASES:
        found: dict[str, Tensor] = {}
        ways = (
            lambda found=found, plain=from_gradients: found.update(plain=plain(materialised(errors, embeddings))),
            lambda found=found, ours=factored: found.update(ours=ours(errors, embeddings)),
        )
        plain, ours = in_turn(ways, repeats)
        expected = found["plain"].to(found["ours"])
        if not torch.allclose(found["ours"], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
            raise RuntimeError(f"{name}: the two ways disagree")
        rows.append(Row(f"last-layer gradients: {name}", 1e3 * plain, 1e3 * ours, "ms per 1,000 examples", target))
    return rows


def main() -> None:
    run(measure, __doc__)


if __name__ == "__main__":
    main()
