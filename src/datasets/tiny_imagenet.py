"""Tiny ImageNet: from its public zip, downloaded if it is missing, or the extracted folder."""

import hashlib
import logging
import urllib.request
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from src import artifacts
from src.datasets.catalogue import DatasetEntry
from src.datasets.image_folder import decode
from src.datasets.images import ImageSet
from src.datasets.npz import CLASS_NAMES
from src.errors import FileError

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
ROOT = "tiny-imagenet-200"
TIMEOUT = 60  # seconds without an answer
BLOCK = 1 << 20

log = logging.getLogger(__name__)
Tree = tuple[list[str], Callable[[str], bytes]]  # paths below the root, and how to read one


def load_tiny_imagenet(
    entry: DatasetEntry, folder: Path, url: str = URL, md5: str = MD5
) -> tuple[ImageSet, ImageSet]:
    """Train and test part (the zip's validation part).

    Classes are sorted by WordNet id and files by name. The decoded images are kept as ``{name}.npz`` beside
    ``folder``, which later calls of ``load_dataset`` read instead.

    Args:
        entry: The catalogue entry.
        folder: Where the zip, or its extracted folder, stands or is put.
        url: Where the zip is downloaded from.
        md5: Its checksum.

    Raises:
        FileError: The zip is missing and cannot be downloaded, or the files are not as they should be.
    """
    extracted, archive = folder / ROOT, folder / f"{ROOT}.zip"
    if extracted.is_dir():
        return _load(entry, extracted, _folder_tree(extracted))
    if not archive.exists():
        _download(url, archive, md5)
    elif _md5(archive) != md5:
        raise FileError(f"{archive}: is damaged (its md5 is not {md5}); delete it to download it anew")
    with zipfile.ZipFile(archive) as file:
        return _load(entry, archive, _zip_tree(file))


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _download(url: str, archive: Path, md5: str) -> None:
    """Download to ``archive``; nothing is left there unless the checksum is right."""
    digest = hashlib.md5()

    def save(file: BinaryIO) -> None:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            length = int(answer.headers.get("Content-Length") or 0) or None
            with tqdm(
                total=length, unit="B", unit_scale=True, desc=f"downloading {archive.name}", disable=None
            ) as bar:
                while block := answer.read(BLOCK):
                    digest.update(block)
                    bar.update(len(block))
                    file.write(block)
        if digest.hexdigest() != md5:
            raise FileError(f"{archive}: the download from {url} has md5 {digest.hexdigest()}, not {md5}; try again")

    try:
        artifacts.write_with(archive, save)
    except FileError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise FileError(
            f"{archive}: is missing and could not be downloaded from {url} ({error.__cause__}); put the zip there"
        ) from error


def _zip_tree(file: zipfile.ZipFile) -> Tree:
    prefix = f"{ROOT}/"
    names = [name.removeprefix(prefix) for name in file.namelist() if name.startswith(prefix) and name[-1] != "/"]
    return sorted(names), lambda name: file.read(prefix + name)


def _folder_tree(root: Path) -> Tree:
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return sorted(names), lambda name: (root / name).read_bytes()


def _load(entry: DatasetEntry, where: Path, tree: Tree) -> tuple[ImageSet, ImageSet]:
    names, read = tree
    train = [name for name in names if name.startswith("train/") and name.lower().endswith(".jpeg")]
    classes = sorted({name.split("/")[1] for name in train})
    if len(classes) != entry.num_classes:
        raise FileError(
            f"{where}: holds {len(classes)} classes below train/, not {entry.num_classes}; get the zip anew"
        )
    number = {wnid: label for label, wnid in enumerate(classes)}
    listing = [(name, number[name.split("/")[1]]) for name in sorted(train, key=_class_and_name)]
    parts = {"train": listing, "test": _validation(where, names, read, number)}
    arrays = {CLASS_NAMES: np.array(classes)}
    for part, files in parts.items():
        arrays[f"x_{part}"] = _decode(entry, where, files, read)
        arrays[f"y_{part}"] = np.array([label for _, label in files])
    cache = where.parent.parent / f"{entry.name}.npz"
    try:
        artifacts.write_npz(cache, **arrays)
        log.info("kept the decoded images as %s, to be read next time", cache)
    except FileError as error:
        log.warning("the decoded images are not kept: %s", error)
    return tuple(
        ImageSet(
            entry,
            part,
            torch.from_numpy(arrays.pop(f"x_{part}")).permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(arrays[f"y_{part}"]),
            classes,
        )
        for part in parts
    )


def _class_and_name(path: str) -> tuple[str, str]:
    parts = path.split("/")
    return parts[1], parts[-1]


def _validation(
    where: Path, names: list[str], read: Callable[[str], bytes], number: dict[str, int]
) -> list[tuple[str, int]]:
    """Validation images, sorted by name, with the labels of ``val_annotations.txt``."""
    listing = "val/val_annotations.txt"
    if listing not in names:
        raise FileError(f"{where}: holds no {listing}, which says the classes of the test images; get the zip anew")
    files = []
    present = set(names)
    for line in read(listing).decode().splitlines():
        name, wnid = [*line.split("\t"), ""][:2]
        path = f"val/images/{name}"
        if wnid not in number or path not in present:
            raise FileError(
                f"{where}: {listing} names {name!r} of class {wnid!r}, which is not there; get the zip anew"
            )
        files.append((path, number[wnid]))
    return sorted(files)


def _decode(
    entry: DatasetEntry, where: Path, files: list[tuple[str, int]], read: Callable[[str], bytes]
) -> np.ndarray:
    """uint8 ``(n, h, w, c)``; the grey ones among the images are made colour."""
    size = entry.image_size
    images = np.empty((len(files), size, size, entry.channels), dtype=np.uint8)
    for index, (name, _) in enumerate(tqdm(files, desc=f"reading {entry.name}", mininterval=1, disable=None)):
        image = decode(f"{where}: {name}", BytesIO(read(name)), entry.channels)
        if image.shape[1:] != (size, size):
            raise FileError(f"{where}: {name} is {image.shape[1]}x{image.shape[2]}, not {size}x{size}")
        images[index] = image.permute(1, 2, 0).numpy()
    return images
