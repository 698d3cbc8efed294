"""Devices, precisions, determinism and memory allocation."""

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
    """The number formats that a model computes in.

    Attributes:
        name: The value of ``--precision``.
        weights: Dtype of the weights and inputs, as a name in torch.
        products: Dtype of matrix products and convolutions; None for that of ``weights``.
        tf32: Whether NVIDIA GPUs may round the inputs of float32 products to TF32.
        note: Description for the help text.
    """

    name: str
    weights: str = "float32"
    products: str | None = None
    tf32: bool = False
    note: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and inputs."""
        return getattr(torch, self.weights)

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of matrix products and convolutions; None if it is ``dtype``."""
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
"""Modes of ``torch.compile`` that use CUDA graphs. The next pass overwrites a graph's outputs."""


def parse_device(text: str) -> str:
    """Parse the value of ``--device``. Does not check that the machine has the device.

    Raises:
        argparse.ArgumentTypeError: The text does not name a device.
    """
    if text not in ("cpu", "cuda") and not text.removeprefix("cuda:").isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; give cpu, cuda, or the index of a GPU")
    return text


@dataclass(frozen=True)
class ComputeConfig:
    """Device, precision and distributed settings.

    Attributes:
        device: ``"cpu"``, ``"cuda"``, a GPU index, or None for the first GPU if there is one, else the CPU.
        precision: A key of ``PRECISIONS``.
        deterministic: Whether only deterministic algorithms are allowed.
        compile: Whether to compile the model for training, or a mode in ``CUDA_GRAPHS``.
        distributed_training: Whether the processes of torchrun share each batch.
        sync_bn: Whether BatchNorm computes its statistics over the batches of all processes.

    Raises:
        ArgumentError: Several processes would share one GPU.
    """

    device: str | None = option(
        None, "cpu, cuda, or a GPU index (default: the first GPU if there is one, else the CPU)", parse_device
    )
    precision: str = option(
        "fp32",
        lambda choices: "; ".join(f"{name}: {PRECISIONS[name].note}" for name in choices),
        choices=tuple(PRECISIONS),
    )
    deterministic: bool = option(False, "use only deterministic algorithms (slower on GPUs)")
    compile: bool | str = option(
        False,
        "compile the model with torch.compile; both modes use CUDA graphs on GPUs, and max-autotune also benchmarks "
        "kernels",
        nargs="?",
        const=True,
        choices=CUDA_GRAPHS,
    )
    distributed_training: bool = option(False, "split each batch across the processes of torchrun")
    sync_bn: bool = option(
        False,
        "compute BatchNorm statistics over the batches of all processes",
        acts=(lambda args: args.distributed_training, "without --distributed_training"),
    )

    def __post_init__(self) -> None:
        check_options(self)
        several = self.distributed_training and int(os.environ.get("WORLD_SIZE", 1)) > 1
        if several and self.device not in (None, "cpu", "cuda"):
            raise ArgumentError("device", f"{self.device}: each process needs its own GPU; give cuda or cpu")


def computes_bf16() -> bool:
    """Whether the processor that is used by default has instructions for bfloat16 products.

    On processors without them, bf16 is slower than fp32.
    """
    if Path("/proc/driver/nvidia").exists() and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"amx_bf16", "avx512_bf16", "bf16"})  # bf16: the name on ARM


TRAINING_ONLY = ("compile", "distributed_training", "sync_bn")
"""The fields of ``ComputeConfig`` that affect only training."""


def resolve_device(text: str | None, local_rank: int = 0) -> torch.device:
    """Convert the value of ``--device`` to a device.

    Args:
        text: ``"cpu"``, ``"cuda"``, a GPU index, or None for the first GPU if there is one, else the CPU.
        local_rank: The process's rank on this machine. It selects the GPU if ``text`` is None or ``"cuda"``.

    Raises:
        ArgumentError: This machine has no such device.
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
    """Apply the process-wide settings of a run and log the device and precision."""
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
"""Size in bytes of the largest block that ``keep_freed_blocks`` can make glibc keep."""

_all_is_kept = False


def keep_all_freed_memory() -> None:
    """Make glibc never return freed memory to the system. For scripts only: it affects the whole process.

    Otherwise each step maps its activations again, and page faults take a large part of the time. This affects mostly
    large tensors: glibc caps the mmap threshold, so they are always mapped individually.
    """
    global _all_is_kept
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # the numbers of mallopt's parameters
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)  # never mmap: allocate everything from the heap
        libc.mallopt(trim_threshold, -1)  # never shrink the heap
        _all_is_kept = True


def leave_compiler_out() -> None:
    """Stop torch's optimizers from importing the compiler. For scripts only: it affects the whole process.

    ``torch._dynamo`` takes nearly as long to import as the rest of torch. Torch wraps its optimizers' methods to
    exclude them from compiled code; the wrappers import the compiler on the first call. Scripts compile only the
    model (``--compile``), so the unwrapped methods behave the same.
    """
    optimizers = torch.optim
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        setattr(optimizers.Optimizer, name, inspect.unwrap(getattr(optimizers.Optimizer, name)))
    for kind in (optimizers.SGD, optimizers.Adam):  # AdamW inherits Adam's step
        step = inspect.unwrap(kind.step)

        @functools.wraps(step)
        def step_without_compiler(self: torch.optim.Optimizer, *args: Any, step: Any = step, **kwargs: Any) -> Any:
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                return step(self, *args, **kwargs)

        kind.step = step_without_compiler


def keep_freed_blocks() -> float:
    """Make glibc keep a bounded amount of freed memory. For library code, which does not own the process.

    Blocks of up to 31 MiB, and 62 MiB in total, are kept for reuse. glibc raises both limits itself when a block that
    large is freed. Until then it returns even small blocks to the system, and touching them again costs several
    times as much as the convolution computed in them.

    Returns:
        The size in bytes of the largest block that is kept when freed; twice as much is kept in total. Infinity if
        ``keep_all_freed_memory`` was called.
    """
    if _all_is_kept:
        return math.inf
    torch.empty(RECYCLED, dtype=torch.uint8)
    return RECYCLED


@contextmanager
def autocast_context(device: torch.device, precision: Precision) -> Iterator[None]:
    """Context manager that runs a forward pass in ``precision``."""
    if precision.autocast is None:
        yield
    else:
        with torch.autocast(device.type, dtype=precision.autocast):
            yield


def upload(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Move a tensor to a device. Copies from the CPU to a GPU use pinned memory and are asynchronous."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def available_memory(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes, without swapping; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None
