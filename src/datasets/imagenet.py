"""ImageNet (ILSVRC2012), streamed from files during training, and Tiny ImageNet, in memory."""

import hashlib
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from src.artifacts.io import write_npz
from src.datasets.augment import crop_boxes
from src.datasets.batches import ImageSet
from src.datasets.decoding import Faults, is_system_file, open_image
from src.datasets.files import FileNames
from src.datasets.own_npz import CLASS_NAMES, FILES
from src.datasets.registry import DatasetEntry
from src.datasets.vision import fetch_dataset
from src.errors import FileError

TINY_ROOT = "tiny-imagenet-200"
FOLDERS = {"train": "train", "test": "val"}
RESIZE = 256 / 224  # ratio of the resized shorter side to the center crop
MOST_WORKERS = 8
SHARED_MEMORY = "/dev/shm"  # 64 MB by default in Docker
SHARED_BATCHES = 64  # more batches than all workers of a machine keep at once

log = logging.getLogger(__name__)


def load_imagenet(entry: DatasetEntry, folder: Path) -> tuple[ImageSet, ImageSet]:
    """Load ImageNet, streamed from ``folder/train/WNID`` and ``folder/val/WNID``. The validation set is the test set.

    Missing folders are extracted from the local archives ``ILSVRC2012_img_train.tar``, ``ILSVRC2012_img_val.tar`` and
    ``ILSVRC2012_devkit_t12.tar.gz``, which are verified by md5. Classes are sorted by WordNet ID and files by name.

    Returns:
        The training set and the test set.

    Raises:
        FileError: There are neither folders nor valid archives.
    """
    for name in FOLDERS.values():
        if not (folder / name).is_dir():
            _extract(folder, name)
    classes = _classes(folder / FOLDERS["train"])
    if len(classes) != entry.num_classes:
        raise FileError(
            f"{folder / FOLDERS['train']}: has {len(classes)} class folders; {entry.name} has {entry.num_classes}"
        )
    train, test = (_scan(entry, part, folder / name, classes) for part, name in FOLDERS.items())
    return train, test


def _extract(folder: Path, name: str) -> None:
    """Extract one part to a temporary folder and rename it, so that an interrupted extraction is never used."""
    from src._torchvision import torchvision

    archives = torchvision.datasets.imagenet

    partial = folder / f".{name}.part"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        if name == FOLDERS["train"]:
            archives.parse_train_archive(folder, folder=partial.name)
        else:
            archives.parse_devkit_archive(folder)
            archives.parse_val_archive(folder, folder=partial.name)
        partial.rename(folder / name)
    except Exception as error:  # a damaged archive can raise almost any exception
        reason = str(error).strip().split("\n")[0][:120]
        wanted = ", ".join(file for file, _ in archives.ARCHIVE_META.values())
        raise FileError(
            f"{folder}: has no {name}/ with a folder per class, and it could not be extracted ({reason}); put "
            f"{wanted} there (from image-net.org, which requires a login)"
        ) from error


def _classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_system_file(entry.name))


def _scan(entry: DatasetEntry, part: str, folder: Path, classes: list[str]) -> "StreamedImages":
    names, labels, faults = [], [], Faults(folder)
    for name in sorted(set(_classes(folder)) - set(classes)):
        faults.add(name, f"is a class without a folder in {FOLDERS['train']}/")
    for label, wnid in enumerate(classes):
        there = list(os.scandir(folder / wnid)) if (folder / wnid).is_dir() else []
        there = sorted((file for file in there if not is_system_file(file.name)), key=lambda file: file.name)
        for file in there:
            if not file.is_file():  # opening a pipe would block
                faults.add(f"{wnid}/{file.name}", "is not a regular file; remove or replace it")
        if not there and part == "train":
            faults.add(wnid, "has no images; extract the archives again")
        names += [f"{wnid}/{file.name}" for file in there]
        labels += [label] * len(there)
    faults.raise_if_any()
    if not names:
        raise FileError(f"{folder}: has no images in class folders; extract the archives again")
    # Names are bytes in one array, because a list of a million strings would be copied into every worker.
    paths = np.array([os.fsencode(name) for name in names])
    found = StreamedImages(entry, part, folder, paths, labels, classes)
    found.files = FileNames(folder, paths)
    return found


