"""Tiny ImageNet: from its public zip, downloaded if it is missing, or the extracted folder."""

import logging
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from src import artifacts
from src.datasets.catalogue import DatasetEntry
from src.datasets.decoding import Faults, is_system_file, open_image
from src.datasets.download import fetch
from src.datasets.images import ImageSet
from src.datasets.own import CLASS_NAMES
from src.errors import FileError

ROOT = "tiny-imagenet-200"

log = logging.getLogger(__name__)
Tree = tuple[list[str], Callable[[str], bytes]]  # paths below the root, and how to read one


def load_tiny_imagenet(entry: DatasetEntry, folder: Path) -> tuple[ImageSet, ImageSet]:
    """Train and test part (the zip's validation part).

    Classes are sorted by WordNet id and files by name. The decoded images are kept as ``{name}.npz`` beside
    ``folder``, which later calls of ``load_dataset`` read instead.

    Args:
        entry: The catalogue entry.
        folder: Where the zip is or is downloaded to, or its content, with or without the zip's own top folder.

    Raises:
        FileError: The zip is missing and cannot be downloaded, or files are missing or damaged.
    """
    cache = folder.parent / f"{entry.name}.npz"
    for root in (folder / ROOT, folder):
        if (root / "train").is_dir():
            return _load(entry, root, _folder_tree(root), cache)
    (archive,) = fetch(entry, folder)
    with zipfile.ZipFile(archive) as file:
        return _load(entry, archive, _zip_tree(file), cache)


def _zip_tree(file: zipfile.ZipFile) -> Tree:
    prefix = f"{ROOT}/"
    names = [name.removeprefix(prefix) for name in file.namelist() if name.startswith(prefix) and name[-1] != "/"]
    return _images_and_lists(names), lambda name: file.read(prefix + name)


def _folder_tree(root: Path) -> Tree:
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return _images_and_lists(names), lambda name: (root / name).read_bytes()


def _images_and_lists(names: list[str]) -> list[str]:
    return sorted(name for name in names if not is_system_file(name.split("/")[-1]))


def _load(entry: DatasetEntry, where: Path, tree: Tree, cache: Path) -> tuple[ImageSet, ImageSet]:
    names, read = tree
    train = [name for name in names if name.startswith("train/") and name.lower().endswith(".jpeg")]
    classes = sorted({name.split("/")[1] for name in train})
    if len(classes) != entry.num_classes:
        raise FileError(
            f"{where}: has {len(classes)} classes below train/, not {entry.num_classes}; get the zip again"
        )
    number = {wnid: label for label, wnid in enumerate(classes)}
    listing = [(name, number[name.split("/")[1]]) for name in sorted(train, key=_class_and_name)]
    parts = {"train": listing, "test": _validation(where, names, read, number)}
    arrays = {CLASS_NAMES: np.array(classes)}
    for part, files in parts.items():
        arrays[f"x_{part}"] = _decode(entry, where, files, read)
        arrays[f"y_{part}"] = np.array([label for _, label in files])
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
    """Validation images, sorted by name, with their labels.

    The images are in ``val/images``, with their classes in ``val_annotations.txt``, or in a folder per class, to
    which a common preparation script moves them.
    """
    listing, faults = "val/val_annotations.txt", Faults(where)
    paths = {
        name.split("/")[-1]: name for name in names if name.startswith("val/") and name.lower().endswith(".jpeg")
    }
    folders = {name: path.split("/")[1] for name, path in paths.items()}
    if not any(folder in number for folder in folders.values()):
        if listing not in names:
            raise FileError(
                f"{where}: has no {listing}, which names the classes of the test images; get the zip again"
            )
        try:
            lines = read(listing).decode().splitlines()
        except UnicodeDecodeError as error:
            raise FileError(f"{where}: {listing} is not a text file in UTF-8; get the zip again") from error
        if not lines:
            raise FileError(f"{where}: {listing} is empty; get the zip again")
        folders = dict([*line.split("\t"), ""][:2] for line in lines)
    files = {}
    for name, wnid in folders.items():
        if wnid not in number or name not in paths:
            faults.add(f"val: {name!r} of class {wnid!r}", "is not there; get the zip again")
        else:
            files[name] = (paths[name], number[wnid])
    faults.refuse()
    return [files[name] for name in sorted(files)]


def _decode(
    entry: DatasetEntry, where: Path, files: list[tuple[str, int]], read: Callable[[str], bytes]
) -> np.ndarray:
    """uint8 ``(n, h, w, c)``; gray images are converted to color, and EXIF is ignored, as published."""
    size, faults = entry.image_size, Faults(where)
    images = np.empty((len(files), size, size, entry.channels), dtype=np.uint8)
    for index, (name, _) in enumerate(tqdm(files, desc=f"reading {entry.name}", mininterval=1, disable=None)):
        try:
            image = open_image(BytesIO(read(name)))
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            faults.add(name, f"{error}; get the zip again")
            continue
        if image.size != (size, size):
            faults.add(name, f"is {image.height}x{image.width}, not {size}x{size}; get the zip again")
        else:
            images[index] = image.convert("RGB")
    faults.refuse()
    return images
