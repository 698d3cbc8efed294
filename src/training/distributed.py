"""Process groups for distributed training, and BatchNorm over the batches of all processes."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from src.errors import ArgumentError

_PATIENCE = timedelta(days=1)  # other processes wait while the main one downloads data or scores a trained model


@dataclass(frozen=True)
class ProcessGroup:
    """The group of processes that share each batch, and this process's rank in it.

    Attributes:
        rank: This process's rank.
        world: The number of processes.
        local_rank: This process's rank on its machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> "ProcessGroup":
        """Return the group described by torchrun's environment variables.

        Raises:
            ArgumentError: The process was not started by torchrun.
        """
        try:
            return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        except (KeyError, ValueError):
            raise ArgumentError(
                "distributed_training",
                ": start the script with torchrun, for example "
                "torchrun --nproc_per_node=2 train_full.py --distributed_training ...",
            ) from None

    @classmethod
    def local(cls) -> "ProcessGroup":
        """Return a group of one process.

        Raises:
            ArgumentError: torchrun started several processes, which would all do the same work.
        """
        count = os.environ.get("WORLD_SIZE", "1")
        if "LOCAL_RANK" in os.environ and count != "1":
            raise ArgumentError(
                "distributed_training",
                f": torchrun started {count} processes, which would all do the same work; give this flag to training "
                "scripts, and run other scripts without torchrun",
            )
        return cls()

    def start(self, device: torch.device) -> None:
        """Join the process group, using nccl on GPUs and gloo on CPUs."""
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            rank=self.rank,
            world_size=self.world,
            timeout=_PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )

    def stop(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor with its sum over the processes, with one all-reduce per dtype and device."""
        if self.world == 1:
            return
        by_type: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for group in by_type.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def least(self, value: torch.Tensor) -> torch.Tensor:
        """Return the minimum of the processes' values."""
        value = value.clone()
        if self.world > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MIN)
        return value

    def share_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor with that of the main process."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def wait(self) -> None:
        """Wait until all processes get here."""
        if self.world > 1:
            dist.barrier()


class _SumOverProcesses(torch.autograd.Function):
    """Sum over processes. The gradient is the sum of the processes' gradients."""

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


def _synchronized_forward(module: nn.modules.batchnorm._BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """Forward pass of BatchNorm with statistics over all processes. In eval mode, the layer's original forward."""
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
def synchronized_batchnorm(model: nn.Module) -> Iterator[None]:
    """Context manager in which every BatchNorm of a model normalizes over the batches of all processes.

    Names of parameters and buffers do not change, so checkpoints are the same as without it.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.forward = _synchronized_forward.__get__(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
