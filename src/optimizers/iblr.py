"""iBLR, the improved Bayesian learning rule, as implemented by the package ivon-opt (IVON).

Reference: Shen et al., Variational learning is effective for large deep networks, arXiv:2402.17641.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from src.errors import UserError


class IBLR(Optimizer):
    """IVON with a complete state and an exception-safe sampling context.

    It learns a Gaussian over the weights: their mean is the model's parameters, their variance `posterior_variance`.
    The loss is the mean negative log-likelihood alone; the prior N(0, 1/delta) enters as the weight decay delta/N::

        with optimizer.sampled_params():    # at one sample of the weights
            optimizer.zero_grad()
            loss(batch).backward()
        optimizer.step()

    The noise comes from torch's global generator of the parameters' device: to repeat a run, seed it (inside
    ``torch.random.fork_rng``) at the start of each epoch. ``param_groups`` are IVON's own.

    Args:
        params: The parameters, on their final device; those that do not require gradients are left alone.
        lr: Learning rate; the effective one is lr * (hess_init + weight_decay).
        num_examples: N, the number of training examples.
        delta: Prior precision.
        hess_init: Initial Hessian; sets the scale of the variances.
        beta1: Decay of the gradient average.
        beta2: Decay of the Hessian average.

    Raises:
        UserError: If ivon-opt is not installed.
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
        try:
            from ivon import IVON  # GPL-3: needed by those who use iBLR, by no one else
        except ImportError as error:
            raise UserError(
                "the optimizer iblr needs the package ivon-opt; install it with 'pip install ivon-opt'"
            ) from error
        params = [p for p in params if p.requires_grad]
        super().__init__([{"params": params}], {})
        self._params = params
        self._sampling = False
        self.inner = IVON(
            params,
            lr=lr,
            ess=num_examples,
            weight_decay=delta / num_examples,
            hess_init=hess_init,
            beta1=beta1,
            beta2=beta2,
        )
        for group in self.inner.param_groups:
            group["hess"].fill_(hess_init)  # IVON rounds it to float32, also for float64 parameters
        self._share_inner()

    def _share_inner(self) -> None:
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state

    @contextmanager
    def sampled_params(self, train: bool = True) -> Iterator[None]:
        """Put one sample of the weights into the model while the block runs.

        After the block, also after an exception, the parameters are the mean again, bit for bit.

        Args:
            train: Whether to collect the block's gradients for `step`. Parameters left without one count as zero.

        Yields:
            Nothing.

        Raises:
            RuntimeError: If the context is nested.
        """
        if self._sampling:
            raise RuntimeError("sampled_params cannot be nested")
        means = [p.data for p in self._params]  # IVON swaps the tensors, so these keep the mean without a copy
        self._sampling = True
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
        finally:
            self._sampling = False

    def step(self, closure: None = None) -> None:
        """Update mean and Hessian from the gradients collected by `sampled_params`.

        Args:
            closure: Not supported: the pass belongs inside `sampled_params`.

        Raises:
            RuntimeError: If no gradients were collected, or a closure is given.
        """
        if closure is not None:
            raise RuntimeError("IBLR takes no closure; run the pass inside sampled_params")
        if not self.inner.state["count"]:
            raise RuntimeError("step needs a pass inside sampled_params before it")
        self.inner.step()

    def posterior_variance(self) -> list[Tensor]:
        """The variances 1 / (N (h + delta/N)) of the Gaussian over the weights.

        Returns:
            One tensor per trained parameter, in their order and of their shapes.
        """
        variances = []
        for group in self.param_groups:
            flat = 1.0 / (group["ess"] * (group["hess"] + group["weight_decay"]))
            pieces = flat.split([p.numel() for p in group["params"]])
            variances += [v.view(p.shape) for v, p in zip(pieces, group["params"], strict=True)]
        return variances

    def state_dict(self) -> dict[str, Any]:
        """IVON's state with the number of steps taken, which its own state leaves out.

        Returns:
            ``{"ivon": ..., "current_step": ...}``.

        Raises:
            RuntimeError: Inside `sampled_params`: a checkpoint made now would hold sampled weights.
        """
        if self._sampling:
            raise RuntimeError("IBLR cannot be saved inside sampled_params")
        return {"ivon": self.inner.state_dict(), "current_step": self.inner.current_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state made by `state_dict`.

        Args:
            state_dict: The state; its tensors may lie on any device, and go to the parameters' device and dtype.

        Raises:
            ValueError: If the state belongs to another number of parameters.
        """
        sizes = [group["hess"].numel() for group in state_dict["ivon"]["param_groups"]]
        expected = [sum(p.numel() for p in group["params"]) for group in self.param_groups]
        if sizes != expected:
            raise ValueError(f"the iBLR state has {sizes} values, the model has {expected} trained weights")
        self.inner.load_state_dict(state_dict["ivon"])
        self.inner.current_step = state_dict["current_step"]
        self._share_inner()
        for group in self.param_groups:  # torch maps the devices of ``state`` only, and IVON keeps its tensors here
            for key in ("hess", "momentum"):
                group[key] = group[key].to(group["params"][0])
