"""Public data sets in memory: the embedded digits, and data sets that torchvision reads.

Missing files are downloaded, over https if the host supports it. They are used only after their checksum is verified.
"""

import hashlib
import http.client
import inspect
import logging
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from src.artifacts.io import file_digest, write_with
from src.datasets.batches import ImageSet
from src.datasets.registry import DatasetEntry, Download
from src.errors import FileError

TEST_SHARE = 0.2  # fraction of digits used for testing
SPLIT_SEED = 0  # part of the definition of digits; changing it changes every index
_TIMEOUT = 60  # seconds without a response
BLOCK = 1 << 20

T = TypeVar("T")
log = logging.getLogger(__name__)


def load_digits(entry: DatasetEntry, folder: Path) -> tuple[ImageSet, ImageSet]:
    """Load digits: a fixed split with a fifth of each class for testing, in the original order.

    The images are those of scikit-learn's ``load_digits``: the test set of E. Alpaydin and C. Kaynak's "Optical
    Recognition of Handwritten Digits" (UCI Machine Learning Repository, CC BY 4.0).

    Args:
        entry: The catalog entry.
        folder: Not used; the images are embedded.

    Returns:
        The training set and the test set.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"], file["labels"].astype(np.int64)  # pixel values 0..16
    images = np.round(images[:, None] * (255 / 16)).astype(np.uint8)
    generator = np.random.RandomState(SPLIT_SEED)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(entry.num_classes):
        members = np.flatnonzero(labels == label)
        held_out[generator.permutation(members)[: round(TEST_SHARE * len(members))]] = True
    train, test = (
        ImageSet(entry, part, torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen]))
        for part, chosen in (("train", ~held_out), ("test", held_out))
    )
    return train, test


def load_torchvision(class_name: str, entry: DatasetEntry, folder: Path) -> tuple[ImageSet, ImageSet]:
    """Load a data set from torchvision's files in ``folder``. Missing files are downloaded.

    Args:
        class_name: The torchvision class.
        entry: The catalog entry.
        folder: The folder of the files.

    Returns:
        The training set and the test set.

    Raises:
        FileError: The files are missing and cannot be downloaded, or are damaged.
    """
    train, test = (_read_part(class_name, entry, folder, part) for part in ("train", "test"))
    return train, test


def _read_part(class_name: str, entry: DatasetEntry, folder: Path, part: str) -> ImageSet:
    data = _open(class_name, entry, folder, part)
    images = torch.as_tensor(data.data)
    labels = torch.as_tensor(np.asarray(data.targets if hasattr(data, "targets") else data.labels, dtype=np.int64))
    wanted = (entry.channels, entry.image_size, entry.image_size)
    if images.ndim == 3:
        images = images[:, None]
    elif tuple(images.shape[1:]) != wanted:  # channels last
        images = images.permute(0, 3, 1, 2)
    images = images.contiguous()
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != wanted or len(images) != len(labels):
        raise FileError(f"{folder}: the {part} files of {entry.name} are damaged; delete them to download them again")
    if not 0 <= labels.min() <= labels.max() < entry.num_classes:
        raise FileError(
            f"{folder}: the {part} files of {entry.name} have labels from {labels.min()} to {labels.max()}, not 0 to "
            f"{entry.num_classes - 1}; delete them to download them again"
        )
    if part in entry.published:
        digest = hashlib.sha256(images.numpy())
        digest.update(labels.numpy())
        if digest.hexdigest()[:16] != entry.published[part]:
            log.warning("%s: the %s files differ from the published %s; using them anyway",
                        folder, part, entry.name)  # fmt: skip
    return ImageSet(entry, part, images, labels)


def _open(class_name: str, entry: DatasetEntry, folder: Path, part: str) -> Any:
    """Open torchvision's data set. Accesses the network only if files are missing."""
    from src._torchvision import torchvision

    make = getattr(torchvision.datasets, class_name)
    named = "train" in inspect.signature(make).parameters
    chosen = {"train": part == "train"} if named else {"split": part}
    try:
        return make(str(folder), **chosen, download=False)
    except Exception as error:  # missing or damaged files can raise almost any exception
        reason = error
    if "not found" not in str(reason):
        raise _damaged(entry, folder, part, reason) from reason
    fetch_dataset(entry, folder)
    try:
        return make(str(folder), **chosen, download=True)  # unpacks the downloaded files
    except OSError:  # a full disk, or a folder that cannot be written
        raise
    except Exception as error:
        raise _damaged(entry, folder, part, error) from error


def _damaged(entry: DatasetEntry, folder: Path, part: str, error: BaseException) -> FileError:
    reason = (str(error).strip().split("\n")[0].rstrip(": ") or type(error).__name__)[:160]
    return FileError(
        f"{folder}: the {part} files of {entry.name} are damaged ({reason}); delete them to download again"
    )


class _DownloadError(Exception):
    """A mirror did not deliver the file."""


def fetch_dataset(entry: DatasetEntry, folder: Path) -> list[Path]:
    """Download the missing files of a data set, and verify the others.

    Args:
        entry: The data set.
        folder: The data set's folder.

    Returns:
        The paths of the files, in the catalog's order.

    Raises:
        FileError: A file is damaged or cannot be downloaded.
    """
    return [_fetch_one(entry, download, folder) for download in entry.downloads]


def _fetch_one(entry: DatasetEntry, download: Download, folder: Path) -> Path:
    path = folder / download.file
    if path.exists():
        found = file_digest(path)
        if found != download.sha256:
            raise FileError(
                f"{path}: is damaged (its sha256 is {found}, not {download.sha256}); delete it to download it again"
            )
        return path
    reasons = []
    for url in download.urls:
        try:
            return write_with(path, lambda file, url=url: _copy(url, download, file), interruptible=True)
        except _DownloadError as error:
            reasons.append(f"{url}: {error}")
    raise FileError(
        f"{path}: is missing and could not be downloaded ({'; '.join(reasons)}); put it there, or put "
        f"{entry.name}.npz in {folder.parent}"
    )


def _copy(url: str, download: Download, file: BinaryIO) -> None:
    """Download to an open file."""
    digests = {name: hashlib.new(name) for name in ("md5", "sha256")}
    with _connected(lambda: urllib.request.urlopen(url, timeout=_TIMEOUT)) as answer:
        length = int(answer.headers.get("Content-Length") or 0) or None
        label = f"downloading {Path(download.file).name}"
        with tqdm(total=length, unit="B", unit_scale=True, desc=label, disable=None) as bar:
            while block := _connected(lambda: answer.read(BLOCK)):
                for digest in digests.values():
                    digest.update(block)
                bar.update(len(block))
                file.write(block)
    for name, digest in digests.items():
        if digest.hexdigest() != getattr(download, name):
            raise _DownloadError(f"has {name} {digest.hexdigest()}, not {getattr(download, name)}")


def _connected(step: Callable[[], T]) -> T:
    """Run a network operation, and raise its errors as ``_DownloadError``: they are not errors of the output file."""
    try:
        return step()
    except (OSError, http.client.HTTPException) as error:
        raise _DownloadError(str(error) or type(error).__name__) from error
