"""The user's own data: an npz file (Keras convention), or images in ``train/CLASS/`` and ``test/CLASS/``."""

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.features
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from src.artifacts.io import read_npz, write_with
from src.datasets.batches import ImageSet
from src.datasets.decoding import PARTS, Faults, ImageFolder, ahead, as_seen, open_image
from src.datasets.files import Examples, FileNames, printable
from src.datasets.registry import Augmentation, DataConfig, DatasetEntry, Normalization
from src.errors import FileError
from src.formatting import gib

CLASS_NAMES, FILES = "class_names", "files"  # optional arrays: class_names, and files_train and files_test
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as Pillow's "L"
PROGRESS_FROM = 2000  # files
ODD_SIZES_LISTED = 3
RULES = ("exif", "alpha", "draft")  # rules that may change pixels, in the order in which they are recorded
CACHE_FORMAT = 1  # increment when a change to decoding gives different pixels for the same files
CACHED_FROM = 4 << 20  # bytes of image files; decoding fewer takes at most about a second

log = logging.getLogger(__name__)


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """Convert uint8 ``(n, c, h, w)`` to gray (1) or color (3)."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    gray = images.new_empty(len(images), 1, *images.shape[2:])
    weights = torch.tensor(GRAY).view(3, 1, 1)
    for start in range(0, len(images), 1024):  # in blocks, because floats take four times the memory
        block = slice(start, start + 1024)
        gray[block] = (images[block].float() * weights).sum(1, keepdim=True).round_().clamp_(0, 255).to(torch.uint8)
    return gray


def resize(images: Tensor, size: int) -> Tensor:
    """Scale uint8 ``(n, c, h, w)`` to a shorter side of ``size`` (bilinear, antialiased), and crop the center.

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
    """Compute the exact per-channel mean and standard deviation of uint8 ``(n, c, h, w)`` from histograms."""
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256)
        for block in images[:, channel].split(512):  # in blocks, because bincount needs eight bytes per pixel
            counts += np.bincount(block.reshape(-1).numpy(), minlength=256)
        mean = (counts * values).sum() / counts.sum()
        deviation = np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum())
        means.append(float(mean))
        deviations.append(float(deviation) or 1.0)  # a constant channel
    return Normalization(tuple(means), tuple(deviations))


