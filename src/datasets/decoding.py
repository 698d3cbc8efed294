"""Image files: supported formats, decoding as an image viewer does, and folders of images."""

import hashlib
import logging
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

from src.datasets.files import FileNames
from src.errors import FileError

# Otherwise Pillow tries every format it knows, including rarely used parsers.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
GRAY_MODES = ("1", "L", "LA", "La")
DRAFT_MARGIN = 2  # a reduced image keeps at least this multiple of the target size in each dimension
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

# System files found among images, in lower case. Names that start with a dot are also ignored.
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx")
MOST_LISTED = 20  # unusable files listed in an error
PARTS = ("train", "test")
SETTLED = 2_000_000_000  # ns after a file changes during which another change may not alter its timestamps

T = TypeVar("T")
R = TypeVar("R")
log = logging.getLogger(__name__)


class Faults:
    """Collects unusable files, to report all of them at once.

    Args:
        root: The folder or archive that contains the files. Long lists name it once.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._found: list[tuple[str, str]] = []

    def add(self, name: str, reason: str) -> None:
        """Add a file, named relative to the root, with what is wrong and what to do."""
        self._found.append((name, reason))

    def __bool__(self) -> bool:
        return bool(self._found)

    def raise_if_any(self) -> None:
        """Raise an error if any files were added.

        Raises:
            FileError: Files were added; the message lists up to ``MOST_LISTED`` of them.
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
    """Whether a file or folder is hidden or created by an operating system, and so is not part of the data."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def open_image(file: BinaryIO, target: int | None = None) -> tuple[Image.Image, bool]:
    """Read and decode an image.

    Args:
        file: The open file.
        target: Length in pixels of the shorter side that the image will be scaled to; None for full size. If both
            sides of a JPEG file keep ``DRAFT_MARGIN`` times as many pixels, it is decoded at a half, a quarter or an
            eighth of its size, which saves most of the work, and then scaled.

    Returns:
        The image, and whether it was reduced and scaled in this way.

    Raises:
        ValueError: The file is damaged or not an image in one of ``FORMATS``.
    """
    try:
        image = Image.open(file, formats=FORMATS)
        width, height = stored = image.size
        # for other formats, draft has no effect and returns None
        draft = image.draft(None, (DRAFT_MARGIN * target, DRAFT_MARGIN * target)) if target else None
        image.load()
        reduced = False
        if target and draft and image.size != stored:
            reduced = True
            scale = target / min(width, height)
            size = max(target, round(width * scale)), max(target, round(height * scale))
            # The last pixel of a reduced row or column may be partial; the box excludes the missing part.
            image = image.resize(size, Image.Resampling.BILINEAR, box=draft[1])
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot be read as an image ({', '.join(FORMATS)})") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise almost any exception
        raise ValueError(f"cannot be read as an image ({error})") from error
    return image, reduced


def as_seen(image: Image.Image, channels: int | None) -> tuple[np.ndarray, set[str]]:
    """Return the pixels that a viewer shows: rotated per EXIF, transparency on white, 16-bit gray scaled to 8 bits.

    Args:
        image: The image as stored.
        channels: Convert to gray (1) or color (3); None for no conversion.

    Returns:
        The pixels, uint8 ``(c, h, w)``, and which of the rules ``"exif"`` and ``"alpha"`` changed them. Results
        computed before these rules existed used different pixels.

    Raises:
        ValueError: The image has 32 bits per pixel (modes I and F), which have no defined scale to 8 bits.
    """
    rules = set()
    # not ImageOps.exif_transpose, which also rewrites the EXIF data and fails if another tag is malformed
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data can raise almost any exception; use the image as stored
        turn = None
    if turn is not None:
        image = image.transpose(turn)
        rules.add("exif")
    deep = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")  # PGM: scaled by Pillow
    if image.mode in ("I", "F") and not deep:
        raise ValueError(f"has 32 bits per pixel (mode {image.mode}); save it with 8 or 16 bits")
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


class Photos(ABC):
    """Encoded images and their labels, by part. Problems are added to ``faults``.

    Attributes:
        root: The folder, for messages and relative names.
        stem: The start of the data set's name.
        place: Identifies the source of the images among all sources.
        faults: Collects unusable files and folders.
        names: The class names.
        parts: ``("train", "test")``, or only ``("train",)`` if there is no test part.
        files: The items of each part, which ``read`` reads.
        labels: Their labels.
    """

    root: Path
    stem: str
    place: str
    faults: Faults
    names: list[str]
    parts: tuple[str, ...] = PARTS
    files: dict[str, list]
    labels: dict[str, list[int]]

    @abstractmethod
    def relative(self, item: Any) -> str:
        """Return an item's name relative to the root, which is unique."""

    @abstractmethod
    def read(self, item: Any) -> bytes:
        """Return an item's encoded image."""

    @abstractmethod
    def file_names(self, part: str) -> FileNames | None:
        """Return the file names of a part; None if its images do not come from single files."""

    @abstractmethod
    def stamp(self) -> tuple[int, str | None]:
        """Return the total size in bytes, and a digest that changes whenever an image does; None if unknown."""

    def all_files(self) -> list:
        """Return the items of all parts, in order."""
        return [item for part in self.parts for item in self.files[part]]

    def add(self, digest: "hashlib._Hash", item: Any, content: bytes) -> None:
        """Add an item's name and contents to the digest that identifies the data set."""
        digest.update(os.fsencode(f"{self.relative(item)}\0{len(content)}\0"))
        digest.update(content)

    def content(self) -> str:
        """Return the sha256 of all names and contents, in hex. Does not decode the images."""
        digest, items = hashlib.sha256(), self.all_files()
        for item, content in zip(items, ahead(self.read, items), strict=True):
            self.add(digest, item, content)
        return digest.hexdigest()


