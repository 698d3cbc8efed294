"""Own images in folders: ``train/CLASS/*.png`` and ``test/CLASS/*.png``."""

import hashlib
import logging
import os
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from src.datasets import own
from src.datasets.decoding import as_seen, is_system_file, open_image, printable
from src.datasets.faults import Faults
from src.datasets.images import ImageSet
from src.errors import FileError

PARTS = ("train", "test")
PROGRESS_FROM = 2000  # files
ODD_SIZES_LISTED = 3

log = logging.getLogger(__name__)


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
            listing.faults.add(more, "differ in size, too; give image_size to resize all")

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
                    faults.add(name, f"is {size[0]}x{size[1]}; square images are needed, or give image_size")
            if size != self.size:
                self.odd_sizes += 1
                if self.odd_sizes <= ODD_SIZES_LISTED:
                    wanted = f"{self.size[0]}x{self.size[1]}"
                    faults.add(
                        name, f"is {size[0]}x{size[1]} among images of {wanted}; give image_size to resize all"
                    )
                continue
            if storage is None:
                storage = torch.empty((len(files), *image.shape), dtype=torch.uint8)
            if len(image) > storage.shape[1]:
                storage = own.convert_channels(storage, 3)
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
        return image if self.image_size is None else own.resize(image[None], self.image_size)[0]


def load_folder(root: Path, image_size: int | None, channels: int | None) -> tuple[ImageSet, ImageSet]:
    """Own data from folders; classes sorted by name, images by class and file name.

    The data set is called by the folder's name and 8 hex digits of relative paths and file contents. Images are
    decoded as a viewer shows them (``decoding.as_seen``).

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
    faults.refuse()
    images = read.parts
    if read.gray and read.color:
        log.info(
            "%s: %d gray and %d color images: all are converted to color (1 channel makes them gray)",
            root, read.gray, read.color,
        )  # fmt: skip
        images = [own.convert_channels(part, 3) for part in images]
    entry = own.own_entry(root.resolve().name, read.digest.hexdigest(), "folder", images[0], len(listing.names))
    names = [printable(name) for name in listing.names]
    decoding = ",".join(rule for rule in ("exif", "alpha") if rule in read.rules) or None
    return tuple(
        ImageSet(entry, part, storage, torch.tensor(listing.labels[part]), names, decoding=decoding)
        for part, storage in zip(PARTS, images, strict=True)
    )
