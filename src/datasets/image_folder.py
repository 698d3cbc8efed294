"""Own images in folders: ``train/CLASS/*.png`` and ``test/CLASS/*.png``."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from src.datasets import own
from src.datasets.images import ImageSet
from src.errors import FileError

PARTS = ("train", "test")
GREY_MODES = ("1", "L", "LA", "La")
DEEP_MODES = ("I", "F")  # more than 8 bits; also I;16 and its kin
PROGRESS_FROM = 2000  # files


def _visible(folder: Path) -> list[Path]:
    """What stands in a folder, sorted by name, without hidden files."""
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FileError(f"{folder}: there is no such folder; train/ and test/ with a folder per class are needed")
    names = [path.name for path in _visible(folder) if path.is_dir()]
    if not names:
        raise FileError(f"{folder}: holds no class folder; put the images of each class into a folder of its name")
    return names


def _files(folder: Path) -> list[Path]:
    files = _visible(folder)
    if not files:
        raise FileError(f"{folder}: holds no image; put images in, or remove the class")
    for path in files:
        if path.is_dir():
            raise FileError(f"{path}: is a folder inside a class folder; images are needed there")
    return files


def decode(path: Path | str, file: object, channels: int | None = None) -> Tensor:
    """Decode one image.

    Args:
        path: How to call it in messages.
        file: What Pillow opens: a path or a binary file.
        channels: Turn into grey (1) or colour (3); as it is if None.

    Returns:
        uint8 ``(c, h, w)``.

    Raises:
        FileError: It cannot be read, or has more than 8 bits per channel.
    """
    try:
        with Image.open(file) as image:
            if image.mode.split(";")[0] in DEEP_MODES:
                raise FileError(f"{path}: has more than 8 bits per channel ({image.mode}); save it with 8")
            # 1 bit, palettes, transparency: Pillow turns them into plain grey or colour.
            grey = image.mode in GREY_MODES if channels is None else channels == 1
            pixels = np.array(image.convert("L" if grey else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FileError(f"{path}: cannot be read as an image; remove or replace it") from error
    return torch.from_numpy(pixels[None] if grey else np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _load_part(
    files: list[Path], root: Path, image_size: int | None, channels: int | None, shape: torch.Size | None, digest
) -> Tensor:
    """All images of a part as uint8 ``(n, c, s, s)``, like ``shape`` if given; file contents go into ``digest``."""
    storage = None
    for number, path in enumerate(
        tqdm(files, desc=f"reading {root.name}", disable=True if len(files) < PROGRESS_FROM else None)
    ):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise FileError(f"{path}: may not be read ({error.strerror})") from error
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
        image = decode(path, path, channels)
        if image_size is not None:
            image = own.resize(image[None], image_size)[0]
        shape = image.shape if shape is None else shape
        if image.shape[0] != shape[0]:
            kinds = {1: "grey", 3: "colour"}
            raise FileError(
                f"{path}: is {kinds[image.shape[0]]} among {kinds[shape[0]]} images; "
                "give --channels 1 or --channels 3 to convert all"
            )
        if image.shape != shape:
            raise FileError(
                f"{path}: is {image.shape[1]}x{image.shape[2]} among images of {shape[1]}x{shape[2]}; "
                "give --image_size to resize all"
            )
        if image.shape[1] != image.shape[2]:
            raise FileError(
                f"{path}: is {image.shape[1]}x{image.shape[2]}; square images are needed, or give --image_size"
            )
        if storage is None:
            storage = torch.empty((len(files), *shape), dtype=torch.uint8)
        storage[number] = image
    return storage


def load_folder(root: Path, image_size: int | None, channels: int | None) -> tuple[ImageSet, ImageSet]:
    """Own data from folders; classes sorted by name, images by class and file name.

    The data set is called by the folder's name and 8 hex digits of relative paths and file contents.

    Args:
        root: Folder with ``train/`` and ``test/``.
        image_size: Resize to this height and width.
        channels: Turn into grey (1) or colour (3).

    Raises:
        FileError: A folder is missing or empty, an image cannot be read, or images differ.
    """
    if not root.is_dir():
        raise FileError(f"{root}: there is no such folder; one with train/ and test/ is needed")
    names = _classes(root / "train")
    if len(names) == 1:
        raise FileError(f"{root / 'train'}: holds class {names[0]} only; two classes are needed at least")
    foreign = sorted(set(_classes(root / "test")) - set(names))
    if foreign:
        raise FileError(
            f"{root / 'test' / foreign[0]}: is a class that train/ lacks; every test class needs training images"
        )
    digest, shape, parts = hashlib.sha256(), None, []
    for part in PARTS:
        files, labels = [], []
        for label, name in enumerate(names):
            if part == "train" or (root / part / name).is_dir():
                found = _files(root / part / name)
                files += found
                labels += [label] * len(found)
        images = _load_part(files, root, image_size, channels, shape, digest)
        shape = images.shape[1:]
        parts.append((images, torch.tensor(labels)))
    entry = own.own_entry(root.resolve().name, digest.hexdigest(), "folder", parts[0][0], len(names))
    return tuple(
        ImageSet(entry, part, images, labels, names) for part, (images, labels) in zip(PARTS, parts, strict=True)
    )
