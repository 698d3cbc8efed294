"""Own data: arrays of an npz file (the Keras convention), or images in ``train/CLASS/`` and ``test/CLASS/``."""

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from src.artifacts.io import read_npz, write_with
from src.datasets.batches import ImageSet
from src.datasets.decoding import PARTS, Faults, ImageFolder, ahead, as_seen, open_image
from src.datasets.registry import Augmentation, DataConfig, DatasetEntry, Normalization
from src.errors import FileError
from src.formatting import gib

CLASS_NAMES = "class_names"  # an optional array
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as Pillow's "L"
PROGRESS_FROM = 2000  # files
ODD_SIZES_LISTED = 3
RULES = ("exif", "alpha", "draft")  # what may change pixels, in the order of records
CACHE_FORMAT = 1  # raise it when the same files would be decoded to other pixels
CACHED_FROM = 4 << 20  # bytes of image files: fewer are decoded in about a second at most

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


def _name(stem: str, digest: str) -> str:
    """The name of own data: a file's or folder's, without characters that paths may not have, and 8 digits."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', stem)}-{digest[:8]}"


def _entry(
    stem: str, digest: str, images: Tensor, num_classes: int, normalization: Normalization | None = None
) -> DatasetEntry:
    """The entry of own data: named by stem and content; crop (an eighth of the size) and flip as augmentation.

    Args:
        stem: File or folder name.
        digest: Hex digest of the content; 8 digits are in the name.
        images: The training images, uint8 ``(n, c, s, s)``.
        num_classes: Number of classes.
        normalization: That of the images where it is known.
    """
    normalization = normalization or normalization_of(images)
    size = images.shape[-1]
    return DatasetEntry(
        name=_name(stem, digest),
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


def load_npz(path: Path, config: DataConfig, cache_folder: Path | None = None) -> tuple[ImageSet, ImageSet]:
    """Own data from an npz file.

    The data set is named by the file's stem and 8 hex digits of the arrays' content.

    Args:
        path: The file.
        config: To which ``image_size`` and ``channels`` images are converted.
        cache_folder: Not used: nothing is decoded.

    Raises:
        FileError: The file is missing, damaged, or not in the expected form.
    """
    images, labels, names = _read(path)
    num_classes = _count_classes(str(path), *labels)
    digest = _npz_digest(images, labels)
    height, width = images[0].shape[2:]
    if config.image_size is None and height != width:
        raise FileError(f"{path}: has images of {height}x{width}; make them square, or give --image_size")
    for index, storage in enumerate(images):
        if config.channels is not None:
            storage = convert_channels(storage, config.channels)
        images[index] = storage if config.image_size is None else resize(storage, config.image_size)
    return _sets(_entry(path.stem, digest, images[0], num_classes), images, labels, names)


def npz_name(path: Path) -> str:
    """The name of the data set of an npz file.

    Raises:
        FileError: The file is missing, damaged, or not in the expected form.
    """
    images, labels, _ = _read(path)
    _count_classes(str(path), *labels)
    return _name(path.stem, _npz_digest(images, labels))


def _npz_digest(images: list[Tensor], labels: list[np.ndarray]) -> str:
    """sha256 of the arrays of both parts, in hex."""
    digest = hashlib.sha256()
    for part, x, y in zip(PARTS, images, labels, strict=True):
        for name, array in ((f"x_{part}{tuple(x.shape)}", x.numpy()), (f"y_{part}", y)):
            digest.update(f"{name}\0{array.nbytes}\0".encode())
            digest.update(memoryview(array).cast("B"))
    return digest.hexdigest()


@dataclass
class _Decoded:
    """The images of a folder, as they are used.

    Attributes:
        images: uint8 ``(n, c, h, w)`` of both parts.
        content: sha256 of names and contents of the files, in hex.
        decoding: Which rules changed pixels, as in ``ImageSet``.
        normalization: That of the training images.
    """

    images: list[Tensor]
    content: str
    decoding: str | None
    normalization: Normalization


class _Cache:
    """Decoded images in a file: one for each folder and way of decoding it, replaced when the photos change.

    The file has a checksum (it is an npz), and is used only where it was made of the very same files. A cache that
    cannot be read costs decoding again, one that cannot be written costs itself.

    Args:
        photos: The photos.
        config: Size, channels and decoding.
        folder: Where the file is.
    """

    def __init__(self, photos: ImageFolder, config: DataConfig, folder: Path) -> None:
        self.photos = photos
        self.size, self._stamp = photos.stamp()
        root = photos.root.resolve()
        self.rules = {
            "format": CACHE_FORMAT,
            "pillow": PIL.__version__,
            **{name: getattr(config, name) for name in ("image_size", "channels", "decode")},
        }
        key = os.fsencode(f"{root}\0{config.image_size}\0{config.channels}\0{config.decode}")
        self.path = folder / f"{_name(root.name[:80], hashlib.sha256(key).hexdigest())}.npz"

    def read(self) -> _Decoded | None:
        """The images of the files as they are now; None where the cache does not have them."""
        if self.size < CACHED_FROM or not os.path.exists(self.path):
            return None
        try:
            arrays = read_npz(self.path)
            header = json.loads(str(arrays["header"]))
            if header["rules"] != self.rules:
                raise ValueError(f"made by {header['rules']}, not {self.rules}")
            images = [torch.from_numpy(arrays[part]) for part in PARTS]
            for part, storage in zip(PARTS, images, strict=True):
                shape, last = tuple(storage.shape), images[0].shape[1:]
                if storage.dtype != torch.uint8 or shape != (len(self.photos.files[part]), *last) or len(last) != 3:
                    raise ValueError(f"{part} images are {storage.dtype} of shape {shape}")
            found = _Decoded(images, header["content"], header["decoding"], Normalization(
                *(tuple(map(float, header[name])) for name in ("mean", "std"))
            ))  # fmt: skip
        except MemoryError:
            raise
        except Exception as error:  # a damaged or foreign file raises nearly anything
            log.info("%s: is decoded again, as the cache cannot be used (%s)", self.photos.root, error)
            return None
        if self._stamp is None or header.get("stamp") != self._stamp:
            try:
                content = self.photos.content()
            except OSError:  # decoding says which files cannot be read
                content = None
            if content != found.content:
                log.info("%s: is decoded again, as its files have changed since it was cached", self.photos.root)
                return None
            if self._stamp is not None:
                self.write(found)
        log.info("read %d decoded images from %s (%s)", sum(map(len, images)), self.path, self._room(images))
        return found

    def write(self, decoded: _Decoded) -> None:
        """Keep decoded images for later starts, where decoding takes long."""
        if self.size < CACHED_FROM:
            return
        header = {
            "rules": self.rules,
            "stamp": self._stamp,  # of before the files were read
            "content": decoded.content,
            "decoding": decoded.decoding,
            "mean": decoded.normalization.mean,
            "std": decoded.normalization.std,
        }
        arrays = {part: storage.numpy() for part, storage in zip(PARTS, decoded.images, strict=True)}
        arrays["header"] = np.array(json.dumps(header))
        try:
            write_with(self.path, lambda file: np.savez(file, **arrays), interruptible=True)
        except FileError as error:
            log.warning(
                "decoded images are not kept, so that every start decodes them (give --cache_folder): %s", error
            )
            return
        log.info("kept the decoded images as %s (%s), which later starts read", self.path, self._room(decoded.images))

    @staticmethod
    def _room(images: list[Tensor]) -> str:
        return gib(sum(storage.nbytes for storage in images))


class _Images:
    """Images decoded into one tensor per part.

    Gray images among color ones become color.
    """

    def __init__(self, photos: ImageFolder, config: DataConfig) -> None:
        self.photos, self.image_size, self.channels = photos, config.image_size, config.channels
        self.target = config.image_size if config.decode == "draft" else None
        self.digest = hashlib.sha256()  # of names and contents
        self.rules: set[str] = set()  # see RULES
        self.gray = self.color = 0  # how many of each
        self.reduced = 0  # how many by draft mode
        self.size: tuple[int, int] | None = None  # of the first image
        self.odd_sizes = 0
        self.parts = [self._read(part, files) for part, files in photos.files.items()]
        if self.odd_sizes > ODD_SIZES_LISTED:  # all have the same remedy, and would hide unreadable files
            more = f"{self.odd_sizes - ODD_SIZES_LISTED} more images"
            photos.faults.add(more, "differ in size, too; give --image_size to resize all")

    def _read(self, part: str, files: list[Path]) -> Tensor | None:
        faults, storage = self.photos.faults, None
        bar = tqdm(
            ahead(self._decode, files),
            desc=f"reading {part}",
            total=len(files),
            disable=True if len(files) < PROGRESS_FROM else None,
        )
        for number, (path, result) in enumerate(zip(files, bar, strict=True)):
            name = self.photos.relative(path)
            if isinstance(result, Exception):
                reason = f"cannot be read ({result.strerror})" if isinstance(result, OSError) else None
                faults.add(name, reason or f"{result}; remove or replace it")
                continue
            content, image, rules = result
            self.photos.add(self.digest, path, content)
            self.rules |= rules
            self.reduced += "draft" in rules
            self.gray, self.color = self.gray + (len(image) == 1), self.color + (len(image) == 3)
            size = tuple(image.shape[1:])
            if self.size is None:
                self.size = size
                if size[0] != size[1]:
                    faults.add(name, f"is {size[0]}x{size[1]}; square images are needed, or give --image_size")
            if size != self.size:
                self.odd_sizes += 1
                if self.odd_sizes <= ODD_SIZES_LISTED:
                    wanted = f"{self.size[0]}x{self.size[1]}"
                    faults.add(
                        name, f"is {size[0]}x{size[1]} among images of {wanted}; give --image_size to resize all"
                    )
                continue
            if storage is None:
                storage = torch.empty((len(files), *image.shape), dtype=torch.uint8)
            if len(image) > storage.shape[1]:
                storage = convert_channels(storage, 3)
            storage[number] = image  # a gray one is repeated in each channel
        return storage

    def _decode(self, path: Path) -> tuple[bytes, Tensor, set[str]] | Exception:
        """A file's content, its pixels ``(c, h, w)`` and what changed them; or, not raised, why it cannot be used."""
        try:
            content = path.read_bytes()
            image, reduced = open_image(BytesIO(content), self.target)
            pixels, rules = as_seen(image, self.channels)
        except (OSError, ValueError) as error:
            return error
        image = torch.from_numpy(pixels)
        image = image if self.image_size is None else resize(image[None], self.image_size)[0]
        return content, image, rules | {"draft"} if reduced else rules


