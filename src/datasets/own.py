"""Own data: arrays of an npz file (the Keras convention), or images in ``train/CLASS/`` and ``test/CLASS/``."""

import hashlib
import logging
import os
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from src.artifacts.io import read_npz
from src.datasets.batches import ImageSet
from src.datasets.decoding import Faults, as_seen, is_system_file, open_image
from src.datasets.registry import Augmentation, DatasetEntry, Normalization
from src.errors import FileError

PARTS = ("train", "test")
CLASS_NAMES = "class_names"  # an optional array
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as Pillow's "L"
PROGRESS_FROM = 2000  # files
ODD_SIZES_LISTED = 3

log = logging.getLogger(__name__)


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """Convert uint8 ``(n, c, h, w)`` to gray (1) or color (3)."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    gray = images.new_empty(len(images), 1, *images.shape[2:])
    weights = torch.tensor(GRAY).view(3, 1, 1)
    for start in range(0, len(images), 1024):  # a block at a time: floats take four times the room
        block = slice(start, start + 1024)
        gray[block] = (images[block].float() * weights).sum(1, keepdim=True).round_().clamp_(0, 255).to(torch.uint8)
    return gray


def resize(images: Tensor, size: int) -> Tensor:
    """Scale uint8 ``(n, c, h, w)`` so that the shorter side is ``size`` (bilinear, antialiased), and cut the center.

    Returns:
        uint8 ``(n, c, size, size)``.
    """
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    scale = size / min(height, width)
    tall, wide = max(size, round(height * scale)), max(size, round(width * scale))
    top, left = (tall - size) // 2, (wide - size) // 2
    scaled = images.new_empty(len(images), images.shape[1], size, size)
    for start in range(0, len(images), 1024):
        block = images[start : start + 1024].float()
        block = F.interpolate(block, (tall, wide), mode="bilinear", antialias=True, align_corners=False)
        block = block[:, :, top : top + size, left : left + size].round_().clamp_(0, 255)
        scaled[start : start + 1024] = block.to(torch.uint8)
    return scaled


def normalization_of(images: Tensor) -> Normalization:
    """Mean and deviation per channel of uint8 ``(n, c, h, w)``, exact, from its histogram."""
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256)
        for block in images[:, channel].split(512):  # counting takes eight bytes for each of a block
            counts += np.bincount(block.reshape(-1).numpy(), minlength=256)
        mean = (counts * values).sum() / counts.sum()
        deviation = np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum())
        means.append(float(mean))
        deviations.append(float(deviation) or 1.0)  # a constant channel
    return Normalization(tuple(means), tuple(deviations))


def _entry(stem: str, digest: str, images: Tensor, num_classes: int) -> DatasetEntry:
    """The entry of own data: named by stem and content; crop (an eighth of the size) and flip as augmentation.

    Args:
        stem: File or folder name.
        digest: Hex digest of the content; 8 digits are in the name.
        images: The training images, uint8 ``(n, c, s, s)``.
        num_classes: Number of classes.
    """
    normalization = normalization_of(images)
    size = images.shape[-1]
    return DatasetEntry(
        name=f"{re.sub(r'[^A-Za-z0-9._-]+', '_', stem)}-{digest[:8]}",
        num_classes=num_classes,
        channels=images.shape[1],
        image_size=size,
        normalizations={"samis": normalization, "mpe": normalization},
        load=None,
        augmentation=Augmentation(crop_padding=max(1, size // 8), flip=True),
        cutout=True,
        content=digest,
    )


def _count_classes(where: str, train: np.ndarray, test: np.ndarray) -> int:
    """The number of classes, after checking that training has them all.

    Raises:
        FileError: A class has no training image, or test has a class that training lacks.
    """
    present = np.unique(train)
    foreign = np.setdiff1d(test, present)
    if len(foreign):
        raise FileError(
            f"{where}: y_test has class {foreign[0]}, which y_train lacks; every test class needs training images"
        )
    if len(present) == 1:
        raise FileError(f"{where}: y_train has class {present[0]} only; two classes are needed at least")
    gaps = np.flatnonzero(present != np.arange(len(present)))
    if len(gaps):
        raise FileError(
            f"{where}: y_train has no image of class {gaps[0]}, though its labels go up to {present[-1]}; "
            "number the classes from 0 without gaps"
        )
    return int(present[-1]) + 1


def _images(path: Path, key: str, array: np.ndarray) -> Tensor:
    """uint8 ``(n, c, h, w)`` from NHWC or NHW."""
    if array.dtype != np.uint8:
        raise FileError(f"{path}: {key} is {array.dtype}; uint8 pixels from 0 to 255 are needed")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise FileError(
            f"{path}: {key} has shape {array.shape}; (n, height, width) or (n, height, width, 1 or 3) is needed"
        )
    if not all(array.shape):
        raise FileError(f"{path}: {key} has shape {array.shape}, so it has no image")
    array = np.ascontiguousarray(array)
    count, height, width, channels = array.shape
    result = array.reshape(count, channels, height, width)  # the same memory, so that there is never a second copy
    for start in range(0, count, 1024):
        block = slice(start, start + 1024)
        result[block] = array[block].transpose(0, 3, 1, 2).copy()
    return torch.from_numpy(result)


def _labels(path: Path, key: str, array: np.ndarray, count: int) -> np.ndarray:
    """int64 ``(n,)`` from integers of shape (n,) or (n, 1)."""
    if array.dtype.kind not in "iu":
        kind = "text" if array.dtype.kind in "US" else array.dtype
        raise FileError(f"{path}: {key} is {kind}; whole numbers from 0 are needed as labels")
    if array.shape not in ((count,), (count, 1)):
        images = key.replace("y_", "x_")
        raise FileError(
            f"{path}: {key} has shape {array.shape} beside {count} images in {images}; ({count},) is needed"
        )
    labels = array.reshape(-1)
    if labels.min() < 0:
        raise FileError(f"{path}: {key} has the label {labels.min()}; labels count from 0")
    return labels.astype(np.int64)


def _read(path: Path) -> tuple[list[Tensor], list[np.ndarray], list[str] | None]:
    """Images and labels of both parts, checked, and the class names if the file has them."""
    arrays = read_npz(path)
    missing = [key for part in PARTS for key in (f"x_{part}", f"y_{part}") if key not in arrays]
    if missing:
        raise FileError(f"{path}: has no array {', '.join(missing)}; x_train, y_train, x_test and y_test are needed")
    images, labels = [], []
    for part in PARTS:
        images.append(_images(path, f"x_{part}", arrays.pop(f"x_{part}")))
        labels.append(_labels(path, f"y_{part}", arrays[f"y_{part}"], len(images[-1])))
    if images[0].shape[1:] != images[1].shape[1:]:
        shapes = [tuple(part.shape[1:]) for part in images]
        raise FileError(f"{path}: x_train has images (c, h, w) = {shapes[0]}, x_test {shapes[1]}; make them alike")
    return images, labels, _class_names(path, arrays.get(CLASS_NAMES))


def _class_names(path: Path, names: np.ndarray | None) -> list[str] | None:
    """Texts that can be printed, whatever bytes they were made from."""
    if names is None:
        return None
    if names.ndim != 1:
        raise FileError(f"{path}: {CLASS_NAMES} has shape {names.shape}; one name per class is needed")
    if names.dtype.kind == "S":
        return [name.decode("utf-8", errors="backslashreplace") for name in names]
    return [str(name).encode("utf-8", errors="backslashreplace").decode() for name in names]


def _sets(
    entry: DatasetEntry, images: list[Tensor], labels: list[np.ndarray], names: list[str] | None
) -> tuple[ImageSet, ImageSet]:
    if names is not None and len(names) != entry.num_classes:
        names = None
    return tuple(
        ImageSet(entry, part, storage, torch.from_numpy(label), names)
        for part, storage, label in zip(PARTS, images, labels, strict=True)
    )


def load_catalog_npz(entry: DatasetEntry, path: Path) -> tuple[ImageSet, ImageSet]:
    """A catalog data set from ``{name}.npz``, of any length; classes and image size stay the catalog's.

    Raises:
        FileError: The file is damaged or does not fit the catalog.
    """
    images, labels, names = _read(path)
    wanted = (entry.channels, entry.image_size, entry.image_size)
    found = tuple(images[0].shape[1:])
    if found != wanted:
        raise FileError(f"{path}: has images (c, h, w) = {found}; {entry.name} has {wanted}")
    for part, label in zip(PARTS, labels, strict=True):
        if label.max() >= entry.num_classes:
            raise FileError(
                f"{path}: y_{part} has the label {label.max()}; {entry.name} has classes 0 to {entry.num_classes - 1}"
            )
    return _sets(entry, images, labels, names)


def load_npz(path: Path, image_size: int | None, channels: int | None) -> tuple[ImageSet, ImageSet]:
    """Own data from an npz file.

    The data set is named by the file's stem and 8 hex digits of the arrays' content.

    Args:
        path: The file.
        image_size: Resize to this height and width.
        channels: Convert to gray (1) or color (3).

    Raises:
        FileError: The file is missing, damaged, or not in the expected form.
    """
    images, labels, names = _read(path)
    num_classes = _count_classes(str(path), *labels)
    digest = hashlib.sha256()
    for part, x, y in zip(PARTS, images, labels, strict=True):
        for name, array in ((f"x_{part}{tuple(x.shape)}", x.numpy()), (f"y_{part}", y)):
            digest.update(f"{name}\0{array.nbytes}\0".encode())
            digest.update(memoryview(array).cast("B"))
    height, width = images[0].shape[2:]
    if image_size is None and height != width:
        raise FileError(f"{path}: has images of {height}x{width}; make them square, or set image_size")
    for index, storage in enumerate(images):
        if channels is not None:
            storage = convert_channels(storage, channels)
        images[index] = storage if image_size is None else resize(storage, image_size)
    entry = _entry(path.stem, digest.hexdigest(), images[0], num_classes)
    return _sets(entry, images, labels, names)


class _Listing:
    """The image files of a folder, by part; what is wrong with them goes into ``faults``.

    Args:
        root: Folder with ``train/`` and ``test/``.
        faults: Where unusable files and folders are noted.
    """

    def __init__(self, root: Path, faults: Faults) -> None:
        self.root, self.faults = root, faults
        self.ignored: list[str] = []
        self.names = self._classes(root / "train")
        if len(self.names) == 1:
            raise FileError(f"{root / 'train'}: has only class {self.names[0]}; at least two classes are needed")
        for name in self._classes(root / "test"):
            if name not in self.names:
                faults.add(f"test/{name}", "is a class that train/ lacks; every test class needs training images")
        self.files: dict[str, list[Path]] = {part: [] for part in PARTS}
        self.labels: dict[str, list[int]] = {part: [] for part in PARTS}
        for part in PARTS:
            for label, name in enumerate(self.names):
                if part == "train" or (root / part / name).is_dir():
                    found = self._files(root / part / name)
                    self.files[part] += found
                    self.labels[part] += [label] * len(found)
        if self.ignored:
            examples = ", ".join(sorted(set(self.ignored))[:3])
            log.info("%s: ignored %d hidden or system files (%s)", root, len(self.ignored), examples)

    def _visible(self, folder: Path) -> list[Path]:
        """What a folder contains, sorted by name, without hidden and system files."""
        found = sorted(folder.iterdir(), key=lambda path: path.name)
        self.ignored += [path.name for path in found if is_system_file(path.name)]
        return [path for path in found if not is_system_file(path.name)]

    def _classes(self, folder: Path) -> list[str]:
        if not folder.is_dir():
            raise FileError(f"{folder}: there is no such folder; train/ and test/ with a folder per class are needed")
        names = [path.name for path in self._visible(folder) if path.is_dir()]
        if not names:
            raise FileError(f"{folder}: has no class folder; put the images of each class into a folder of its name")
        return names

    def _files(self, folder: Path) -> list[Path]:
        try:
            files = self._visible(folder)
        except OSError as error:
            self.faults.add(self.relative(folder), f"cannot be read ({error.strerror})")
            return []
        if not files:
            self.faults.add(self.relative(folder), "has no image; put images in, or remove the class")
        for path in files:
            if path.is_dir():
                self.faults.add(self.relative(path), "is a folder inside a class folder; images are needed there")
            elif not path.is_file():  # opening a pipe would block
                self.faults.add(self.relative(path), "is not a regular file; remove or replace it")
        return [path for path in files if path.is_file()]

    def relative(self, path: Path) -> str:
        """A file's name below the root."""
        return path.relative_to(self.root).as_posix()


