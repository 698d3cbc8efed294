"""Sharpness-aware minimization (Foret et al., arXiv:2010.01412; adaptive: Kwon et al., arXiv:2102.11600)."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer


def batchnorm_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers of a model (1d to 3d, synchronized, lazy) that have running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@contextmanager
def frozen_batchnorm(model: nn.Module | list[_BatchNorm]) -> Iterator[None]:
    """Context manager that restores BatchNorm's running statistics on exit.

    The layers' outputs do not change: layers in training mode normalize with batch statistics, and layers in eval
    mode with running statistics. No layer attribute changes, because compiled code would depend on it. Contexts can
    be nested, and the statistics are also restored after an exception.

    Args:
        model: A module, or the result of ``batchnorm_layers``.

    Yields:
        Nothing.
    """
    layers = batchnorm_layers(model) if isinstance(model, nn.Module) else model
    held: dict[torch.dtype, list[Tensor]] = {}  # by dtype: a foreach copy needs tensors of one dtype
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
    """SAM, wrapped around a torch optimizer.

    A step takes two passes over the same batch::

        loss(batch).backward()
        with optimizer.climbed():           # at w + e; restores w if the block raises
            with frozen_batchnorm(model):
                loss(batch).backward()
        optimizer.second_step()             # restores w, then takes the base step with the second gradient

    with e = rho * T g / (||T' g|| + 1e-12), where T = T' = 1, or T = w^2 and T' = |w| if adaptive. The norm is over
    all parameters. Weight decay is the base optimizer's, so it affects the step but not the perturbation. Gradients
    may be averaged over processes before either step, because both use ``.grad``. ``param_groups`` and ``state`` are
    shared with the base optimizer, so a learning rate set on one applies to both.

    Args:
        params: The parameters. Those without a gradient are not perturbed.
        base: A function that builds the base optimizer from a list of parameters, or an optimizer of the same
            parameters.
        rho: Radius of the perturbation, at least 0.
        adaptive: Whether to scale the perturbation by the weights.

    Raises:
        ValueError: ``rho`` is negative or not finite, or ``base`` has different parameters.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        base: BaseOptimizer,
        rho: float = 0.05,
        adaptive: bool = False,
    ) -> None:
        if not 0.0 <= rho < float("inf"):
            raise ValueError(f"rho must be finite and at least 0, not {rho}")
        params = list(params)
        super().__init__([{"params": params}], {})
        self.base = base if isinstance(base, Optimizer) else base(params)
        self.rho = rho
        self.adaptive = adaptive
        self.batchnorm: list[_BatchNorm] | None = None  # the model's layers, once found
        self._moved: list[torch.Tensor] = []
        self._saved: tuple[Tensor, ...] | None = None  # the weights at w while the model is at w + e
        self._share_base()
        if {id(p) for p in self._parameters()} != {id(p) for p in params}:
            raise ValueError("the base optimizer has different parameters than SAM")

    def _share_base(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    @torch.no_grad()
    def first_step(self) -> None:
        """Save the weights w, move to w + e along the current gradients, and clear the gradients (set to None).

        Raises:
            RuntimeError: The weights are already at w + e.
        """
        if self._saved is not None:
            raise RuntimeError("first_step was called twice; call second_step or restore in between")
        moved: list[torch.Tensor] = [p for p in self._parameters() if p.grad is not None]
        self._moved, self._saved = moved, tuple(p.detach().clone() for p in moved)
        if moved:
            climb = [p.grad for p in moved]  # modified in place; the gradients are cleared below
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
        """Restore the saved weights exactly. Does nothing if the weights were not moved."""
        if self._saved:
            torch._foreach_copy_(self._moved, self._saved)
        self._moved, self._saved = [], None

    @contextmanager
    def climbed(self) -> Iterator[None]:
        """Context manager that calls ``first_step`` and runs the block at w + e. An exception restores w.

        Yields:
            Nothing. After the block, the weights are still at w + e; ``second_step`` restores them.
        """
        self.first_step()
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def second_step(self) -> None:
        """Restore w exactly and take the base optimizer's step with the current gradients.

        Raises:
            RuntimeError: ``first_step`` was not called before.
        """
        if self._saved is None:
            raise RuntimeError("second_step needs first_step before it")
        self.restore()
        self.base.step()

    def step(self, closure: None = None) -> None:
        """Call ``second_step``, under torch's name.

        Args:
            closure: Not supported; the caller runs both passes.

        Raises:
            RuntimeError: ``first_step`` was not called before, or a closure is given.
        """
        if closure is not None:
            raise RuntimeError("SAM takes no closure; run both passes around first_step and second_step")
        self.second_step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the base optimizer and SAM's settings.

        Returns:
            ``{"base": ..., "rho": ..., "adaptive": ...}``.

        Raises:
            RuntimeError: The weights are at w + e, so a checkpoint would contain the perturbed weights.
        """
        if self._saved is not None:
            raise RuntimeError("SAM cannot be saved between first_step and second_step")
        return {"base": self.base.state_dict(), "rho": self.rho, "adaptive": self.adaptive}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state returned by ``state_dict``.

        Args:
            state_dict: The state, on any device.
        """
        self.restore()
        self.base.load_state_dict(state_dict["base"])
        self.rho = state_dict["rho"]
        self.adaptive = state_dict["adaptive"]
        self._share_base()
