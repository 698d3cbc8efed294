"""Image files to pixels: which formats are read, and how a file is decoded, as a viewer shows it."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

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