class _Images:
    """Images read one after the other into one tensor per part.

    Gray images among color ones become color.
    """

    def __init__(self, listing: _Listing, image_size: int | None, channels: int | None) -> None:
        self.listing, self.image_size, self.channels = listing, image_size, channels
        self.digest = hashlib.sha256()  # of names and contents
        self.rules: set[str] = set()  # see as_seen
        self.gray = self.color = 0  # how many of each
        self.size: tuple[int, int] | None = None  # of the first image
        self.odd_sizes = 0
        self.parts = [self._read(part, files) for part, files in listing.files.items()]
        if self.odd_sizes > ODD_SIZES_LISTED:  # all have the same remedy, and would hide unreadable files
            more = f"{self.odd_sizes - ODD_SIZES_LISTED} more images"
            listing.faults.add(more, "differ in size, too; set image_size to resize all")

    def _read(self, part: str, files: list[Path]) -> Tensor | None:
        faults, storage = self.listing.faults, None
        bar = tqdm(files, desc=f"reading {part}", disable=True if len(files) < PROGRESS_FROM else None)
        for number, path in enumerate(bar):
            name = self.listing.relative(path)
            try:
                image = self._decode(name, path.read_bytes())
            except OSError as error:
                faults.add(name, f"cannot be read ({error.strerror})")
                continue
            except ValueError as error:
                faults.add(name, f"{error}; remove or replace it")
                continue
            size = tuple(image.shape[1:])
            if self.size is None:
                self.size = size
                if size[0] != size[1]:
                    faults.add(name, f"is {size[0]}x{size[1]}; square images are needed, or set image_size")
            if size != self.size:
                self.odd_sizes += 1
                if self.odd_sizes <= ODD_SIZES_LISTED:
                    wanted = f"{self.size[0]}x{self.size[1]}"
                    faults.add(name, f"is {size[0]}x{size[1]} among images of {wanted}; set image_size to resize all")
                continue
            if storage is None:
                storage = torch.empty((len(files), *image.shape), dtype=torch.uint8)
            if len(image) > storage.shape[1]:
                storage = convert_channels(storage, 3)
            storage[number] = image  # a gray one is repeated in each channel
        return storage

    def _decode(self, name: str, content: bytes) -> Tensor:
        """uint8 ``(c, h, w)``."""
        self.digest.update(os.fsencode(f"{name}\0{len(content)}\0"))
        self.digest.update(content)
        pixels, rules = as_seen(open_image(BytesIO(content)), self.channels)
        self.rules |= rules
        self.gray, self.color = self.gray + (len(pixels) == 1), self.color + (len(pixels) == 3)
        image = torch.from_numpy(pixels)
        return image if self.image_size is None else resize(image[None], self.image_size)[0]


