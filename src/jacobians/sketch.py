"""Random sketches of Jacobians: inner products of all examples' gradients in few numbers, unbiased, with an error.

Every entry of a parameter's gradient gets a random sign, and entries whose positions differ by a multiple of D are
added: a count sketch (Charikar et al. 2002) with positions that are assigned in turn. Signs are independent, so inner
products are right in expectation; their variance is about ``(|x|^2 |y|^2 + (x . y)^2) / D``.
"""

import torch
from torch import Tensor, nn

from src import rng
from src.jacobians.capture import Record
from src.jacobians.engine import PerExampleEngine, Quantities
from src.jacobians.gram import flat_rows, weight_rows


class _Sketcher(PerExampleEngine):
    """Adds up the sketches of all parameters' gradients, an example at a time or a few."""

    def prepare(self, dimension: int, seed: int) -> None:
        """Draw signs and shifts of all parameters."""
        self._dimension = dimension
        self._signs: dict[str, tuple[Tensor, int]] = {}
        for name, p in self._parameters.items():
            generator = rng.generator(seed, 0, f"sketch of {name}")
            signs = torch.randint(0, 2, (p.numel(),), generator=generator, dtype=torch.int8)
            shift = int(torch.randint(dimension, (1,), generator=generator))
            self._signs[name] = (2 * signs - 1).to(p.device, p.dtype), shift

    def begin(self, rows: Tensor) -> None:
        """See `PerExampleEngine`."""
        self.found = rows.new_zeros(rows.shape[1], rows.shape[0], self._dimension)

    def take_outer(self, record: Record, names: dict[str, str], g: Tensor, part: slice) -> None:
        """See `PerExampleEngine`."""
        if "weight" in names:
            a = record.rule.outer.inputs(record.module, record.inputs[part])
            self._add(names["weight"], weight_rows(a, g), part)
        if "bias" in names:
            self._add(names["bias"], flat_rows(g.sum(-1)), part)

    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """See `PerExampleEngine`."""
        self._add(name, flat_rows(gradients), part)

    def _add(self, name: str, rows: Tensor, part: slice) -> None:
        signs, shift = self._signs[name]
        signed, dimension = rows * signs, self._dimension
        complete = signed.shape[-1] // dimension * dimension
        folded = signed[..., :complete].unflatten(-1, (-1, dimension)).sum(-2) if complete else 0
        total = signed.new_zeros(*signed.shape[:2], dimension) + folded
        total[..., : signed.shape[-1] - complete] += signed[..., complete:]
        self.found[part] += total.roll(shift, -1)


def sketch_jacobian(
    model: nn.Module,
    images: Tensor,
    quantities: Quantities,
    targets: Tensor,
    dimension: int,
    seed: int = 0,
    *,
    memory_mb: float = 256.0,
) -> Tensor:
    """Each example's Jacobian in ``dimension`` numbers per quantity, so that ``S S^T`` estimates ``J J^T``.

    The same seed gives the same sketch for any weights, so that kernels of two epochs can be compared.

    Args:
        model: The model, evaluated in eval mode and left as it was.
        images: (n, ...) inputs.
        quantities: (outputs, targets) of a batch -> (b,) or (q, b); column i depends on example i alone.
        targets: (n, ...) what ``quantities`` takes beside the outputs.
        dimension: D, numbers per example and quantity.
        seed: Seed of the signs.
        memory_mb: MiB of gradients that may be alive at a time.

    Returns:
        (n q, D).

    Raises:
        ValueError: D is below 1, or as for `gram_matrix`.
    """
    if dimension < 1:
        raise ValueError(f"a sketch of {dimension} numbers")
    parts = []
    with _Sketcher(getattr(model, "_orig_mod", model), memory_mb) as sketcher:
        sketcher.prepare(dimension, seed)
        for part in sketcher.sub_batches(images):
            sketcher.run(images[part], targets[part], quantities)
            parts.append(sketcher.found)
    return torch.cat(parts).flatten(0, 1)
