"""Images from an npz file with ``x_train``, ``y_train``, ``x_test``, ``y_test`` (the Keras convention)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src import artifacts
from src.datasets import own
from src.datasets.catalogue import DatasetEntry
from src.datasets.images import ImageSet
from src.errors import FileError

PARTS = ("train", "test")
CLASS_NAMES = "class_names"  # optional


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
        raise FileError(f"{path}: {key} has shape {array.shape}, so it holds no image")
    return torch.from_numpy(_channels_first(np.ascontiguousarray(array)))


def _channels_first(array: np.ndarray) -> np.ndarray:
    """``(n, c, h, w)`` from contiguous ``(n, h, w, c)``, in the same memory, so that there is never a second copy."""
    count, height, width, channels = array.shape
    result = array.reshape(count, channels, height, width)
    for start in range(0, count, 1024):
        block = slice(start, start + 1024)
        result[block] = array[block].transpose(0, 3, 1, 2).copy()
    return result


def _labels(path: Path, key: str, array: np.ndarray, count: int) -> np.ndarray:
    """int64 ``(n,)`` from whole numbers of shape (n,) or (n, 1)."""
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
        raise FileError(f"{path}: {key} holds the label {labels.min()}; labels count from 0")
    return labels.astype(np.int64)


def _read(path: Path) -> tuple[list[Tensor], list[np.ndarray], list[str] | None]:
    """Images and labels of both parts, checked, and the class names if the file has them."""
    arrays = artifacts.read_npz(path)
    missing = [key for part in PARTS for key in (f"x_{part}", f"y_{part}") if key not in arrays]
    if missing:
        raise FileError(f"{path}: has no array {', '.join(missing)}; x_train, y_train, x_test and y_test are needed")
    images, labels = [], []
    for part in PARTS:
        images.append(_images(path, f"x_{part}", arrays.pop(f"x_{part}")))
        labels.append(_labels(path, f"y_{part}", arrays[f"y_{part}"], len(images[-1])))
    if images[0].shape[1:] != images[1].shape[1:]:
        shapes = [tuple(part.shape[1:]) for part in images]
        raise FileError(f"{path}: x_train holds images (c, h, w) = {shapes[0]}, x_test {shapes[1]}; make them alike")
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


def load_catalogue_npz(entry: DatasetEntry, path: Path) -> tuple[ImageSet, ImageSet]:
    """A catalogue data set from ``{name}.npz``, of any length; classes and image size stay the catalogue's.

    Raises:
        FileError: The file is damaged or does not fit the catalogue.
    """
    images, labels, names = _read(path)
    wanted = (entry.channels, entry.image_size, entry.image_size)
    found = tuple(images[0].shape[1:])
    if found != wanted:
        raise FileError(f"{path}: holds images (c, h, w) = {found}; {entry.name} has {wanted}")
    for part, label in zip(PARTS, labels, strict=True):
        if label.max() >= entry.num_classes:
            raise FileError(
                f"{path}: y_{part} holds the label {label.max()}; "
                f"{entry.name} has classes 0 to {entry.num_classes - 1}"
            )
    return _sets(entry, images, labels, names)


def _bytes(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return memoryview(array).cast("B")


def load_npz(path: Path, image_size: int | None, channels: int | None) -> tuple[ImageSet, ImageSet]:
    """Own data from an npz file.

    The data set is called by the file's stem and 8 hex digits of the arrays' content.

    Args:
        path: The file.
        image_size: Resize to this height and width.
        channels: Turn into grey (1) or colour (3).

    Raises:
        FileError: The file is missing, damaged, or not as described.
    """
    images, labels, names = _read(path)
    num_classes = own.check_classes(str(path), *labels)
    parts = zip(PARTS, images, labels, strict=True)
    digest = own.content_digest(
        [
            part
            for name, x, y in parts
            for part in ((f"x_{name}{tuple(x.shape)}", _bytes(x.numpy())), (f"y_{name}", _bytes(y)))
        ]
    )
    height, width = images[0].shape[2:]
    if image_size is None and height != width:
        problem = f"{path}: has images of {height}x{width}; make them square, or give "
        raise FileError(f"{problem}image_size", f"{problem}--image_size")
    for index, storage in enumerate(images):
        if channels is not None:
            storage = own.convert_channels(storage, channels)
        images[index] = storage if image_size is None else own.resize(storage, image_size)
    entry = own.own_entry(path.stem, digest, "npz", images[0], num_classes)
    return _sets(entry, images, labels, names)
