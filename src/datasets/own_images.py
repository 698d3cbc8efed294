"""The user's own images in files: decoding them once, the cache of decoded images, and folders of images."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.features
import torch
from torch import Tensor
from tqdm import tqdm

from src.artifacts.io import read_npz, write_with
from src.datasets.batches import ImageSet, own_digest
from src.datasets.decoding import Photos, ahead, as_seen, open_image
from src.datasets.files import Examples, printable
from src.datasets.own import (
    content_of,
    convert_channels,
    draw_test,
    normalization_of,
    own_name,
    own_sets,
    resize,
)
from src.datasets.registry import DataConfig, Normalization
from src.errors import FileError
from src.formatting import gib

PROGRESS_FROM = 2000  # files
ODD_SIZES_LISTED = 3
RULES = ("exif", "alpha", "draft")  # rules that may change pixels, in the order in which they are recorded
CACHE_FORMAT = 1  # increment when a change to decoding gives different pixels for the same files
CACHED_FROM = 4 << 20  # bytes of image files; decoding fewer takes at most about a second

log = logging.getLogger(__name__)


@dataclass
class _Decoded:
    """The decoded and converted images.

    Attributes:
        images: uint8 ``(n, c, h, w)`` of each part.
        content: sha256 of the file names and contents, in hex.
        decoding: The rules that changed pixels, as in ``ImageSet``.
        normalization: The normalization of the images of the first part.
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

    def __init__(self, photos: Photos, config: DataConfig, folder: Path) -> None:
        self.photos = photos
        self.size, self._stamp = photos.stamp()
        self.rules = {
            "format": CACHE_FORMAT,
            "pillow": PIL.__version__,
            "jpeg": PIL.features.version("libjpeg_turbo") or PIL.features.version("jpg"),
            "torch": torch.__version__,  # it resizes
            **{name: getattr(config, name) for name in ("image_size", "channels", "decode")},
        }
        key = os.fsencode(f"{photos.place}\0{config.image_size}\0{config.channels}\0{config.decode}")
        self.path = folder / f"{own_name(photos.stem[:80], hashlib.sha256(key).hexdigest())}.npz"

    def read(self) -> _Decoded | None:
        """Return the images of the current files, or None if the cache does not contain them."""
        if self.size < CACHED_FROM or not os.path.exists(self.path):
            return None
        try:
            arrays = read_npz(self.path)
            header = json.loads(str(arrays["header"]))
            if header["rules"] != self.rules:
                raise ValueError(f"made with {header['rules']}, not {self.rules}")
            images = [torch.from_numpy(arrays[part]) for part in self.photos.parts]
            for part, storage in zip(self.photos.parts, images, strict=True):
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

    def header(self) -> dict[str, Any] | None:
        """Return the header of the cache of the current files, without reading them; None if there is none."""
        if self.size < CACHED_FROM or self._stamp is None or not os.path.exists(self.path):
            return None
        try:
            header = json.loads(str(read_npz(self.path, ["header"])["header"]))
            return header if (header["stamp"], header["rules"]) == (self._stamp, self.rules) else None
        except Exception:  # a damaged or foreign file can raise almost any exception; loading the images reports it
            return None

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
        arrays = {part: storage.numpy() for part, storage in zip(self.photos.parts, decoded.images, strict=True)}
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

    def __init__(self, photos: Photos, config: DataConfig) -> None:
        self.photos, self.image_size, self.channels = photos, config.image_size, config.channels
        self.target = config.image_size if config.decode == "draft" else None
        self.digest = hashlib.sha256()  # of file names and contents
        self.rules: set[str] = set()  # see RULES
        self.gray = self.color = 0  # number of gray and color images
        self.reduced = 0  # number of images decoded in draft mode
        self.size: tuple[int, int] | None = None  # size of the first image
        self.odd_sizes = 0
        self.parts = [self._read(part, photos.files[part]) for part in photos.parts]
        if self.odd_sizes > ODD_SIZES_LISTED:  # listing all would hide unreadable files; the remedy is the same
            more = f"{self.odd_sizes - ODD_SIZES_LISTED} more images"
            photos.faults.add(more, "also differ in size; give --image_size to resize all")

    def _read(self, part: str, files: Sequence[Any]) -> Tensor | None:
        faults, storage = self.photos.faults, None
        bar = tqdm(
            ahead(self._decode, files),
            desc=f"reading {part}",
            total=len(files),
            disable=True if len(files) < PROGRESS_FROM else None,
        )
        for number, (item, result) in enumerate(zip(files, bar, strict=True)):
            name = self.photos.relative(item)
            if isinstance(result, Exception):
                reason = f"cannot be read ({result.strerror})" if isinstance(result, OSError) else None
                faults.add(name, reason or f"{result}; remove or replace it")
                continue
            content, image, rules = result
            self.photos.add(self.digest, item, content)
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

    def _decode(self, item: Any) -> tuple[bytes, Tensor, set[str]] | Exception:
        """Return a file's contents, pixels ``(c, h, w)`` and the rules that changed them, or the exception raised."""
        try:
            content = self.photos.read(item)
            image, reduced = open_image(BytesIO(content), self.target)
            pixels, rules = as_seen(image, self.channels)
        except (OSError, ValueError) as error:
            return error
        decoded = torch.from_numpy(pixels)
        decoded = decoded if self.image_size is None else resize(decoded[None], self.image_size)[0]
        return content, decoded, rules | {"draft"} if reduced else rules


