"""Exact per-example gradients of any parameters: `vmap` over examples, for what no capture rule covers.

Norm layers, embeddings, attention projections whose hooks do not fire, weights used in two ways, parameters of
the user's own. Where a model cannot be vectorised (data-dependent control flow) the examples are taken one by one.
"""

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

Quantities = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) of a batch -> (b,) or (q, b); column i depends on example i alone."""


def as_rows(quantities: Tensor) -> Tensor:
    """Quantities (b,) or (q, b) as (q, b)."""
    return quantities.unsqueeze(0) if quantities.ndim == 1 else quantities


class ExampleGradients:
    """Per-example gradients of any parameters of a model.

    Args:
        model: the network, in the mode in which it is to be differentiated.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._vectorised = True  # until the model turns out not to be

    def __call__(
        self, names: Sequence[str], images: Tensor, targets: Tensor, quantities: Quantities, chunk: int
    ) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Gradients of the named parameters, a chunk of examples at a time.

        Args:
            names: parameters, by their (first) name in the model.
            images: (b, ...) inputs.
            targets: (b, ...) what ``quantities`` takes beside the outputs.
            quantities: see `Quantities`.
            chunk: examples at once.

        Yields:
            The slice of examples, and per name a tensor (q, chunk, *shape).
        """
        for start in range(0, images.shape[0], chunk):
            part = slice(start, min(start + chunk, images.shape[0]))
            # a copy each time: the network may work on its input in place
            found = self._try_vectorised(names, images[part].clone(), targets[part], quantities)
            if found is None:
                found = _one_by_one(self.model, names, images[part].clone(), targets[part], quantities)
            yield part, found

    def _try_vectorised(
        self, names: Sequence[str], images: Tensor, targets: Tensor, quantities: Quantities
    ) -> dict[str, Tensor] | None:
        if not self._vectorised:
            return None
        try:
            return _vectorised(self.model, names, images, targets, quantities)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            # what vmap does not know raises these; one by one is exact, too, and raises a network's own errors again
            logger.warning(
                "%s cannot be vectorised over examples, which are now taken one by one (slow): %.160s",
                type(self.model).__name__,
                str(error).strip().splitlines()[0],
            )
            self._vectorised = False
            return None


def _vectorised(
    model: nn.Module, names: Sequence[str], images: Tensor, targets: Tensor, quantities: Quantities
) -> dict[str, Tensor]:
    constants = {name: p.detach() for name, p in model.named_parameters()}
    values = {name: constants[name] for name in names}

    def single(image: Tensor, target: Tensor) -> dict[str, Tensor]:
        def rows(chosen: dict[str, Tensor]) -> Tensor:
            outputs = functional_call(model, {**constants, **chosen}, (image.unsqueeze(0),))
            return as_rows(quantities(outputs, target.unsqueeze(0)))[:, 0]  # (q,)

        primals, pull = vjp(rows, values)
        units = torch.eye(len(primals), dtype=primals.dtype, device=primals.device)
        pulled = [pull(unit)[0] for unit in units]
        return {name: torch.stack([gradients[name] for gradients in pulled]) for name in names}

    # plain attention: the fused kernels have no batching rule
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found = vmap(single)(images, targets)  # (b, q, *shape); gradients that are equal for all are spread over b
    return {name: gradients.transpose(0, 1) for name, gradients in found.items()}


def _one_by_one(
    model: nn.Module, names: Sequence[str], images: Tensor, targets: Tensor, quantities: Quantities
) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for image, target in zip(images.split(1), targets.split(1), strict=True):
        rows = as_rows(quantities(model(image), target))[:, 0]
        per_row = []
        for q, row in enumerate(rows):
            gradients = torch.autograd.grad(row, chosen, retain_graph=q + 1 < len(rows), allow_unused=True)
            per_row.append([torch.zeros_like(p) if g is None else g for p, g in zip(chosen, gradients, strict=True)])
        for name, *stacked in zip(names, *per_row, strict=True):
            found[name].append(torch.stack(stacked))
    return {name: torch.stack(parts, dim=1) for name, parts in found.items()}
