"""Variances of a network's outputs under a Gaussian posterior over its parameters: ``J S J^T`` for each example.

The linearised predictive covariance of the Memory-Perturbation Equation (Nickl et al. 2023, Eq. 12 and 13), layer by
layer: a parameter's block is contracted with what flows in and what comes back (`src.jacobians.contract`), and no
Jacobian of the batch ever exists.
"""

from typing import Self

import torch
from torch import Tensor, nn

from src.jacobians import channels_last
from src.jacobians.capture import Record
from src.jacobians.contract import Outer
from src.jacobians.covariance import entrywise_variances, gradient_covariance, outer_covariance
from src.jacobians.posterior import Block, Posterior, Rotated
from src.jacobians.routing import Routing

WORTH_A_CALL = 2**22
"""Multiplications in one example's products from which on `entrywise_variances` is the faster way."""


def logit_rows(outputs: Tensor, _: Tensor) -> Tensor:
    """The logits as quantities to differentiate.

    Args:
        outputs: (b, C).

    Returns:
        (C, b).

    Raises:
        ValueError: the outputs are not (b, C).
    """
    if outputs.ndim != 2:
        raise ValueError(f"the model must return logits of shape (batch, classes), got {tuple(outputs.shape)}")
    return outputs.T


class OutputVariances(Routing):
    """Context manager that computes logits and their variances, one pass over each batch.

    See `Routing` for what it does to the model. The gradients of all C logits at the modules' outputs and the
    per-example products made of them are the memory it needs; batches are cut so that both stay within
    ``memory_mb`` each, plus a copy or two of the larger.

    Args:
        model: the network; its outputs are logits (b, C).
        posterior: a covariance for each trainable parameter.
        full: the (C, C) covariance of each example instead of its diagonal.
        memory_mb: see above.

    Raises:
        ValueError: on entering, if model and posterior do not fit each other.
    """

    def __init__(
        self, model: nn.Module, posterior: Posterior, *, full: bool = False, memory_mb: float = 128.0
    ) -> None:
        super().__init__(model, memory_mb)
        self._posterior = posterior
        self._full = full

    def __enter__(self) -> Self:
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._blocks = self._posterior.fitted_to(trainable) if trainable else {}
        self._ordered: dict[str, Tensor] = {}  # variances of weights in the order of `Outer.rows`
        rotated = any(isinstance(block, Rotated) for block in self._blocks.values())
        if not rotated and not self._full and channels_last.suits(self.model):
            self._capture.channels_last = True
            self._room = 1.25  # nothing is copied; maps in between may be larger
        return super().__enter__()

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and variances of one batch.

        Args:
            images: (b, ...) inputs.

        Returns:
            (b, C) logits without their graph, and float64 variances (b, C), or covariances (b, C, C) where ``full``.

        Raises:
            ValueError: the outputs are not (b, C), a BatchNorm would use statistics of the batch, or the model mixes
                the examples of a batch.
        """
        logits, variances = [], []
        for part in self.sub_batches(images):
            nothing = images.new_empty(part.stop - part.start)
            logits.append(self.run(images[part], nothing, logit_rows))
            variances.append(self._variances)
        return torch.cat(logits), torch.cat(variances)

    def begin(self, rows: Tensor) -> None:
        """See `Routing`."""
        q, b = rows.shape
        shape = (b, q, q) if self._full else (b, q)
        self._variances = torch.zeros(shape, dtype=torch.float64, device=rows.device)

    def take_captured(self, record: Record, names: dict[str, str], part: slice) -> None:
        """See `Routing`."""
        kind, module, a, g = record.kind, record.module, record.inputs[part], record.gradient[:, part]
        blocks = {local: self._blocks[name] for local, name in names.items()}
        if kind.outer is not None:
            g = kind.outer.outputs(module, g)
            if self._tiles(g, blocks):
                self._variances[part] += self._entrywise(kind.outer, module, a, g, names, blocks)
                return
            a = kind.outer.inputs(module, a)
            found = outer_covariance(a, g, blocks.get("weight"), blocks.get("bias"), self._full)
            self._variances[part] += found
            return
        for local, gradients in kind.gradients(module, a, g, list(blocks)).items():
            self._variances[part] += gradient_covariance(gradients, blocks[local], self._full)

    def _tiles(self, g: Tensor, blocks: dict[str, Block]) -> bool:
        """Whether `entrywise_variances` can be used and is worth its calls."""
        if self._full or g.device.type != "cpu" or g.shape[-1] == 1 or "weight" not in blocks:
            return False
        if any(isinstance(block, Rotated) for block in blocks.values()):
            return False
        products = g[:, 0, 0].numel() * blocks["weight"].numel() // (g.shape[2] * g.shape[3])
        return products >= WORTH_A_CALL

    def _entrywise(
        self, outer: Outer, module: nn.Module, a: Tensor, g: Tensor, names: dict[str, str], blocks: dict[str, Block]
    ) -> Tensor:
        name = names["weight"]
        if name not in self._ordered:
            self._ordered[name] = outer.in_row_order(module, blocks["weight"]).contiguous()
        found = entrywise_variances(outer.rows(module, a), g, self._ordered[name])
        if "bias" in blocks:
            found += gradient_covariance(g.sum(-1).flatten(2), blocks["bias"], full=False)
        return found

    def take_gradients(self, name: str, gradients: Tensor, part: slice) -> None:
        """See `Routing`."""
        self._variances[part] += gradient_covariance(gradients, self._blocks[name], self._full)
