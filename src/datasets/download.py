"""Downloads of data sets: over https where the host offers it, and never used before their checksum is verified."""

import hashlib
import http.client
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from tqdm import tqdm

from src import artifacts
from src.datasets.catalogue import DatasetEntry, Download
from src.errors import FileError

TIMEOUT = 60  # seconds without an answer
BLOCK = 1 << 20

T = TypeVar("T")


class _DownloadError(Exception):
    """A mirror did not deliver the file."""


def fetch(entry: DatasetEntry, folder: Path) -> list[Path]:
    """The files that a data set is downloaded as; missing ones are downloaded, the others verified.

    Args:
        entry: The data set.
        folder: Its folder.

    Returns:
        Their paths, in the catalogue's order.

    Raises:
        FileError: A file is damaged, or cannot be downloaded.
    """
    return [_fetch_one(entry, download, folder) for download in entry.downloads]


def _fetch_one(entry: DatasetEntry, download: Download, folder: Path) -> Path:
    path = folder / download.file
    if path.exists():
        found = artifacts.file_digest(path)
        if found != download.sha256:
            raise FileError(
                f"{path}: is damaged (its sha256 is {found}, not {download.sha256}); delete it to download it again"
            )
        return path
    reasons = []
    for url in download.urls:
        try:
            return artifacts.write_with(path, lambda file, url=url: _copy(url, download, file), interruptible=True)
        except _DownloadError as error:
            reasons.append(f"{url}: {error}")
    raise FileError(
        f"{path}: is missing and could not be downloaded ({'; '.join(reasons)}); put it there, or {entry.name}.npz "
        f"into {folder.parent}"
    )


def _copy(url: str, download: Download, file: BinaryIO) -> None:
    """Download into an open file."""
    digests = {name: hashlib.new(name) for name in ("md5", "sha256")}
    with _connected(lambda: urllib.request.urlopen(url, timeout=TIMEOUT)) as answer:
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
    """Take a step that needs the connection; what goes wrong with it is not an error of the file that is written."""
    try:
        return step()
    except (OSError, http.client.HTTPException) as error:
        raise _DownloadError(str(error) or type(error).__name__) from error