class ImageFolder(Photos):
    """The image files of a folder.

    Classes are sorted by name, images by class and file name. The layout is ``train/CLASS/`` and ``test/CLASS/``.
    Without ``test/``, ``val/`` is the test part; without both, or if the class folders are in the root itself, there
    is none.

    Args:
        root: The folder.

    Raises:
        FileError: The folder, its classes or its training images are missing.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise FileError(f"{root}: no such folder; give a folder with train/ and test/, or one per class")
        self.root, self.faults, self.stem = root, Faults(root), root.resolve().name
        self.place = str(root.resolve())
        self.ignored: list[str] = []
        folders = {"train": root if self._is_flat() else root / "train"}
        for name in ("test", "val"):
            if "test" not in folders and folders["train"] != root and (root / name).is_dir():
                folders["test"] = root / name
                if name == "val":
                    log.info("%s: no test/; using val/ for testing", root)
        self.parts = tuple(folders)
        self.names = self._classes(folders["train"])
        if len(self.names) == 1:
            raise FileError(f"{folders['train']}: has only class {self.names[0]}; at least two classes are needed")
        for name in self._classes(folders["test"]) if "test" in folders else ():
            if name not in self.names:
                where = self.relative(folders["test"] / name)
                self.faults.add(where, "is a class without a folder in train/; every class needs training images")
        self.files = {part: [] for part in self.parts}
        self.labels = {part: [] for part in self.parts}
        for part, folder in folders.items():
            for label, name in enumerate(self.names):
                if part == "train" or (folder / name).is_dir():
                    found = self._files(folder / name)
                    self.files[part] += found
                    self.labels[part] += [label] * len(found)
        if self.ignored:
            examples = ", ".join(sorted(set(self.ignored))[:3])
            log.info("%s: hidden or system files ignored: %d (%s)", root, len(self.ignored), examples)

    def _is_flat(self) -> bool:
        """Whether the class folders are in the root. A class may be called train if its folder has images."""
        folders = [path for path in self.root.iterdir() if path.is_dir() and not is_system_file(path.name)]
        others = [path for path in folders if path.name not in ("train", "test", "val")]
        parts = [path for path in folders if path not in others]
        return bool(others) and not any(path.is_dir() for part in parts for path in part.iterdir())

    def _visible(self, folder: Path) -> list[Path]:
        """Return a folder's contents, sorted by name, without hidden and system files."""
        found = sorted(folder.iterdir(), key=lambda path: path.name)
        self.ignored += [path.name for path in found if is_system_file(path.name)]
        return [path for path in found if not is_system_file(path.name)]

    def _classes(self, folder: Path) -> list[str]:
        if not folder.is_dir():
            raise FileError(
                f"{folder}: no such folder; create train/ and test/ with a folder per class, or put the class "
                f"folders into {self.root}"
            )
        names = [path.name for path in self._visible(folder) if path.is_dir()]
        if not names:
            raise FileError(
                f"{folder}: has no class folders; put the images of each class in a folder named after it"
            )
        return names

    def _files(self, folder: Path) -> list[Path]:
        try:
            files = self._visible(folder)
        except OSError as error:
            self.faults.add(self.relative(folder), f"cannot be read ({error.strerror})")
            return []
        if not files:
            self.faults.add(self.relative(folder), "has no images; add images or remove the class")
        for path in files:
            if path.is_dir():
                self.faults.add(self.relative(path), "is a folder inside a class folder; put only images there")
            elif not path.is_file():  # opening a pipe would block
                self.faults.add(self.relative(path), "is not a regular file; remove or replace it")
        return [path for path in files if path.is_file()]

    def relative(self, path: Path) -> str:
        """Return a file's path relative to the root."""
        return path.relative_to(self.root).as_posix()

    def read(self, path: Path) -> bytes:
        """Return a file's contents."""
        return path.read_bytes()

    def file_names(self, part: str) -> FileNames:
        """Return the file names of a part, relative to the root."""
        return FileNames(self.root, [self.relative(path) for path in self.files[part]])

    def stamp(self) -> tuple[int, str | None]:
        """Return the stamp of the files; see ``files_stamp``."""
        return files_stamp((self.relative(path), path) for path in self.all_files())


def files_stamp(named: Iterable[tuple[str, Path]]) -> tuple[int, str | None]:
    """Return a stamp that changes whenever a file does, without reading the files.

    Programs cannot set a file's change time (ctime), so the stamp detects a file of the same size whose modification
    time was reset, or that was moved over another. It cannot detect changes within the resolution of these times, so
    there is no stamp while a file is younger than ``SETTLED``, as in Git's index.

    Args:
        named: The name and the path of each file.

    Returns:
        The total size of the files in bytes, and a digest of their names, sizes, times and inode numbers, or None if
        a file changed too recently.
    """
    digest, total, newest = hashlib.sha256(), 0, 0
    now = time.time_ns()
    for name, path in named:
        facts = path.stat()
        numbers = (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)
        digest.update(os.fsencode(f"{name}\0{numbers}\0"))
        total, newest = total + facts.st_size, max(newest, facts.st_ctime_ns)
    return total, digest.hexdigest() if newest < now - SETTLED else None


def ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield results in order, computed ahead with one thread per CPU. Reading and decoding release the GIL."""
    known = hasattr(os, "sched_getaffinity")  # reports the CPUs that this process may use
    workers = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    pending: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * workers:  # bounded, because results are kept in memory
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
