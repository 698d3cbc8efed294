"""BatchNorm over the batches of all processes, on CPUs and GPUs alike, for shares of any size."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn


class _SumOverProcesses(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _synchronised_forward(module: nn.modules.batchnorm._BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """BatchNorm's forward with statistics over all processes (its own forward in eval mode)."""
    if not module.training:
        return type(module).forward(module, x)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    count = x.new_tensor([x.numel() / x.shape[1]])
    sums = _SumOverProcesses.apply(torch.cat([x.sum(axes), count]))  # (channels + 1,)
    total = sums[-1].detach()
    mean = sums[:-1] / total
    centred = x - mean.view(shape)
    variance = _SumOverProcesses.apply(centred.square().sum(axes)) / total  # two passes: exact for any offset
    if module.track_running_stats and module.running_mean is not None:
        with torch.no_grad():
            module.num_batches_tracked += 1
            momentum = module.momentum
            if momentum is None:
                momentum = 1.0 / float(module.num_batches_tracked)
            module.running_mean.lerp_(mean.to(module.running_mean.dtype), momentum)
            unbiased = variance * (total / (total - 1))
            module.running_var.lerp_(unbiased.to(module.running_var.dtype), momentum)
    y = centred * torch.rsqrt(variance + module.eps).view(shape)
    if module.affine:
        y = y * module.weight.view(shape) + module.bias.view(shape)
    return y


@contextmanager
def synchronised_batchnorm(model: nn.Module) -> Iterator[None]:
    """Let every BatchNorm of a network normalise over the batches of all processes, for the time being.

    Names of parameters and buffers stay, so checkpoints are those of the plain network.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.forward = _synchronised_forward.__get__(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
