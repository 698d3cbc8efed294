"""Sharpness-aware minimization (Foret et al., arXiv:2010.01412; adaptive: Kwon et al., arXiv:2102.11600)."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer


def batchnorm_layers(model: nn.Module) -> list[_BatchNorm]:
    """The layers of a model (1d to 3d, synchronized, lazy) that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@contextmanager
def frozen_batchnorm(model: nn.Module | list[_BatchNorm]) -> Iterator[None]:
    """Keep running statistics as they are: what the block makes of them is undone at its end.

    What the layers compute stays the same: one in training mode normalizes by the statistics of its batch, one in
    evaluation mode by the running ones, which it does not change. No flag of a layer changes, on which compiled code
    would depend. Contexts may be nested, and an exception leaves the layers as they were.

    Args:
        model: Any module, or what `batchnorm_layers` found in it.

    Yields:
        Nothing.
    """
    layers = batchnorm_layers(model) if isinstance(model, nn.Module) else model
    held: dict[torch.dtype, list[Tensor]] = {}  # by type, since only tensors of one type are copied all at once
    for layer in layers:
        for buffer in layer.buffers(recurse=False) if layer.training else ():
            held.setdefault(buffer.dtype, []).append(buffer)
    saved = {dtype: [torch.empty_like(buffer) for buffer in buffers] for dtype, buffers in held.items()}
    for dtype, buffers in held.items():
        torch._foreach_copy_(saved[dtype], buffers)
    try:
        yield
    finally:
        for dtype, buffers in held.items():
            torch._foreach_copy_(buffers, saved[dtype])


BaseOptimizer = Optimizer | Callable[[list[nn.Parameter]], Optimizer]


class SAM(Optimizer):
    """SAM around a plain torch optimizer.

    A step takes two passes over the same batch::

        loss(batch).backward()
        with optimizer.climbed():           # at w + e; back at w if the block raises
            with frozen_batchnorm(model):
                loss(batch).backward()
        optimizer.second_step()             # back to w, then the base step with the second gradient

    with e = rho * T g / (||T' g|| + 1e-12), where T = T' = 1, or, if adaptive, T = w^2 and T' = |w|; the norm is over
    all parameters together. Weight decay is the base optimizer's, so it acts on the step and not on the climb.
    Gradients may be averaged between processes before either step: both start from ``.grad``.
    ``param_groups`` and ``state`` are the base optimizer's own, so a rate set on either reaches the other.

    Args:
        params: The parameters. Those without a gradient stay where they are.
        base: Builds the base optimizer from a list of parameters, or is one over the same parameters.
        rho: Radius of the climb, at least 0.
        adaptive: Whether to scale the climb by the weights.

    Raises:
        ValueError: If ``rho`` is negative or not finite, or ``base`` has other parameters.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        base: BaseOptimizer,
        rho: float = 0.05,
        adaptive: bool = False,
    ) -> None:
        if not 0.0 <= rho < float("inf"):
            raise ValueError(f"rho must be a finite number of at least 0, not {rho}")
        params = list(params)
        super().__init__([{"params": params}], {})
        self.base = base if isinstance(base, Optimizer) else base(params)
        self.rho = rho
        self.adaptive = adaptive
        self.batchnorm: list[_BatchNorm] | None = None  # of the model, once they were looked up
        self._moved: list[nn.Parameter] = []
        self._saved: tuple[Tensor, ...] | None = None  # the weights at w while the model is at w + e
        self._share_base()
        if {id(p) for p in self._parameters()} != {id(p) for p in params}:
            raise ValueError("the base optimizer has other parameters than SAM")

    def _share_base(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    @torch.no_grad()
    def first_step(self) -> None:
        """Save the weights w, climb to w + e along the present gradients, and use these up (they are None after).

        Raises:
            RuntimeError: If the weights are already at w + e.
        """
        if self._saved is not None:
            raise RuntimeError("first_step was called twice; second_step or restore must come in between")
        moved = [p for p in self._parameters() if p.grad is not None]
        self._moved, self._saved = moved, tuple(p.detach().clone() for p in moved)
        if moved:
            climb = [p.grad for p in moved]  # worked on in place: the gradients are cleared below
            if self.adaptive:  # |w| g and w g have the same norm, and T g = w (w g)
                torch._foreach_mul_(climb, moved)
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(climb)))
            torch._foreach_mul_(climb, self.rho / (norm + 1e-12))
            if self.adaptive:
                torch._foreach_mul_(climb, moved)
            torch._foreach_add_(moved, climb)
        self.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Return to the saved weights, bit for bit. Does nothing if the weights were not moved."""
        if self._saved:
            torch._foreach_copy_(self._moved, self._saved)
        self._moved, self._saved = [], None

    @contextmanager
    def climbed(self) -> Iterator[None]:
        """Run `first_step`, then the block at w + e. An exception in the block returns the weights to w.

        Yields:
            Nothing. After the block the weights are still at w + e: `second_step` takes them back.
        """
        self.first_step()
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def second_step(self) -> None:
        """Return to w exactly and take the base optimizer's step with the present gradients.

        Raises:
            RuntimeError: If `first_step` did not come before.
        """
        if self._saved is None:
            raise RuntimeError("second_step needs first_step before it")
        self.restore()
        self.base.step()

    def step(self, closure: None = None) -> None:
        """The same as `second_step`, under torch's name.

        Args:
            closure: Not supported: the two passes belong to the caller.

        Raises:
            RuntimeError: If `first_step` did not come before, or a closure is given.
        """
        if closure is not None:
            raise RuntimeError("SAM takes no closure; run both passes around first_step and second_step")
        self.second_step()

    def state_dict(self) -> dict[str, Any]:
        """The state of the base optimizer, with SAM's own settings.

        Returns:
            ``{"base": ..., "rho": ..., "adaptive": ...}``.

        Raises:
            RuntimeError: If the weights are at w + e: a checkpoint made now would hold them.
        """
        if self._saved is not None:
            raise RuntimeError("SAM cannot be saved between first_step and second_step")
        return {"base": self.base.state_dict(), "rho": self.rho, "adaptive": self.adaptive}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state made by `state_dict`.

        Args:
            state_dict: The state; its tensors may lie on any device.
        """
        self.restore()
        self.base.load_state_dict(state_dict["base"])
        self.rho = state_dict["rho"]
        self.adaptive = state_dict["adaptive"]
        self._share_base()