def read_image(path: Path, size: int, draws: Tensor | None = None) -> Tensor:
    """Decode one image and crop it to ``size``.

    Args:
        path: The file.
        size: Height and width of the result.
        draws: Uniform ``(CROP_DRAWS,)`` for a random resized crop. If None, the shorter side is scaled to 256/224 of
            ``size`` and the center is cropped.

    Returns:
        uint8 ``(3, size, size)``.

    Raises:
        FileError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            # As in torchvision and published work, EXIF orientation and transparency are ignored.
            image = open_image(file)[0].convert("RGB")
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: {error}; extract the archives again") from error
    width, height = image.size
    if draws is None:
        short = round(size * RESIZE)
        wide, tall = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        image = image.resize((wide, tall), Image.Resampling.BILINEAR)
        left, top = round((wide - size) / 2), round((tall - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    else:
        top, left, tall, wide = crop_boxes(draws[None], height, width)[0].tolist()
        image = image.crop((left, top, left + wide, top + tall)).resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class _Reader(torch.utils.data.Dataset):
    """Data set of full batches, each decoded by one worker. An item is the rows of a batch and its draws."""

    def __init__(self, folder: Path, names: np.ndarray, size: int) -> None:
        self.folder, self.names, self.size = folder, names, size

    def __getitem__(self, item: tuple[np.ndarray, np.ndarray | None]) -> Tensor | np.ndarray:
        """Return a batch as a tensor, sent through shared memory, or as an array, sent through a pipe.

        If shared memory were full, a tensor would be lost, and the main process would wait for it forever.
        """
        images = self.read(*item)
        try:
            room = shutil.disk_usage(SHARED_MEMORY).free
        except OSError:  # systems without this folder do not have this limit
            return images
        return images if room > SHARED_BATCHES * images.nbytes else images.numpy()

    def read(self, rows: np.ndarray, draws: np.ndarray | None = None) -> Tensor:
        """Read the images of some rows, uint8 ``(b, 3, s, s)``."""
        images = torch.empty(len(rows), 3, self.size, self.size, dtype=torch.uint8)
        for k, row in enumerate(rows):
            path = self.folder / os.fsdecode(self.names[row])
            images[k] = read_image(path, self.size, None if draws is None else torch.from_numpy(draws[k]))
        return images


def _as_is(batch: Tensor | np.ndarray) -> Tensor | np.ndarray:
    return batch


class StreamedImages(ImageSet):
    """A training or test set whose images stay on disk and are decoded ahead of time by worker processes."""

    streamed = True

    def __init__(
        self,
        entry: DatasetEntry,
        part: str,
        folder: Path,
        names: np.ndarray,
        labels: Tensor | list[int],
        class_names: list[str],
        *,
        indices: Tensor | None = None,
        total: int | None = None,
        workers: int | None = None,
    ) -> None:
        labels = torch.as_tensor(labels, dtype=torch.int64)
        super().__init__(entry, part, torch.empty(0), labels, class_names, indices=indices, total=total)
        self.workers = min(MOST_WORKERS, os.cpu_count() or 1) if workers is None else workers
        self._folder, self._names = folder, names

    def fetch(self, positions: Tensor) -> Tensor:
        """Return the images at ``positions``, scaled and center-cropped, uint8 ``(b, 3, s, s)``."""
        return self._reader().read(positions.cpu().numpy()).to(self.device)

    def stream(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Iterator[Tensor]:
        """See ``ImageSet.stream``. Images are read ahead by ``workers`` processes (0: in this process)."""
        items = ((p.cpu().numpy(), None if draws is None else draws.cpu().numpy()) for p, draws in batches)
        loader = torch.utils.data.DataLoader(
            self._reader(),
            batch_size=None,
            sampler=items,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            collate_fn=_as_is,  # torch's default converts arrays to tensors in the worker
            generator=torch.Generator(),  # the default is the global generator
        )
        try:
            yield from map(torch.as_tensor, loader)
        except FileError as error:  # a worker's error carries its traceback
            raise FileError(str(error).strip().split("\n")[-1].split("FileError: ")[-1]) from None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise FileError(
                f"{self._folder}: a worker process that reads images was killed, probably for lack of memory; stop "
                "other processes and try again"
            ) from error

    def subset(self, positions: Tensor) -> "StreamedImages":
        """Return the examples at ``positions``, in that order. Original indices are kept."""
        positions = torch.as_tensor(positions, dtype=torch.int64).to(self.device)
        names = self._names[positions.cpu().numpy()]
        return self._like(names, self.labels[positions], self.indices[positions])

    def to(self, device: str | torch.device) -> "StreamedImages":
        """Move labels and indices to a device. Images are moved batch by batch."""
        return self._like(self._names, self.labels.to(device), self.indices.to(device))

    def _like(self, names: np.ndarray, labels: Tensor, indices: Tensor) -> "StreamedImages":
        settings: dict[str, Any] = {"indices": indices, "total": self.total, "workers": self.workers}
        other = StreamedImages(self.entry, self.part, self._folder, names, labels, self.class_names, **settings)
        self._share(other)
        return other

    def add_content(self, digest: "hashlib._Hash") -> None:
        """Add the names and sizes of the files to a digest. Reading all files would take hours."""
        for name in self._names:
            size = (self._folder / os.fsdecode(name)).stat().st_size
            digest.update(name + f"\0{size}\0".encode())

    def _reader(self) -> _Reader:
        return _Reader(self._folder, self._names, self.entry.image_size)


def load_tiny_imagenet(entry: DatasetEntry, folder: Path) -> tuple[ImageSet, ImageSet]:
    """Load Tiny ImageNet. The zip's validation set is the test set.

    Classes are sorted by WordNet ID and files by name. The decoded images are saved as ``{name}.npz`` next to
    ``folder``, which later calls of ``load_dataset`` read instead.

    Args:
        entry: The catalog entry.
        folder: The folder of the zip file (downloaded if missing) or of its contents, with or without the zip's
            top-level folder.

    Returns:
        The training set and the test set.

    Raises:
        FileError: The zip is missing and cannot be downloaded, or files are missing or damaged.
    """
    cache = folder.parent / f"{entry.name}.npz"
    for root in (folder / TINY_ROOT, folder):
        if (root / "train").is_dir():
            names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
            return _read_tiny_imagenet(entry, root, names, lambda name, root=root: (root / name).read_bytes(), cache)
    (archive,) = fetch_dataset(entry, folder)
    top = f"{TINY_ROOT}/"
    with zipfile.ZipFile(archive) as file:
        names = [name.removeprefix(top) for name in file.namelist() if name.startswith(top) and name[-1] != "/"]
        return _read_tiny_imagenet(entry, archive, names, lambda name: file.read(top + name), cache)


def _read_tiny_imagenet(
    entry: DatasetEntry, where: Path, names: list[str], read: Callable[[str], bytes], cache: Path
) -> tuple[ImageSet, ImageSet]:
    """Decode both parts, given the paths of all files in the root and a function that reads a file."""
    names = [name for name in names if not is_system_file(name.split("/")[-1])]
    train = [name for name in names if name.startswith("train/") and name.lower().endswith(".jpeg")]
    train.sort(key=lambda name: (name.split("/")[1], name.split("/")[-1]))  # by class and file name
    classes = sorted({name.split("/")[1] for name in train})
    if len(classes) != entry.num_classes:
        raise FileError(
            f"{where}: has {len(classes)} classes in train/, not {entry.num_classes}; download the zip again"
        )
    number = {wnid: label for label, wnid in enumerate(classes)}
    listing = [(name, number[name.split("/")[1]]) for name in train]
    parts = {"train": listing, "test": _validation(where, names, read, number)}
    arrays = {CLASS_NAMES: np.array(classes)}
    for part, files in parts.items():
        arrays[f"x_{part}"] = _decode(entry, where, files, read)
        arrays[f"y_{part}"] = np.array([label for _, label in files])
        arrays[f"{FILES}_{part}"] = np.array([name for name, _ in files])
    try:
        write_npz(cache, **arrays)
        log.info("saved the decoded images to %s; later runs read them", cache)
    except FileError as error:
        log.warning("cannot save the decoded images: %s", error)
    train_set, test_set = (
        ImageSet(
            entry,
            part,
            torch.from_numpy(arrays.pop(f"x_{part}")).permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(arrays[f"y_{part}"]),
            classes,
            files=FileNames(where, arrays[f"{FILES}_{part}"]),
        )
        for part in parts
    )
    return train_set, test_set


def _validation(
    where: Path, names: list[str], read: Callable[[str], bytes], number: dict[str, int]
) -> list[tuple[str, int]]:
    """List the validation images, sorted by name, with their labels.

    The images are in ``val/images`` with classes in ``val_annotations.txt``, or, after a commonly used preparation
    script, in one folder per class.
    """
    listing, faults = "val/val_annotations.txt", Faults(where)
    paths = {
        name.split("/")[-1]: name for name in names if name.startswith("val/") and name.lower().endswith(".jpeg")
    }
    folders = {name: path.split("/")[1] for name, path in paths.items()}
    if not any(folder in number for folder in folders.values()):
        if listing not in names:
            raise FileError(
                f"{where}: has no {listing}, which lists the classes of the test images; download the zip again"
            )
        try:
            lines = read(listing).decode().splitlines()
        except UnicodeDecodeError as error:
            raise FileError(f"{where}: {listing} is not a UTF-8 text file; download the zip again") from error
        if not lines:
            raise FileError(f"{where}: {listing} is empty; download the zip again")
        folders = dict([*line.split("\t"), ""][:2] for line in lines)
    files = {}
    for name, wnid in folders.items():
        if wnid not in number or name not in paths:
            faults.add(f"val: {name!r} of class {wnid!r}", "is missing; download the zip again")
        else:
            files[name] = (paths[name], number[wnid])
    faults.raise_if_any()
    return [files[name] for name in sorted(files)]


def _decode(
    entry: DatasetEntry, where: Path, files: list[tuple[str, int]], read: Callable[[str], bytes]
) -> np.ndarray:
    """Decode files to uint8 ``(n, h, w, c)``. Gray images become color and EXIF is ignored, as in published work."""
    size, faults = entry.image_size, Faults(where)
    images = np.empty((len(files), size, size, entry.channels), dtype=np.uint8)
    for index, (name, _) in enumerate(tqdm(files, desc=f"reading {entry.name}", mininterval=1, disable=None)):
        try:
            image, _ = open_image(BytesIO(read(name)))
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            faults.add(name, f"{error}; download the zip again")
            continue
        if image.size != (size, size):
            faults.add(name, f"is {image.height}x{image.width}, not {size}x{size}; download the zip again")
        else:
            images[index] = image.convert("RGB")
    faults.raise_if_any()
    return images