def load_photos(
    find: Callable[[Path], Photos], path: Path, config: DataConfig, cache_folder: Path
) -> tuple[ImageSet, ImageSet]:
    """Load own data from encoded images, or from their cache.

    Images are decoded as a viewer shows them (``as_seen``); JPEG files much larger than the image size are decoded at
    a reduced size (``open_image``). If the files have at least ``CACHED_FROM`` bytes, the decoded images are saved,
    and later runs read them instead (``_Cache``). The data set's name is that of the root and 8 hex digits of a hash
    of all file names and contents.

    Args:
        find: Finds the images and their labels, such as ``ImageFolder``.
        path: What ``find`` takes.
        config: The ``image_size`` and ``channels`` to convert images to, and how to decode them.
        cache_folder: The folder of decoded images.

    Raises:
        ArgumentError: A package is not installed.
        FileError: The data are missing or unclear, or images cannot be read or differ in size.
    """
    photos = find(path)
    root = photos.root
    cache = None if photos.faults else _Cache(photos, config, cache_folder)
    decoded = cache.read() if cache else None
    if decoded is None:
        read = _Images(photos, config)
        photos.faults.raise_if_any()
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
    labels = [np.array(photos.labels[part]) for part in photos.parts]
    return own_sets(
        photos.stem,
        decoded.content,
        decoded.images,
        labels,
        [printable(name) for name in photos.names],
        files=[photos.file_names(part) for part in photos.parts],
        drawn=draw_test(root, labels, config),
        normalization=decoded.normalization,
        decoding=decoded.decoding,
    )


def photo_examples(
    find: Callable[[Path], Photos], path: Path, config: DataConfig, cache_folder: Path | None
) -> Examples:
    """Return the training examples of own data, without decoding the images.

    The files are read to name the data set, unless the cache of decoded images knows their digest. The arguments are
    those of ``load_photos``; without a cache folder, the digest of the decoded images is unknown.

    Raises:
        ArgumentError: A package is not installed.
        FileError: The data are missing or unclear, or a file cannot be read.
    """
    photos = find(path)
    photos.faults.raise_if_any()
    labels = [np.array(photos.labels[part]) for part in photos.parts]
    drawn = draw_test(photos.root, labels, config)
    try:
        header = None if cache_folder is None else _Cache(photos, config, cache_folder).header()
        digest = photos.content() if header is None else header["content"]
    except OSError as error:
        raise FileError(f"{error.filename}: cannot be read ({error.strerror})") from error
    names = [printable(each) for each in photos.names]

    def find_digest() -> str | None:
        if header is not None:
            return own_digest(content_of(digest, drawn), header["decoding"])
        if cache_folder is None:
            return None
        # which rules change pixels is known after decoding
        train, _ = load_photos(lambda _: photos, path, config, cache_folder)
        return own_digest(train.entry.content, train.decoding)

    files = photos.file_names("train")
    return Examples(own_name(photos.stem, digest), labels[0], names, files, drawn, find_digest)
