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


BaseOptimizer = Optimizer | Callable[..., Optimizer]


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

    Gradient accumulation: call ``backward`` for every part of the batch before ``first_step``, and again for every
    part before ``second_step``. Loss scaling: ``first_step`` takes the scaled gradients, because e does not depend on
    their scale (nor on clipping by norm), and ``scaler.step(optimizer)`` is the second step. Call ``scaler.unscale_``
    at most once, before the second step. If a gradient overflows, the weights are restored and no step is taken.

    Args:
        params: The parameters, or parameter groups with options of the base optimizer. Parameters without a gradient
            are not perturbed.
        base_optimizer: A class of optimizers or a function that builds one, called with the parameters and
            ``options``, or an optimizer of the same parameters.
        rho: Radius of the perturbation, at least 0.
        adaptive: Whether to scale the perturbation by the weights.
        **options: Options of the base optimizer, such as ``lr``.

    Raises:
        ValueError: ``rho`` is negative or not finite, a group has its own, ``base_optimizer`` has different
            parameters, or it is already built and options are given.
    """

    _step_supports_amp_scaling = True  # GradScaler.step then also calls step if a gradient overflowed

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        if not 0.0 <= rho < float("inf"):
            raise ValueError(f"rho must be finite and at least 0, not {rho}")
        params = list(params)
        super().__init__(params, {})
        if any({"rho", "adaptive"} & group.keys() for group in self.param_groups):
            raise ValueError("rho and adaptive are the same for all parameter groups; give them to SAM")
        if options and isinstance(base_optimizer, Optimizer):
            raise ValueError(f"the base optimizer is already built; {', '.join(options)} would have no effect")
        own = {id(p) for p in self._parameters()}
        self.base = base_optimizer if isinstance(base_optimizer, Optimizer) else base_optimizer(params, **options)
        self.rho = rho
        self.adaptive = adaptive
        self.batchnorm: list[_BatchNorm] | None = None  # the model's layers, once found
        self._moved: list[torch.Tensor] = []
        self._saved: tuple[Tensor, ...] | None = None  # the weights at w while the model is at w + e
        self._share_base()
        if {id(p) for p in self._parameters()} != own:
            raise ValueError("the base optimizer has different parameters than SAM")

    def _share_base(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer, and so to SAM."""
        if hasattr(self, "base"):
            self.base.add_param_group(param_group)
        else:  # torch's constructor adds the first groups
            super().add_param_group(param_group)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = True) -> None:
        """Save the weights w and move to w + e along the current gradients.

        Args:
            zero_grad: Whether to clear the gradients (set them to None). If not, those of the second pass are added.

        Raises:
            RuntimeError: The weights are already at w + e.
        """
        if self._saved is not None:
            raise RuntimeError("first_step was called twice; call second_step or restore in between")
        moved: list[torch.Tensor] = [p for p in self._parameters() if p.grad is not None]
        self._moved, self._saved = moved, tuple(p.detach().clone() for p in moved)
        if moved:
            climb = [p.grad if zero_grad else p.grad.clone() for p in moved]  # modified in place
            if self.adaptive:  # |w| g and w g have the same norm, and T g = w (w g)
                torch._foreach_mul_(climb, moved)
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(climb)))
            torch._foreach_mul_(climb, self.rho / (norm + 1e-12))
            if self.adaptive:
                torch._foreach_mul_(climb, moved)
            torch._foreach_add_(moved, climb)
        if zero_grad:
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

    def second_step(self, zero_grad: bool = False) -> None:
        """Restore w exactly and take the base optimizer's step with the current gradients.

        Args:
            zero_grad: Whether to clear the gradients afterwards.

        Raises:
            RuntimeError: ``first_step`` was not called before.
        """
        if self._saved is None:
            raise RuntimeError("second_step needs first_step before it")
        self.restore()
        self.base.step()
        self._opt_called = True  # torch's schedulers warn if they do not see a step
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the second step, or both steps if a closure is given.

        ``torch.amp.GradScaler.step`` calls this without a closure. Gradients are unscaled here; if one overflowed
        in either pass, the weights are restored and no step is taken.

        Args:
            closure: A function that computes the loss of the batch, calls ``backward``, and returns the loss. It is
                called at w + e; call ``backward`` at w before. The gradients are cleared afterwards, so that those
                of another batch are never taken for them.

        Returns:
            What the closure returns; None without a closure.

        Raises:
            RuntimeError: Without a closure, ``first_step`` was not called before; with one, it was, or there are no
                gradients.
        """
        if closure is not None:
            if self._saved is None and all(p.grad is None for p in self._parameters()):
                raise RuntimeError("step(closure) needs gradients; call backward on the loss of the batch before it")
            with self.climbed(), torch.enable_grad():
                found = closure()
            self.second_step(zero_grad=True)
            return found
        if (
            overflow := getattr(self, "found_inf", None)
        ) is not None:  # GradScaler sets this and grad_scale for the call
            if overflow:
                self.restore()
                return None
            if (scale := getattr(self, "grad_scale", None)) is not None:  # None if unscale_ was called
                gradients = [p.grad for p in self._parameters() if p.grad is not None]
                torch._foreach_mul_(gradients, scale.double().reciprocal().float().item())
        self.second_step()
        return None

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