def load_folder(root: Path, image_size: int | None, channels: int | None) -> tuple[ImageSet, ImageSet]:
    """Own data from folders; classes sorted by name, images by class and file name.

    The data set is named by the folder's name and 8 hex digits of relative paths and file contents. Images are
    decoded as a viewer shows them (``as_seen``).

    Args:
        root: Folder with ``train/`` and ``test/``.
        image_size: Resize to this height and width.
        channels: Convert to gray (1) or color (3).

    Raises:
        FileError: A folder is missing or empty, images cannot be read, or differ in size.
    """
    if not root.is_dir():
        raise FileError(f"{root}: there is no such folder; one with train/ and test/ is needed")
    faults = Faults(root)
    listing = _Listing(root, faults)
    read = _Images(listing, image_size, channels)
    faults.raise_if_any()
    images = read.parts
    if read.gray and read.color:
        log.info(
            "%s: %d gray and %d color images: all are converted to color (1 channel makes them gray)",
            root, read.gray, read.color,
        )  # fmt: skip
        images = [convert_channels(part, 3) for part in images]
    entry = _entry(root.resolve().name, read.digest.hexdigest(), images[0], len(listing.names))
    # printable, whatever bytes: those that are not UTF-8 are written as \xff
    names = [os.fsencode(name).decode("utf-8", errors="backslashreplace") for name in listing.names]
    decoding = ",".join(rule for rule in ("exif", "alpha") if rule in read.rules) or None
    return tuple(
        ImageSet(entry, part, storage, torch.tensor(listing.labels[part]), names, decoding=decoding)
        for part, storage in zip(PARTS, images, strict=True)
    )
