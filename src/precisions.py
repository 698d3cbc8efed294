"""How precisely to compute: the values of ``--precision``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Precision:
    """How the network computes.

    Attributes:
        name: The name of the flag's choice.
        weights: The type of the weights and inputs, a name in torch.
        products: The type of matrix products and convolutions, or None for ``weights``.
        tf32: Whether an NVIDIA GPU may round the inputs of float32 products to TF32.
        note: One line for the help text.
    """

    name: str
    weights: str = "float32"
    products: str | None = None
    tf32: bool = False
    note: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights and inputs."""
        import torch

        return getattr(torch, self.weights)

    @property
    def autocast(self) -> torch.dtype | None:
        """The type of matrix products and convolutions, or None for ``dtype``."""
        import torch

        return self.products and getattr(torch, self.products)


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", note="float32"),
        Precision("tf32", tf32=True, note="float32 with TF32 products on NVIDIA GPUs"),
        Precision("bf16", products="bfloat16", note="float32 weights, bfloat16 products"),
        Precision("fp64", weights="float64", note="float64, for checks"),
    )
}
