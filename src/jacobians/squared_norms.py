"""Per-example squared gradient norms of a whole network, under any weights of its parameters."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from src.jacobians.capture import Record
from src.jacobians.contract import weighted_squares
from src.jacobians.fallback import Quantities
from src.jacobians.routing import Routing

Weighting = Callable[[str, Tensor], Tensor] | None
"""(name in the model, parameter) -> weights S of the parameter's shape; None stands for ones."""


class SquaredNorms(Routing):
    """Context manager that computes ``sum over parameters of S * grad_i^2`` for each example i.

    See `Routing` for its arguments, for what it does to the model, and for what it raises.
    """

    def __call__(
        self,
        images: Tensor,
        targets: Tensor,
        quantities: Quantities,
        weightings: Sequence[Weighting] = (None,),
    ) -> tuple[Tensor, Tensor]:
        """Squared norms of one batch.

        Args:
            images: (b, ...) inputs.
            targets: (b, ...) what ``quantities`` takes beside the outputs, labels for a loss.
            quantities: (outputs, targets) -> (b,) or (q, b) values to differentiate.
            weightings: f families of weights that share every per-example gradient.

        Returns:
            (f, q, b) float64 squared norms, and the model's outputs without their graph.

        Raises:
            ValueError: a BatchNorm would use statistics of the batch, the model mixes the examples of a batch, or the
                quantities have no gradient.
        """
        self._weightings = weightings
        outputs = self.run(images, targets, quantities)
        return self._norms, outputs

    def begin(self, rows: Tensor) -> None:
        """See `Routing`."""
        self._norms = torch.zeros(len(self._weightings), *rows.shape, dtype=torch.float64, device=rows.device)
        self._weights: dict[str, Tensor] = {}  # of the module at hand
        self._latest: Record | None = None

    def take_captured(self, record: Record, names: dict[str, str], part: slice) -> None:
        """See `Routing`."""
        if record is not self._latest:
            self._weights.clear()
            self._latest = record
        weights = {local: self._weight(name) for local, name in names.items()}
        squares = record.kind.squares(record.module, record.inputs[part], record.gradient[:, part], weights)
        self._norms[:, :, part] += squares

    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """See `Routing`."""
        self._norms[:, :, part] += weighted_squares(gradients, self._weight(name))

    def _weight(self, name: str) -> Tensor | None:
        """The families' weights of one parameter, (f, *shape), or None if all are ones."""
        if all(weighting is None for weighting in self._weightings):
            return None
        if name not in self._weights:
            p = self._parameters[name].detach()
            families = [torch.ones_like(p) if w is None else w(name, p).to(p) for w in self._weightings]
            self._weights[name] = torch.stack(families)
        return self._weights[name]
