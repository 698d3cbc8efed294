"""Data sets that torchvision reads, and downloads where they are missing."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.datasets.catalogue import DatasetEntry
from src.datasets.images import ImageSet
from src.errors import FileError

TIMEOUT = 60  # seconds without an answer


@dataclass(frozen=True)
class _Reader:
    """How torchvision calls a data set, and where it keeps the labels."""

    class_name: str
    part: Callable[[str], dict[str, Any]] = lambda part: {"train": part == "train"}
    labels: str = "targets"
    channels_first: bool = False


READERS = {
    "mnist": _Reader("MNIST"),
    "fmnist": _Reader("FashionMNIST"),
    "cifar10": _Reader("CIFAR10"),
    "cifar100": _Reader("CIFAR100"),
    "svhn": _Reader("SVHN", lambda part: {"split": part}, "labels", channels_first=True),
}


def load_vision(entry: DatasetEntry, folder: Path) -> tuple[ImageSet, ImageSet]:
    """Train and test part from torchvision's files under ``folder``, downloaded if they are missing.

    Raises:
        FileError: The files are missing and cannot be downloaded, or are damaged.
    """
    return _load_part(entry, folder, "train"), _load_part(entry, folder, "test")


def _load_part(entry: DatasetEntry, folder: Path, part: str) -> ImageSet:
    reader = READERS[entry.name]
    data = _open(entry, folder, reader, part)
    images = _channels_first(data.data, reader.channels_first)
    labels = torch.as_tensor(np.asarray(getattr(data, reader.labels), dtype=np.int64))
    wanted = (entry.channels, entry.image_size, entry.image_size)
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != wanted or len(images) != len(labels):
        raise FileError(f"{folder}: the {part} files of {entry.name} are damaged; delete them to download anew")
    return ImageSet(entry, part, images, labels)


def _open(entry: DatasetEntry, folder: Path, reader: _Reader, part: str) -> Any:
    """Torchvision's data set; the network is used only where files are missing or fail their checksum."""
    from torchvision import datasets

    make, arguments = getattr(datasets, reader.class_name), reader.part(part)
    try:
        return make(str(folder), **arguments, download=False)
    except Exception as error:  # missing files and damaged ones raise nearly anything
        reason = error
    if "not found" not in str(reason):
        raise FileError(
            f"{folder}: the {part} files of {entry.name} are damaged ({_line(reason)}); delete them to download anew"
        ) from reason
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _impatience():
            return make(str(folder), **arguments, download=True)
    except Exception as error:
        raise FileError(
            f"{folder}: holds no {entry.name}, and it could not be downloaded ({_line(error)}); "
            f"put torchvision's files there, or {entry.name}.npz into {folder.parent}"
        ) from error


@contextmanager
def _impatience() -> Iterator[None]:
    """Give up where a server does not answer; torchvision itself would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0].rstrip(": ") or type(error).__name__)[:160]


def _channels_first(data: Any, channels_first: bool) -> Tensor:
    """uint8 ``(n, c, h, w)`` from torchvision's ``data`` attribute."""
    images = torch.as_tensor(data)
    if images.ndim == 3:
        return images[:, None].contiguous()
    return (images if channels_first else images.permute(0, 3, 1, 2)).contiguous()
