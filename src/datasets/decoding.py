"""Image files: which formats are read, how a file is decoded, as a viewer shows it, and folders of them."""

import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

from src.errors import FileError

# Pillow tries every format that it knows otherwise, rarely used parsers among them.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
GRAY_MODES = ("1", "L", "LA", "La")
DRAFT_MARGIN = 2  # a reduced image keeps at least so many times the pixels asked for, in each direction
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
PARTS = ("train", "test")
SETTLED = 2_000_000_000  # ns after a change to a file during which another may leave its times as they are

T = TypeVar("T")
R = TypeVar("R")
log = logging.getLogger(__name__)


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

    def __bool__(self) -> bool:
        return bool(self._found)

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


def open_image(file: BinaryIO, target: int | None = None) -> tuple[Image.Image, bool]:
    """Read an image, pixels and all.

    Args:
        file: The file, open.
        target: The length of the shorter side to which the image will be scaled: where both sides of a JPEG file
            keep ``DRAFT_MARGIN`` times so many pixels, it is decoded at a half, a quarter or an eighth of its size,
            which saves most of the work, and scaled. None for full size.

    Returns:
        The image, and whether it was so reduced and scaled.

    Raises:
        ValueError: It is damaged, or not an image of a format in ``FORMATS``.
    """
    try:
        image = Image.open(file, formats=FORMATS)
        width, height = stored = image.size
        # without effect, and None, for other formats
        draft = target and image.draft(None, (DRAFT_MARGIN * target, DRAFT_MARGIN * target))
        image.load()
        reduced = bool(draft) and image.size != stored
        if reduced:
            scale = target / min(width, height)
            size = max(target, round(width * scale)), max(target, round(height * scale))
            # The last pixels of a reduced row or column may be there in part only: the box says which part.
            image = image.resize(size, Image.Resampling.BILINEAR, box=draft[1])
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot be read as an image ({', '.join(FORMATS)})") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"cannot be read as an image ({error})") from error
    return image, reduced


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


class ImageFolder:
    """The image files of a folder, by part; what is wrong with them goes into ``faults``.

    Args:
        root: Folder with ``train/`` and ``test/``.
        faults: Where unusable files and folders are noted.
    """

    def __init__(self, root: Path, faults: Faults) -> None:
        if not root.is_dir():
            raise FileError(f"{root}: there is no such folder; one with train/ and test/ is needed")
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

    def all_files(self) -> list[Path]:
        """The files of both parts, in order."""
        return [path for part in PARTS for path in self.files[part]]

    def add(self, digest: "hashlib._Hash", path: Path, content: bytes) -> None:
        """Add a file's name and content to the digest that names the data set."""
        digest.update(os.fsencode(f"{self.relative(path)}\0{len(content)}\0"))
        digest.update(content)

    def content(self) -> str:
        """sha256 of names and contents of all files, in hex, without decoding them."""
        digest, files = hashlib.sha256(), self.all_files()
        for path, content in zip(files, ahead(Path.read_bytes, files), strict=True):
            self.add(digest, path, content)
        return digest.hexdigest()

    def stamp(self) -> tuple[int, str | None]:
        """What tells that no file has changed, without reading one.

        A file's change time (ctime) cannot be set by programs, so that a file of the same size with its modification
        time put back, or moved over another, is noticed. Changes within the resolution of these times are not:
        there is no stamp while a file is younger than ``SETTLED``, as in the index of Git.

        Returns:
            The size of all files in bytes, and a digest of their names, sizes, times and inode numbers; None where
            files changed just now.
        """
        digest, total, newest = hashlib.sha256(), 0, 0
        now = time.time_ns()
        for path in self.all_files():
            facts = path.stat()
            numbers = (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)
            digest.update(os.fsencode(f"{self.relative(path)}\0{numbers}\0"))
            total, newest = total + facts.st_size, max(newest, facts.st_ctime_ns)
        return total, digest.hexdigest() if newest < now - SETTLED else None


def ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results in order, computed ahead by one thread per processor: reading and decoding release Python's lock."""
    known = hasattr(os, "sched_getaffinity")  # how many of the processors this process may use
    workers = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    pending: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * workers:  # few, as they are held in memory
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
