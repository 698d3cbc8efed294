"""The score files that the SAMIS authors published: which there are, and how they are fetched and verified."""

import csv
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from src.artifacts.io import write_with
from src.artifacts.store import REPLACE, record_path
from src.errors import ArgumentError, FileError
from src.metrics.registry import SCORES

COMMIT = "61b2ed3fbb1b25a4f1deeed0b415a0d3bfe4f942"
BASE_URL = f"https://raw.githubusercontent.com/AndAgio/SAMIS/{COMMIT}/src/metrics"
TABLE = Path(__file__).with_name("published_scores.tsv")
CHUNK = 1 << 18  # bytes
TIMEOUT = 60  # seconds without an answer


@dataclass(frozen=True)
class PublishedFile:
    r"""One published file. Size and sha256 are None where only its git blob id is known.

    A git blob id is the sha1 of ``blob SIZE\0`` and the content.
    """

    mode: str
    dataset: str
    size: int | None
    sha256: str | None
    blob: str

    def path(self, folder: str | Path) -> Path:
        """Where the file belongs in a metrics folder."""
        return SCORES[self.mode].path(folder, self.dataset)

    def is_content_of(self, file: BinaryIO) -> bool:
        """Whether an open file holds exactly this one."""
        size = file.seek(0, os.SEEK_END)
        if self.size is not None and size != self.size:
            return False
        file.seek(0)
        if self.sha256 is not None:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
        digest = hashlib.sha1(b"blob %d\0" % size)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        return digest.hexdigest() == self.blob


@cache
def published_table() -> tuple[PublishedFile, ...]:
    """Every published file, from ``published_scores.tsv`` beside this module (``-`` where unknown)."""
    rows = csv.DictReader(TABLE.read_text().splitlines(), delimiter="\t")
    return tuple(
        PublishedFile(
            mode=row["mode"],
            dataset=row["dataset"],
            size=None if row["bytes"] == "-" else int(row["bytes"]),
            sha256=None if row["sha256"] == "-" else row["sha256"],
            blob=row["git_blob"],
        )
        for row in rows
    )


def published_datasets(mode: str | None = None) -> list[str]:
    """The data sets of which this score was published, or, without one, any."""
    return list(dict.fromkeys(file.dataset for file in published_table() if mode in (None, file.mode)))


def published_summary() -> str:
    """What was published for which data set, in one line."""
    return "; ".join(
        f"{dataset}: {', '.join(file.mode for file in published_table() if file.dataset == dataset)}"
        for dataset in published_datasets()
    )


def published_files(dataset: str, modes: Iterable[str] | None = None) -> list[PublishedFile]:
    """The published files of a data set.

    Args:
        dataset: ``cifar10``, ``cifar100`` or ``svhn``.
        modes: Which modes; None for all that were published.

    Raises:
        ArgumentError: Nothing was published for the data set, or for one of the modes.
    """
    there = {file.mode: file for file in published_table() if file.dataset == dataset.lower()}
    if not there:
        raise ArgumentError("dataset", f"{dataset}: no scores of it were published; there are {published_summary()}")
    missing = [mode for mode in modes or () if mode not in there]
    if missing:
        raise ArgumentError(
            "modes", f"{' '.join(missing)}: not published for {dataset}; there are {published_summary()}"
        )
    return [there[mode] for mode in modes] if modes else list(there.values())


def fetch(file: PublishedFile, folder: str | Path, base_url: str = BASE_URL, overwrite: bool = False) -> bool:
    """Bring one published file into a metrics folder, verified by size and hash.

    Args:
        file: Which one.
        folder: The metrics folder.
        base_url: Where the folders of the published scores stand.
        overwrite: Replace a file of other content.

    Returns:
        Whether it was downloaded; False if the right file was there already.

    Raises:
        FileError: It could not be downloaded, or is not the published one (nothing is written then); or there is a
            file of other content.
    """
    path = file.path(folder)
    if path.exists():
        with path.open("rb") as there:
            if file.is_content_of(there):
                return False
        if not overwrite:
            raise FileError(f"{path}: has different scores than the published file; {REPLACE}")
    url = f"{base_url.rstrip('/')}/{path.relative_to(folder).as_posix()}"

    def write(target: BinaryIO) -> None:
        _download(file, url, target)
        # A record of the scores that are replaced must not be taken for one of these.
        record_path(path).unlink(missing_ok=True)

    write_with(path, write)
    return True


def _download(file: PublishedFile, url: str, target: BinaryIO) -> None:
    """Stream a url into an open file and verify what came."""
    for chunk in _chunks(url, file.size):
        target.write(chunk)
    target.flush()
    # The target is open for writing only; a second file object reads what was written.
    with os.fdopen(os.dup(target.fileno()), "rb") as written:
        right = file.is_content_of(written)
    if not right:
        raise FileError(f"{url}: is not the published file (size or hash differ); nothing was written, try again")


def _chunks(url: str, size: int | None) -> Iterator[bytes]:
    """The content of a url, piece by piece, with a progress bar. What the network does wrong is one line."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            announced = answer.headers.get("Content-Length", "")
            total = int(announced) if announced.isdigit() else size
            with tqdm(total=total, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1], disable=None) as bar:
                while chunk := answer.read(CHUNK):
                    bar.update(len(chunk))
                    yield chunk
    except urllib.error.HTTPError as error:
        raise FileError(f"{url}: the server answers {error.code} {error.reason}; check the address") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise FileError(f"{url}: could not be downloaded ({reason}); check the connection or the address") from error
