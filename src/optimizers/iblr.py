"""iBLR, the improved Bayesian learning rule (IVON): this project's implementation and an adapter for ivon-opt.

Reference: Shen et al., Variational learning is effective for large deep networks, arXiv:2402.17641, algorithm 1.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.optim import Optimizer

from src.errors import ArgumentError


class IBLR(Optimizer):
    """The improved Bayesian learning rule, with a complete state and an exception-safe sampling context.

    Learns a Gaussian over the weights. Its mean m is the model's parameters, and its variance is
    ``posterior_variance``, 1 / (N (h + w)) with w = delta / N. The loss is only the mean negative log-likelihood; the
    prior N(0, 1/delta) is applied as the weight decay w::

        with optimizer.sampled_params():    # at one sample of the weights
            optimizer.zero_grad()
            loss(batch).backward()
        optimizer.step()

    With z ~ N(0, 1), step t computes::

        e = z / sqrt(N (h + w)),  g = gradient at m + e
        v = b1 v + (1 - b1) g
        f = N (h + w) e g
        h' = b2 h + (1 - b2) f + (1 - b2)^2 (h - f)^2 / (2 (h + w))
        m = m - lr (h0 + w) (v / (1 - b1^t) + w m) / (h' + w)

    After several passes, g and e g are means over the passes. h and v are flat vectors in ``param_groups`` under
    ivon-opt's names, so that each implementation can continue from the other's state.

    The noise is drawn from torch's global generator of the parameters' device. To make a run reproducible, seed it
    (inside ``torch.random.fork_rng``) at the start of each epoch.

    Args:
        params: The parameters, on their final device. Parameters that do not require gradients are not changed.
        lr: Learning rate; the effective one is lr * (hess_init + weight_decay).
        num_examples: N, the number of training examples.
        delta: Prior precision.
        hess_init: h0, the initial Hessian; it sets the scale of the variances.
        beta1: Decay of the gradient average.
        beta2: Decay of the Hessian average.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        num_examples: int,
        delta: float,
        hess_init: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.99999,
    ) -> None:
        params = [p for p in params if p.requires_grad]
        size = sum(p.numel() for p in params)
        group = {
            "params": params,
            "lr": lr,
            "mc_samples": 1,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": delta / num_examples,
            "hess_init": hess_init,
            "ess": num_examples,
            "clip_radius": float("inf"),
            "numel": size,
            "momentum": params[0].new_zeros(size),
            "hess": params[0].new_full((size,), hess_init),
        }
        super().__init__([group], {})
        self._params: list[Tensor] = list(params)
        self._sampling = False
        self._passes = 0  # since the last step
        self._steps = 0
        self._collected: tuple[Tensor, ...] | None = None  # means of g and sqrt(N) e g over the passes, and h + w

    @contextmanager
    def sampled_params(self, train: bool = True) -> Iterator[None]:
        """Context manager in which the model's parameters are one sample of the weights.

        On exit, even after an exception, the parameters are restored to the mean exactly.

        Args:
            train: Whether to collect the block's gradients for ``step``. A missing gradient counts as zero.

        Yields:
            Nothing.

        Raises:
            RuntimeError: The context is nested.
        """
        if self._sampling:
            raise RuntimeError("sampled_params cannot be nested")
        self._sampling = True
        try:
            with self._sample(train):
                yield
            self._passes += train
        finally:
            self._sampling = False

    @contextmanager
    def _sample(self, train: bool) -> Iterator[None]:
        group, params = self.param_groups[0], self._params
        hess = group["hess"]
        with torch.no_grad():
            total = torch.add(hess, group["weight_decay"])  # h + w
            noise = torch.randn(group["numel"], dtype=hess.dtype, device=hess.device)
            noise.mul_(torch.rsqrt(total))  # sqrt(N) e
            means = [torch.empty_like(p) for p in params]
            torch._foreach_copy_(means, params)
            # in place, so that the weights keep their memory addresses
            torch._foreach_add_(params, self._pieces(noise), alpha=group["ess"] ** -0.5)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(params, means)
        if not train:
            return
        with torch.no_grad():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            gradient = torch.cat([g.flatten() for g in gradients])
            product = noise.mul_(gradient)
            if self._passes:
                share = 1.0 / (self._passes + 1)
                gradient = self._collected[0].lerp_(gradient, share)
                product = self._collected[1].lerp_(product, share)
            self._collected = gradient, product, total

    def _pieces(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Return views of a flat vector with the parameters' shapes. A Python loop takes four times as long."""
        return _unflatten_dense_tensors(flat, self._params)

    def step(self, closure: None = None) -> None:
        """Update mean and Hessian from the gradients collected in ``sampled_params``.

        Args:
            closure: Not supported; run the pass inside ``sampled_params``.

        Raises:
            RuntimeError: No gradients were collected, or a closure is given.
        """
        if closure is not None:
            raise RuntimeError("IBLR takes no closure; run the pass inside sampled_params")
        if not self._passes:
            raise RuntimeError("step needs a pass inside sampled_params before it")
        self._update()
        self._passes = 0

    @torch.no_grad()
    def _update(self) -> None:
        group, (gradient, product, total) = self.param_groups[0], self._collected
        momentum, hess, beta1, rest = group["momentum"], group["hess"], group["beta1"], 1.0 - group["beta2"]
        self._collected = None
        self._steps += 1
        momentum.lerp_(gradient, 1.0 - beta1)
        root = group["ess"] ** 0.5
        estimate = product.mul_(total)  # f / sqrt(N)
        squares = torch.sub(hess, estimate, alpha=root, out=gradient).square_()
        hess.mul_(group["beta2"]).add_(estimate, alpha=rest * root).addcdiv_(squares, total, value=0.5 * rest**2)
        torch.add(hess, group["weight_decay"], out=total)  # h' + w
        unbias = 1.0 - beta1**self._steps
        direction = torch._foreach_add(self._pieces(momentum), self._params, alpha=group["weight_decay"] * unbias)
        rate = group["lr"] * (group["hess_init"] + group["weight_decay"]) / unbias
        torch._foreach_addcdiv_(self._params, direction, self._pieces(total), value=-rate)

    def posterior_variance(self) -> list[Tensor]:
        """Return the variances 1 / (N (h + delta/N)) of the Gaussian over the weights.

        Returns:
            One tensor per trained parameter, with the same order and shapes.
        """
        group = self.param_groups[0]
        return list(self._pieces(1.0 / (group["ess"] * (group["hess"] + group["weight_decay"]))))

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two steps, in ivon-opt's format, and the number of steps taken.

        Returns:
            ``{"ivon": ..., "current_step": ...}``.

        Raises:
            RuntimeError: Called inside ``sampled_params``, where a checkpoint would contain sampled weights, or
                between it and ``step``.
        """
        if self._sampling or self._passes:
            raise RuntimeError("IBLR cannot be saved between sampled_params and step")
        groups = super().state_dict()["param_groups"]
        nothing = {"count": 0, "avg_grad": None, "avg_nxg": None, "avg_gsq": None}
        return {"ivon": {"state": nothing, "param_groups": groups}, "current_step": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state returned by ``state_dict`` of this or the other implementation.

        Args:
            state_dict: The state, on any device. Its tensors are moved to the parameters' device and dtype.

        Raises:
            ValueError: The state is for a different number of parameters.
        """
        sizes = [group["hess"].numel() for group in state_dict["ivon"]["param_groups"]]
        expected = [sum(p.numel() for p in group["params"]) for group in self.param_groups]
        if sizes != expected:
            raise ValueError(f"the iBLR state has {sizes} values, the model has {expected} trained weights")
        self._load(state_dict)
        for group in self.param_groups:  # torch moves only ``state`` to the right device
            for key in ("hess", "momentum"):
                group[key] = group[key].to(group["params"][0])
        self._passes, self._steps = 0, state_dict["current_step"]

    def _load(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({"state": {}, "param_groups": state_dict["ivon"]["param_groups"]})


class IvonOpt(IBLR):
    """iBLR as implemented by the package ivon-opt, which must be installed. Takes the same arguments as ``IBLR``.

    Attributes:
        inner: The package's optimizer. This object shares its ``param_groups`` and ``state``.

    Raises:
        ArgumentError: ivon-opt is not installed.
    """

    def __init__(self, params: Iterable[nn.Parameter], *args: Any, **settings: Any) -> None:
        try:
            from ivon import IVON  # GPL-3; needed only if this backend is chosen
        except ImportError as error:
            raise ArgumentError(
                "iblr_backend",
                "ivon-opt: needs the package ivon-opt; install it with: pip install -r requirements-iblr.txt",
            ) from error
        super().__init__(params, *args, **settings)
        own = self.param_groups[0]
        names = ("lr", "ess", "weight_decay", "hess_init", "beta1", "beta2")
        self.inner = IVON(self._params, **{name: own[name] for name in names})
        for group in self.inner.param_groups:
            group["hess"].fill_(own["hess_init"])  # IVON rounds it to float32 even for float64 parameters
        self._share_inner()

    def _share_inner(self) -> None:
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    @contextmanager
    def _sample(self, train: bool) -> Iterator[None]:
        means = [p.data for p in self._params]  # IVON replaces the tensors, so these keep the mean without a copy
        try:
            with self.inner.sampled_params(train=train):
                yield
                if train:
                    for p in self._params:
                        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        except BaseException:
            for p, mean in zip(self._params, means, strict=True):
                p.data = mean
            raise

    def _update(self) -> None:
        self.inner.step()
        self._steps = self.inner.current_step

    def _load(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict["ivon"])
        self.inner.current_step = state_dict["current_step"]  # not part of the package's state
        self._share_inner()
