"""Images of a data set: those in memory, as one tensor, and how image files are decoded, as a viewer shows them."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose
from torch import Tensor

from src.datasets.augment import resized_crop
from src.datasets.registry import DatasetEntry
from src.errors import FileError

# Pillow tries every format that it knows otherwise, rarely used parsers among them.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
GRAY_MODES = ("1", "L", "LA", "La")
ORIENTATION = 274  # EXIF tag: how to turn the image upright
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}

# System files that turn up among images, in lower case; names that start with a dot are hidden and ignored as well.
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx")
MOST_LISTED = 20  # unusable files


class Content:
    """What identifies the images of a data set, computed when it is first asked for.

    Args:
        train: The full training set, as loaded.
        test: The full test set.
    """

    def __init__(self, train: "ImageSet", test: "ImageSet") -> None:
        self._parts: tuple[ImageSet, ...] = (train, test)
        self._digest: str | None = None

    @property
    def digest(self) -> str:
        """16 hex digits of the training images, the test images and the test labels."""
        if self._digest is None:
            digest = hashlib.sha256()
            entry, decoding = self._parts[0].entry, self._parts[0].decoding
            if entry.content is not None:  # own data: their files, whatever they are resized to
                digest.update(f"{entry.content}\0{decoding or ''}".encode())
            else:
                for part in self._parts:
                    part.add_content(digest)
                digest.update(self._parts[1].labels.cpu().numpy().astype("<i8").tobytes())
            self._digest = digest.hexdigest()[:16]
            self._parts = ()  # on a GPU, the images in main memory are not needed any more
        return self._digest


class ImageSet:
    """The training or the test set of a data set, or a subset of it.

    Subsets share the storage; ``indices`` are the positions of their examples in the full set.

    Attributes:
        entry: The catalog entry.
        part: ``"train"`` or ``"test"``.
        labels: int64 ``(n,)``.
        indices: int64 ``(n,)``, the original position of each example in the full set.
        total: Length of the full set.
        class_names: One name per class.
        decoding: Which rules of ``as_seen`` changed pixels of this data set, such as ``"exif,alpha"``; None
            for none.
        content: What identifies the images of both parts; None where the parts were not loaded together.
    """

    content: Content | None = None

    def __init__(
        self,
        entry: DatasetEntry,
        part: str,
        storage: Tensor,
        labels: Tensor,
        class_names: Sequence[str] | None = None,
        *,
        indices: Tensor | None = None,
        total: int | None = None,
        rows: Tensor | None = None,
        decoding: str | None = None,
    ) -> None:
        self.entry = entry
        self.part = part
        self.labels = labels
        self.class_names = list(class_names or entry.class_names or map(str, range(entry.num_classes)))
        self.total = len(labels) if total is None else total
        self.indices = torch.arange(len(labels), device=labels.device) if indices is None else indices
        self.decoding = decoding
        self._storage = storage
        self._rows = rows  # rows of the storage; None for all of them in order

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where labels and indices are, and the images too if they are in memory."""
        return self.labels.device

    @property
    def digest(self) -> str | None:
        """16 hex digits that identify the full data set's images and test labels; None where they are not known."""
        return None if self.content is None else self.content.digest

    def add_content(self, digest: "hashlib._Hash") -> None:
        """Add the images of this full set to a digest."""
        digest.update(f"{tuple(self._storage.shape)}".encode())
        digest.update(memoryview(self._storage.contiguous().numpy()).cast("B"))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.entry.channels, self.entry.image_size, self.entry.image_size

    def fetch(self, positions: Tensor) -> Tensor:
        """Images at ``positions`` (0 to n-1, within this set), as uint8 ``(b, c, h, w)``, un-augmented."""
        positions = positions.to(self.device)
        rows = positions if self._rows is None else self._rows[positions]
        return self._storage.index_select(0, rows)

    def stream(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Iterator[Tensor]:
        """Images batch by batch, for sets that are read ahead.

        Args:
            batches: Positions ``(b,)`` of each batch, and its uniform draws for random resized crops or None.

        Yields:
            uint8 ``(b, c, h, w)``, cropped where draws are given.
        """
        for positions, draws in batches:
            images = self.fetch(positions)
            yield images if draws is None else resized_crop(images, draws)

    def subset(self, positions: Tensor) -> "ImageSet":
        """The examples at ``positions``, in that order; the storage is shared, original indices are kept."""
        positions = torch.as_tensor(positions, dtype=torch.int64).to(self.device)
        return self._with(
            labels=self.labels[positions],
            indices=self.indices[positions],
            rows=positions if self._rows is None else self._rows[positions],
        )

    def to(self, device: str | torch.device) -> "ImageSet":
        """This set on a device (itself if it is there); of a subset only its own images are copied."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device == self.device:
            return self
        storage = self._storage if self._rows is None else self._storage.index_select(0, self._rows)
        return self._with(
            labels=self.labels.to(device), indices=self.indices.to(device), storage=storage.to(device), rows=None
        )

    def _with(
        self, *, labels: Tensor, indices: Tensor, rows: Tensor | None, storage: Tensor | None = None
    ) -> "ImageSet":
        other = type(self)(
            self.entry,
            self.part,
            self._storage if storage is None else storage,
            labels,
            self.class_names,
            indices=indices,
            total=self.total,
            rows=rows,
            decoding=self.decoding,
        )
        other.content = self.content
        return other


class Faults:
    """Collects unusable files, to report them all at once rather than one per start.

    Args:
        root: The folder or archive that the files belong to; long lists name it once.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._found: list[tuple[str, str]] = []

    def add(self, name: str, reason: str) -> None:
        """Note what is wrong with a file, named relative to the root, and what to do."""
        self._found.append((name, reason))

    def raise_if_any(self) -> None:
        """Report what was found.

        Raises:
            FileError: Lists up to ``MOST_LISTED`` files.
        """
        if len(self._found) == 1:
            name, reason = self._found[0]
            raise FileError(f"{self.root / name}: {reason}")
        if self._found:
            listed = [f"({k}) {name}: {reason}" for k, (name, reason) in enumerate(self._found[:MOST_LISTED], 1)]
            rest = len(self._found) - len(listed)
            more = f"; and {rest} more" if rest else ""
            raise FileError(f"{self.root}: these files or folders cannot be used: {'; '.join(listed)}{more}")


def is_system_file(name: str) -> bool:
    """Whether a file or folder is hidden or made by an operating system, so not part of the data."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def printable(name: str) -> str:
    r"""A file name as text that can be printed and drawn: bytes that are not UTF-8 are written as ``\xff``."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def open_image(file: BinaryIO) -> Image.Image:
    """Read an image, pixels and all.

    Raises:
        ValueError: It is damaged, or not an image of a format in ``FORMATS``.
    """
    try:
        image = Image.open(file, formats=FORMATS)
        image.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot be read as an image ({', '.join(FORMATS)})") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"cannot be read as an image ({error})") from error
    return image


def as_seen(image: Image.Image, channels: int | None) -> tuple[np.ndarray, set[str]]:
    """The pixels that a viewer shows: upright by EXIF, transparency on white, 16-bit gray scaled to 8 bits.

    Args:
        image: The image as stored.
        channels: Convert to gray (1) or color (3); as it is if None.

    Returns:
        uint8 ``(c, h, w)``, and which of the rules ``"exif"`` and ``"alpha"`` changed the pixels: results that were
        computed before these rules existed have other pixels there.

    Raises:
        ValueError: It has 32 bits per pixel (I, F), for which no scale to 8 bits is given.
    """
    rules = set()
    # not ImageOps.exif_transpose, which also rewrites the EXIF data and fails where another tag is malformed
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data raise nearly anything: the image as stored
        turn = None
    if turn is not None:
        image = image.transpose(turn)
        rules.add("exif")
    deep = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")  # PGM: scaled by Pillow
    if image.mode in ("I", "F") and not deep:
        raise ValueError(f"has 32 bits per pixel (mode {image.mode}); save it with 8 or 16")
    if deep:
        values = np.asarray(image).astype(np.int64)
        values[values == image.info.get("transparency")] = 65535
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    gray = image.mode in GRAY_MODES if channels is None else channels == 1
    kind = "L" if gray else "RGB"
    pixels = np.asarray(image.convert(kind))
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        if layered.getextrema()[3][0] < 255:  # not opaque
            layered = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layered)
            plain, pixels = pixels, np.asarray(layered.convert("RGB").convert(kind))
            if not np.array_equal(pixels, plain):
                rules.add("alpha")
    return np.array(pixels[None] if gray else pixels.transpose(2, 0, 1), order="C"), rules