def folder_name(root: Path) -> str:
    """The name of the data set of a folder: the folder's, and 8 hex digits of relative paths and file contents.

    Raises:
        FileError: A folder is missing or empty, or a file cannot be read.
    """
    faults = Faults(root)
    photos = ImageFolder(root, faults)
    faults.raise_if_any()
    try:
        return _name(root.resolve().name, photos.content())
    except OSError as error:
        raise FileError(f"{error.filename}: cannot be read ({error.strerror})") from error


def load_folder(root: Path, config: DataConfig, cache_folder: Path) -> tuple[ImageSet, ImageSet]:
    """Own data from folders; classes sorted by name, images by class and file name.

    The data set is named as ``folder_name`` does. Images are decoded as a viewer shows them (``as_seen``), JPEG
    files that are much larger than the image size at a reduced size (``open_image``). From ``CACHED_FROM`` bytes of
    files on, decoded images are kept, and read by later starts instead (``_Cache``).

    Args:
        root: Folder with ``train/`` and ``test/``.
        config: To which ``image_size`` and ``channels`` images are converted, and how they are decoded.
        cache_folder: Where decoded images are kept.

    Raises:
        FileError: A folder is missing or empty, images cannot be read, or differ in size.
    """
    faults = Faults(root)
    photos = ImageFolder(root, faults)
    cache = None if faults else _Cache(photos, config, cache_folder)
    decoded = cache.read() if cache else None
    if decoded is None:
        read = _Images(photos, config)
        faults.raise_if_any()
        images = read.parts
        if read.gray and read.color:
            log.info(
                "%s: %d gray and %d color images: all are converted to color (1 channel makes them gray)",
                root, read.gray, read.color,
            )  # fmt: skip
            images = [convert_channels(part, 3) for part in images]
        if read.reduced:
            log.info(
                "%s: %d of %d photos were decoded at a reduced size (older versions decoded in full: --decode=full)",
                root, read.reduced, read.gray + read.color,
            )  # fmt: skip
        decoding = ",".join(rule for rule in RULES if rule in read.rules) or None
        decoded = _Decoded(images, read.digest.hexdigest(), decoding, normalization_of(images[0]))
        cache.write(decoded)
    entry = _entry(root.resolve().name, decoded.content, decoded.images[0], len(photos.names), decoded.normalization)
    # printable, whatever bytes: those that are not UTF-8 are written as \xff
    names = [os.fsencode(name).decode("utf-8", errors="backslashreplace") for name in photos.names]
    return tuple(
        ImageSet(entry, part, storage, torch.tensor(photos.labels[part]), names, decoding=decoded.decoding)
        for part, storage in zip(PARTS, decoded.images, strict=True)
    )
