"""Where and how precisely to compute: devices, precisions, determinism."""

from __future__ import annotations

import argparse
import ctypes
import functools
import inspect
import logging
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.cli import check_options, option
from src.errors import ArgumentError
from src.lazy import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """How a model computes.

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
        return getattr(torch, self.weights)

    @property
    def autocast(self) -> torch.dtype | None:
        """The type of matrix products and convolutions, or None for ``dtype``."""
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


CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes of ``torch.compile`` that use CUDA graphs, whose outputs the next pass overwrites."""


def parse_device(text: str) -> str:
    """The value of ``--device``; whether the machine has it turns out when it is used.

    Raises:
        argparse.ArgumentTypeError: It is not a device.
    """
    if text not in ("cpu", "cuda") and not text.removeprefix("cuda:").isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; give cpu, cuda, or the index of a GPU")
    return text


@dataclass(frozen=True)
class ComputeConfig:
    """Where and how to compute.

    Attributes:
        device: ``"cpu"``, ``"cuda"``, a GPU index, or None for the first GPU, else the CPU.
        precision: A name of ``PRECISIONS``.
        deterministic: Whether only deterministic algorithms are allowed.
        compile: Whether the model is compiled for training; a name of ``CUDA_GRAPHS`` for that mode.
        distributed_training: Whether the processes of torchrun share each batch.
        sync_bn: Whether BatchNorm's statistics are over the batches of all processes.

    Raises:
        ArgumentError: Several processes are to share one device.
    """

    device: str | None = option(
        None, "cpu, cuda, or the index of a GPU (default: the first GPU, else the CPU)", parse_device
    )
    precision: str = option(
        "fp32",
        lambda choices: "; ".join(f"{name}: {PRECISIONS[name].note}" for name in choices),
        choices=tuple(PRECISIONS),
    )
    deterministic: bool = option(False, "only deterministic algorithms (slower on GPUs)")
    compile: bool | str = option(
        False,
        "compile the model with torch.compile; with a mode, GPUs run it as CUDA graphs, and max-autotune also tries "
        "kernels",
        nargs="?",
        const=True,
        choices=CUDA_GRAPHS,
    )
    distributed_training: bool = option(False, "share each batch among the processes of torchrun")
    sync_bn: bool = option(
        False,
        "BatchNorm statistics over the batches of all processes",
        acts=(lambda args: args.distributed_training, "without --distributed_training"),
    )

    def __post_init__(self) -> None:
        check_options(self)
        several = self.distributed_training and int(os.environ.get("WORLD_SIZE", 1)) > 1
        if several and self.device not in (None, "cpu", "cuda"):
            raise ArgumentError("device", f"{self.device}: several processes need a GPU each; give cuda or cpu")


TRAINING_ONLY = ("compile", "distributed_training", "sync_bn")
"""The fields of ``ComputeConfig`` that act on training alone."""


def resolve_device(text: str | None, local_rank: int = 0) -> torch.device:
    """Turn the value of ``--device`` into a device.

    Args:
        text: ``"cpu"``, ``"cuda"``, a GPU index, or None for the first GPU, else the CPU.
        local_rank: The process's number on this machine; with None or ``"cuda"`` it chooses the GPU.

    Raises:
        ArgumentError: There is no such device on this machine.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text is None:
        text = "cuda" if gpus else "cpu"
    if text == "cpu":
        return torch.device("cpu")
    index = local_rank % max(gpus, 1) if text == "cuda" else int(text.removeprefix("cuda:"))
    if index >= gpus:
        found = f"{gpus} GPU(s); give cpu or an index below {gpus}" if gpus else "no GPU; give cpu"
        raise ArgumentError("device", f"{text}: this machine has {found}")
    return torch.device("cuda", index)


def prepare(device: torch.device, precision: Precision, deterministic: bool) -> None:
    """Set the process-wide switches for a run, and log the choice."""
    if device.type == "cpu":
        keep_all_freed_memory()
    leave_compiler_out()
    torch.backends.cuda.matmul.allow_tf32 = precision.tf32
    torch.backends.cudnn.allow_tf32 = precision.tf32
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    log.info("device %s (%s), precision %s", device, name, precision.name)


RECYCLED = 31 * 2**20
"""Largest block in bytes that `keep_freed_blocks` can have kept."""

_all_is_kept = False


def keep_all_freed_memory() -> None:
    """For scripts, whose process is their own: have glibc never return freed memory to the system.

    Otherwise each step maps its activations again, and page faults take a good part of the time, in particular for
    large tensors, which are mapped one by one however high the mapping threshold is set.
    """
    global _all_is_kept
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # the numbers of mallopt's parameters
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)  # no mapping: everything comes from the heap
        libc.mallopt(trim_threshold, -1)  # which never shrinks
        _all_is_kept = True


def leave_compiler_out() -> None:
    """For scripts, whose process is their own: have torch's optimizers not import the compiler.

    ``torch._dynamo`` takes nearly as long to import as the rest of torch. Torch wraps methods of its optimizers so
    that compiled code leaves them out; the wrappers import the compiler at the first call and then call the method.
    Scripts compile the model alone (``--compile``), so that the methods themselves do the same.
    """
    optimizers = torch.optim
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        setattr(optimizers.Optimizer, name, inspect.unwrap(getattr(optimizers.Optimizer, name)))
    for kind in (optimizers.SGD, optimizers.Adam):  # AdamW takes Adam's step
        step = inspect.unwrap(kind.step)

        @functools.wraps(step)
        def step_without_compiler(self: torch.optim.Optimizer, *args: Any, step: Any = step, **kwargs: Any) -> Any:
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                return step(self, *args, **kwargs)

        kind.step = step_without_compiler


def keep_freed_blocks() -> float:
    """For library code, in a process that may be anyone's: have glibc keep a bounded amount of freed memory.

    Blocks up to 31 MiB, and 62 MiB in all, are kept for the next use. glibc raises both limits by itself whenever a
    block that large is freed; until then it returns even small blocks to the system, and touching them again costs
    several times the convolution that is done in them.

    Returns:
        The largest block in bytes that is kept when it is freed; twice as much is kept in all. Infinite where
        `keep_all_freed_memory` was called.
    """
    if _all_is_kept:
        return math.inf
    torch.empty(RECYCLED, dtype=torch.uint8)
    return RECYCLED


@contextmanager
def autocast_context(device: torch.device, precision: Precision) -> Iterator[None]:
    """The context in which a forward pass runs under ``precision``."""
    if precision.autocast is None:
        yield
    else:
        with torch.autocast(device.type, dtype=precision.autocast):
            yield


def upload(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor on a device. From the CPU to a GPU it is copied from pinned memory, and nothing waits for the copy."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device, without swapping; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None