def _name(stem: str, digest: str) -> str:
    """Return the name of own data: the file or folder name, made safe for paths, and 8 digits of the digest."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', stem)}-{digest[:8]}"


def _entry(
    stem: str, digest: str, images: Tensor, num_classes: int, normalization: Normalization | None = None
) -> DatasetEntry:
    """Return the entry of own data, named by stem and content, with crops (padding size // 8) and flips.

    Args:
        stem: File or folder name.
        digest: Hex digest of the contents; the name includes 8 digits.
        images: The training images, uint8 ``(n, c, s, s)``.
        num_classes: Number of classes.
        normalization: The images' normalization, if known; None to compute it.
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
    """Count the classes, and check that each has training images.

    Raises:
        FileError: A class has no training images, or there is only one class.
    """
    present = np.unique(train)
    foreign = np.setdiff1d(test, present)
    if len(foreign):
        raise FileError(
            f"{where}: y_test has class {foreign[0]}, but y_train does not; every test class needs training images"
        )
    if len(present) == 1:
        raise FileError(f"{where}: y_train has only class {present[0]}; at least two classes are needed")
    gaps = np.flatnonzero(present != np.arange(len(present)))
    if len(gaps):
        raise FileError(
            f"{where}: y_train has no images of class {gaps[0]}, but labels up to {present[-1]}; number the classes "
            "from 0 without gaps"
        )
    return int(present[-1]) + 1


def _images(path: Path, key: str, array: np.ndarray) -> Tensor:
    """Convert NHWC or NHW images to uint8 ``(n, c, h, w)``."""
    if array.dtype != np.uint8:
        raise FileError(f"{path}: {key} has dtype {array.dtype}; uint8 pixels from 0 to 255 are needed")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise FileError(
            f"{path}: {key} has shape {array.shape}; (n, height, width) or (n, height, width, 1 or 3) is needed"
        )
    if not all(array.shape):
        raise FileError(f"{path}: {key} has shape {array.shape}, so it has no images")
    array = np.ascontiguousarray(array)
    count, height, width, channels = array.shape
    result = array.reshape(count, channels, height, width)  # shares memory, to avoid a second copy
    for start in range(0, count, 1024):
        block = slice(start, start + 1024)
        result[block] = array[block].transpose(0, 3, 1, 2).copy()
    return torch.from_numpy(result)


def _labels(path: Path, key: str, array: np.ndarray, count: int) -> np.ndarray:
    """Convert integers of shape (n,) or (n, 1) to int64 ``(n,)``."""
    if array.dtype.kind not in "iu":
        kind = "text" if array.dtype.kind in "US" else array.dtype
        raise FileError(f"{path}: {key} has dtype {kind}; labels must be integers from 0")
    if array.shape not in ((count,), (count, 1)):
        images = key.replace("y_", "x_")
        raise FileError(
            f"{path}: {key} has shape {array.shape}, but {images} has {count} images; ({count},) is needed"
        )
    labels = array.reshape(-1)
    if labels.min() < 0:
        raise FileError(f"{path}: {key} has the label {labels.min()}; labels start at 0")
    return labels.astype(np.int64)


def _read(path: Path) -> tuple[list[Tensor], list[np.ndarray], list[str] | None, list[FileNames | None]]:
    """Read and validate the images and labels of both parts, and class and file names if the file has them."""
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
        raise FileError(
            f"{path}: x_train has images (c, h, w) = {shapes[0]}, x_test {shapes[1]}; they must have the same shape"
        )
    names, files = _text(path, CLASS_NAMES, arrays), []
    for part, label in zip(PARTS, labels, strict=True):
        listed = _text(path, f"{FILES}_{part}", arrays)
        if listed is not None and len(listed) != len(label):
            raise FileError(f"{path}: {FILES}_{part} has {len(listed)} names, but x_{part} has {len(label)} images")
        files.append(None if listed is None else FileNames(path, listed))
    return images, labels, names, files


def _text(path: Path, key: str, arrays: dict[str, np.ndarray]) -> list[str] | None:
    """Return an optional array of names, which can be printed even if their bytes are not valid UTF-8."""
    names = arrays.get(key)
    if names is None:
        return None
    if names.ndim != 1:
        raise FileError(f"{path}: {key} has shape {names.shape}; a list of names is needed")
    if names.dtype.kind == "S":
        return [name.decode("utf-8", errors="backslashreplace") for name in names]
    return [str(name).encode("utf-8", errors="backslashreplace").decode() for name in names]


def _sets(
    entry: DatasetEntry,
    images: list[Tensor],
    labels: list[np.ndarray],
    names: list[str] | None,
    files: list[FileNames | None],
) -> tuple[ImageSet, ImageSet]:
    if names is not None and len(names) != entry.num_classes:
        names = None
    train, test = (
        ImageSet(entry, part, storage, torch.from_numpy(label), names, files=listed)
        for part, storage, label, listed in zip(PARTS, images, labels, files, strict=True)
    )
    return train, test


def load_catalog_npz(entry: DatasetEntry, path: Path) -> tuple[ImageSet, ImageSet]:
    """Load a catalog data set from ``{name}.npz``, which may have any number of examples.

    The number of classes and the image size are those of the catalog.

    Raises:
        FileError: The file is damaged or does not fit the catalog.
    """
    images, labels, names, files = _read(path)
    wanted = (entry.channels, entry.image_size, entry.image_size)
    found = tuple(images[0].shape[1:])
    if found != wanted:
        raise FileError(f"{path}: has images (c, h, w) = {found}; {entry.name} has {wanted}")
    for part, label in zip(PARTS, labels, strict=True):
        if label.max() >= entry.num_classes:
            raise FileError(
                f"{path}: y_{part} has the label {label.max()}; {entry.name} has classes 0 to {entry.num_classes - 1}"
            )
    return _sets(entry, images, labels, names, files)


def load_npz(path: Path, config: DataConfig, cache_folder: Path | None = None) -> tuple[ImageSet, ImageSet]:
    """Load own data from an npz file.

    The data set's name is the file's stem and 8 hex digits of a hash of the arrays.

    Args:
        path: The file.
        config: The ``image_size`` and ``channels`` to convert images to.
        cache_folder: Not used, because nothing is decoded.

    Raises:
        FileError: The file is missing, damaged, or not in the expected format.
    """
    images, labels, names, files = _read(path)
    num_classes = _count_classes(str(path), *labels)
    digest = _npz_digest(images, labels)
    height, width = images[0].shape[2:]
    if config.image_size is None and height != width:
        raise FileError(f"{path}: has {height}x{width} images; make them square, or give --image_size")
    for index, storage in enumerate(images):
        if config.channels is not None:
            storage = convert_channels(storage, config.channels)
        images[index] = storage if config.image_size is None else resize(storage, config.image_size)
    return _sets(_entry(path.stem, digest, images[0], num_classes), images, labels, names, files)


def npz_examples(path: Path) -> Examples:
    """Return the training examples of an npz file, without converting the images.

    Raises:
        FileError: The file is missing, damaged, or not in the expected format.
    """
    images, labels, names, files = _read(path)
    count = _count_classes(str(path), *labels)
    if names is None or len(names) != count:
        names = [str(label) for label in range(count)]
    return Examples(_name(path.stem, _npz_digest(images, labels)), labels[0], names, files[0])


def _npz_digest(images: list[Tensor], labels: list[np.ndarray]) -> str:
    """Return the sha256 of the arrays of both parts, in hex."""
    digest = hashlib.sha256()
    for part, x, y in zip(PARTS, images, labels, strict=True):
        for name, array in ((f"x_{part}{tuple(x.shape)}", x.numpy()), (f"y_{part}", y)):
            digest.update(f"{name}\0{array.nbytes}\0".encode())
            digest.update(memoryview(array).cast("B"))
    return digest.hexdigest()


@dataclass
class _Decoded:
    """The decoded and converted images of a folder.

    Attributes:
        images: uint8 ``(n, c, h, w)`` of both parts.
        content: sha256 of the file names and contents, in hex.
        decoding: The rules that changed pixels, as in ``ImageSet``.
        normalization: The normalization of the training images.
    """

    images: list[Tensor]
    content: str
    decoding: str | None
    normalization: Normalization


class _Cache:
    """Cache file of decoded images, one per folder and decoding settings. It is replaced when the photos change.

    The file is an npz, which has checksums, and is used only if it was made from exactly the same files. If the cache
    cannot be read, the photos are decoded again. If it cannot be written, the run continues without it.

    Args:
        photos: The photos.
        config: Size, channels and decoding.
        folder: The folder of the cache file.
    """

    def __init__(self, photos: ImageFolder, config: DataConfig, folder: Path) -> None:
        self.photos = photos
        self.size, self._stamp = photos.stamp()
        root = photos.root.resolve()
        self.rules = {
            "format": CACHE_FORMAT,
            "pillow": PIL.__version__,
            "jpeg": PIL.features.version("libjpeg_turbo") or PIL.features.version("jpg"),
            "torch": torch.__version__,  # it resizes
            **{name: getattr(config, name) for name in ("image_size", "channels", "decode")},
        }
        key = os.fsencode(f"{root}\0{config.image_size}\0{config.channels}\0{config.decode}")
        self.path = folder / f"{_name(root.name[:80], hashlib.sha256(key).hexdigest())}.npz"

    def read(self) -> _Decoded | None:
        """Return the images of the current files, or None if the cache does not contain them."""
        if self.size < CACHED_FROM or not os.path.exists(self.path):
            return None
        try:
            arrays = read_npz(self.path)
            header = json.loads(str(arrays["header"]))
            if header["rules"] != self.rules:
                raise ValueError(f"made with {header['rules']}, not {self.rules}")
            images = [torch.from_numpy(arrays[part]) for part in PARTS]
            for part, storage in zip(PARTS, images, strict=True):
                shape, last = tuple(storage.shape), images[0].shape[1:]
                if storage.dtype != torch.uint8 or shape != (len(self.photos.files[part]), *last) or len(last) != 3:
                    raise ValueError(f"{part} images have dtype {storage.dtype} and shape {shape}")
            found = _Decoded(images, header["content"], header["decoding"], Normalization(
                *(tuple(map(float, header[name])) for name in ("mean", "std"))
            ))  # fmt: skip
        except MemoryError:
            raise
        except Exception as error:  # a damaged or foreign file can raise almost any exception
            log.info("%s: decoding again, because the cache cannot be used (%s)", self.photos.root, error)
            return None
        if self._stamp is None or header.get("stamp") != self._stamp:
            try:
                content = self.photos.content()
            except OSError:  # decoding reports the files that cannot be read
                content = None
            if content != found.content:
                log.info(
                    "%s: decoding again, because its files have changed since they were cached", self.photos.root
                )
                return None
            if self._stamp is not None:
                self.write(found)
        log.info("read %d decoded images from %s (%s)", sum(map(len, images)), self.path, self._room(images))
        return found

    def write(self, decoded: _Decoded) -> None:
        """Save decoded images for later runs, if decoding takes long."""
        if self.size < CACHED_FROM:
            return
        header = {
            "rules": self.rules,
            "stamp": self._stamp,  # taken before the files were read
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
                "cannot save the decoded images, so every run decodes them again (give --cache_folder): %s", error
            )
            return
        log.info("saved the decoded images to %s (%s); later runs read them", self.path, self._room(decoded.images))

    @staticmethod
    def _room(images: list[Tensor]) -> str:
        return gib(sum(storage.nbytes for storage in images))


class _Images:
    """Images decoded into one tensor per part.

    If a part has gray and color images, the gray ones become color.
    """

    def __init__(self, photos: ImageFolder, config: DataConfig) -> None:
        self.photos, self.image_size, self.channels = photos, config.image_size, config.channels
        self.target = config.image_size if config.decode == "draft" else None
        self.digest = hashlib.sha256()  # of file names and contents
        self.rules: set[str] = set()  # see RULES
        self.gray = self.color = 0  # number of gray and color images
        self.reduced = 0  # number of images decoded in draft mode
        self.size: tuple[int, int] | None = None  # size of the first image
        self.odd_sizes = 0
        self.parts = [self._read(part, files) for part, files in photos.files.items()]
        if self.odd_sizes > ODD_SIZES_LISTED:  # listing all would hide unreadable files; the remedy is the same
            more = f"{self.odd_sizes - ODD_SIZES_LISTED} more images"
            photos.faults.add(more, "also differ in size; give --image_size to resize all")

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
            storage[number] = image  # a gray image is broadcast to all channels
        return storage

    def _decode(self, path: Path) -> tuple[bytes, Tensor, set[str]] | Exception:
        """Return a file's contents, pixels ``(c, h, w)`` and the rules that changed them, or the exception raised."""
        try:
            content = path.read_bytes()
            image, reduced = open_image(BytesIO(content), self.target)
            pixels, rules = as_seen(image, self.channels)
        except (OSError, ValueError) as error:
            return error
        decoded = torch.from_numpy(pixels)
        decoded = decoded if self.image_size is None else resize(decoded[None], self.image_size)[0]
        return content, decoded, rules | {"draft"} if reduced else rules


def folder_examples(root: Path) -> Examples:
    """Return the training examples of a folder, without decoding the images.

    Their name is the folder name and 8 hex digits of a hash of all paths and contents.

    Raises:
        FileError: A folder is missing or empty, or a file cannot be read.
    """
    faults = Faults(root)
    photos = ImageFolder(root, faults)
    faults.raise_if_any()
    try:
        name = _name(root.resolve().name, photos.content())
    except OSError as error:
        raise FileError(f"{error.filename}: cannot be read ({error.strerror})") from error
    files = FileNames(root, [photos.relative(path) for path in photos.files["train"]])
    return Examples(name, np.array(photos.labels["train"]), [printable(each) for each in photos.names], files)


def load_folder(root: Path, config: DataConfig, cache_folder: Path) -> tuple[ImageSet, ImageSet]:
    """Load own data from a folder. Classes are sorted by name, images by class and file name.

    ``folder_examples`` gives the data set's name. Images are decoded as a viewer shows them (``as_seen``); JPEG files
    much larger than the image size are decoded at a reduced size (``open_image``). If the files have at least
    ``CACHED_FROM`` bytes, the decoded images are saved, and later runs read them instead (``_Cache``).

    Args:
        root: Folder with ``train/`` and ``test/``.
        config: The ``image_size`` and ``channels`` to convert images to, and how to decode them.
        cache_folder: The folder of decoded images.

    Raises:
        FileError: A folder is missing or empty, or images cannot be read or differ in size.
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
                "%s: %d gray and %d color images; converting all to color (--channels=1 converts to gray)",
                root, read.gray, read.color,
            )  # fmt: skip
            images = [convert_channels(part, 3) for part in images]
        if read.reduced:
            log.info(
                "%s: %d of %d photos were decoded at reduced size (--decode=full: full size, as in older versions)",
                root, read.reduced, read.gray + read.color,
            )  # fmt: skip
        decoding = ",".join(rule for rule in RULES if rule in read.rules) or None
        decoded = _Decoded(images, read.digest.hexdigest(), decoding, normalization_of(images[0]))
        if cache:
            cache.write(decoded)
    entry = _entry(root.resolve().name, decoded.content, decoded.images[0], len(photos.names), decoded.normalization)
    names = [printable(name) for name in photos.names]
    train, test = (
        ImageSet(
            entry,
            part,
            storage,
            torch.tensor(photos.labels[part]),
            names,
            decoding=decoded.decoding,
            files=FileNames(root, [photos.relative(path) for path in photos.files[part]]),
        )
        for part, storage in zip(PARTS, decoded.images, strict=True)
    )
    return train, test
