"""Data sets that torchvision reads; missing files are downloaded."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.datasets.catalogue import DatasetEntry
from src.datasets.download import fetch
from src.datasets.images import ImageSet
from src.errors import FileError

log = logging.getLogger(__name__)


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
        raise FileError(f"{folder}: the {part} files of {entry.name} are damaged; delete them to download them again")
    if not 0 <= labels.min() <= labels.max() < entry.num_classes:
        raise FileError(
            f"{folder}: the {part} files of {entry.name} have labels from {labels.min()} to {labels.max()}; it has "
            f"classes 0 to {entry.num_classes - 1}; delete them to download them again"
        )
    if part in entry.published and part_digest(images, labels) != entry.published[part]:
        log.warning("%s: the %s files differ from the published %s; they are used as they are", folder, part,
                    entry.name)  # fmt: skip
    return ImageSet(entry, part, images, labels)


def part_digest(images: Tensor, labels: Tensor) -> str:
    """16 hex digits that identify the pixels and labels of a part."""
    digest = hashlib.sha256(images.numpy())
    digest.update(labels.numpy())
    return digest.hexdigest()[:16]


def _open(entry: DatasetEntry, folder: Path, reader: _Reader, part: str) -> Any:
    """Torchvision's data set; the network is used only where files are missing."""
    from src._torchvision import torchvision

    make, arguments = getattr(torchvision.datasets, reader.class_name), reader.part(part)
    try:
        return make(str(folder), **arguments, download=False)
    except Exception as error:  # missing files and damaged ones raise nearly anything
        reason = error
    if "not found" not in str(reason):
        raise _damaged(entry, folder, part, reason) from reason
    fetch(entry, folder)
    try:
        return make(str(folder), **arguments, download=True)  # unpacks what was downloaded
    except OSError:  # a full disk, or a folder that cannot be written
        raise
    except Exception as error:
        raise _damaged(entry, folder, part, error) from error


def _damaged(entry: DatasetEntry, folder: Path, part: str, reason: BaseException) -> FileError:
    return FileError(
        f"{folder}: the {part} files of {entry.name} are damaged ({_line(reason)}); delete them to download again"
    )


def _line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0].rstrip(": ") or type(error).__name__)[:160]


def _channels_first(data: Any, channels_first: bool) -> Tensor:
    """uint8 ``(n, c, h, w)`` from torchvision's ``data`` attribute."""
    images = torch.as_tensor(data)
    if images.ndim == 3:
        return images[:, None].contiguous()
    return (images if channels_first else images.permute(0, 3, 1, 2)).contiguous()
