"""The user's own data in an npz file: its arrays, and the conventions that are converted to ours."""

import hashlib
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.artifacts.io import read_npz
from src.datasets.batches import ImageSet, own_digest
from src.datasets.decoding import PARTS
from src.datasets.files import Examples, FileNames
from src.datasets.own import content_of, convert_all, count_classes, draw_test, own_name, own_sets
from src.datasets.registry import DataConfig, DatasetEntry
from src.errors import FileError

CLASS_NAMES, FILES = "class_names", "files"  # optional arrays: class_names, and files_train and files_test

# Names of the arrays of each part, (images, labels); the first pair is ours.
_NAMES = {
    "train": (
        ("x_train", "y_train"), ("X_train", "y_train"), ("X_train", "Y_train"), ("train_x", "train_y"),
        ("train_images", "train_labels"), ("images_train", "labels_train"), ("x", "y"), ("X", "y"), ("X", "Y"),
        ("images", "labels"),
    ),
    "test": (
        ("x_test", "y_test"), ("X_test", "y_test"), ("X_test", "Y_test"), ("test_x", "test_y"),
        ("test_images", "test_labels"), ("images_test", "labels_test"),
    ),
    "val": (
        ("x_val", "y_val"), ("X_val", "y_val"), ("X_val", "Y_val"), ("val_x", "val_y"), ("val_images", "val_labels"),
        ("images_val", "labels_val"),
    ),
}  # fmt: skip
_IMAGE_NAMES = {pair[0] for pairs in _NAMES.values() for pair in pairs}
_DIM = 32  # if the largest value is at most this, but no float in [0, 1], the scale cannot be guessed
_TWELVE_BITS = 4095
_BLOCK = 1024  # images converted at once

log = logging.getLogger(__name__)


class _NpzFile:
    """The converted arrays of an npz file.

    Args:
        path: The file.
        catalog: Whether it is a catalog data set, whose labels are used unchanged and which must have both parts.

    Attributes:
        images: uint8 ``(n, c, h, w)`` of each part.
        labels: int64 ``(n,)`` of each part.
        names: The class names; None if the file has none.
        files: The names of the files of each part, or None.

    Raises:
        FileError: The file is missing, damaged, not in a known format, or ambiguous.
    """

    def __init__(self, path: Path, *, catalog: bool = False) -> None:
        self.path, self.catalog = path, catalog
        arrays = read_npz(path)
        pairs = self._find(arrays)
        # the arrays are removed, so that each is freed once it is converted
        raw = [(key, arrays.pop(key)) for key, _ in pairs]
        given = [(key, arrays[key]) for _, key in pairs]
        self.names = self._text(CLASS_NAMES, arrays)
        self._check_dtypes(raw)
        laid_out = [self._channels_last(key, array) for key, array in raw]
        del raw
        self.labels = self._labels(given, [len(array) for _, array in laid_out])
        scale = self._scale(laid_out)
        self.images = []
        while laid_out:
            self.images.append(_as_bytes(laid_out.pop(0)[1], scale))
        if len({part.shape[1:] for part in self.images}) > 1:
            shapes = [tuple(part.shape[1:]) for part in self.images]
            (first, _), (second, _) = pairs
            raise FileError(
                f"{path}: {first} has images (c, h, w) = {shapes[0]}, {second} {shapes[1]}; they must have the same "
                "shape"
            )
        self.files: list[FileNames | None] = []
        for part, label in zip(PARTS, self.labels, strict=False):
            listed = self._text(f"{FILES}_{part}", arrays)
            if listed is not None and len(listed) != len(label):
                raise FileError(f"{path}: {FILES}_{part} has {len(listed)} names for {len(label)} images")
            self.files.append(None if listed is None else FileNames(path, listed))

    def _find(self, arrays: dict[str, np.ndarray]) -> list[tuple[str, str]]:
        """Return the names of the images and labels of each part; only of one part if there is no test part."""
        found = []
        for part in PARTS:
            pairs = [pair for pair in _NAMES[part] if pair[0] in arrays and pair[1] in arrays]
            if part == "test" and not pairs:
                pairs = [pair for pair in _NAMES["val"] if pair[0] in arrays and pair[1] in arrays]
                pairs = [] if any(name in arrays for pair in _NAMES["test"] for name in pair) else pairs
            if _NAMES[part][0] in pairs:  # our names
                pairs = pairs[:1]
            if len({pair[0] for pair in pairs}) > 1 or len({pair[1] for pair in pairs}) > 1:
                names = sorted({name for pair in pairs for name in pair})
                raise FileError(
                    f"{self.path}: {', '.join(names)} are all possible {part} data; keep one pair, as x_{part} and "
                    f"y_{part}"
                )
            if pairs:
                found.append(pairs[0])
            elif part == "train" or self.catalog or any(name in arrays for pair in _NAMES["test"] for name in pair):
                missing = [name for each in PARTS for name in _NAMES[each][0] if name not in arrays]
                raise FileError(
                    f"{self.path}: has no array {', '.join(missing)}; x_train, y_train, x_test and y_test are needed "
                    f"(it has {', '.join(sorted(arrays)) or 'none'})"
                )
        if len(found) == 1 and any(name in arrays for name in _IMAGE_NAMES - {found[0][0]}):
            other = sorted(name for name in _IMAGE_NAMES - {found[0][0]} if name in arrays)
            raise FileError(f"{self.path}: has images {other[0]} without labels; add them, or remove the array")
        for pair, part in zip(found, PARTS, strict=False):
            if pair != _NAMES[part][0]:
                log.info("%s: using %s and %s as x_%s and y_%s", self.path, *pair, part, part)
        return found

    def _check_dtypes(self, raw: list[tuple[str, np.ndarray]]) -> None:
        for key, array in raw:
            if array.dtype.kind not in "biuf":
                raise FileError(f"{self.path}: {key} has dtype {array.dtype}; numbers from 0 to 255 are needed")
        if len({array.dtype for _, array in raw}) > 1:
            kinds = " and ".join(f"{key} has dtype {array.dtype}" for key, array in raw)
            raise FileError(f"{self.path}: {kinds}; save both with the same dtype")

    def _channels_last(self, key: str, array: np.ndarray) -> tuple[str, np.ndarray]:
        """Return the images as a view ``(n, h, w, c)``."""
        shape = array.shape
        if array.ndim == 3:
            array = array[..., None]
        if array.ndim != 4 or not {1, 3} & {array.shape[1], array.shape[-1]}:
            raise FileError(
                f"{self.path}: {key} has shape {shape}; (n, height, width), (n, height, width, 1 or 3) or "
                "(n, 1 or 3, height, width) is needed"
            )
        if not all(shape):
            raise FileError(f"{self.path}: {key} has shape {shape}, so it has no images")
        if array.shape[-1] not in (1, 3):
            log.info("%s: %s has shape %s; assuming channels first", self.path, key, shape)
            return key, array.transpose(0, 2, 3, 1)
        if len(shape) == 4 and shape[1] in (1, 3) and max(shape[1:]) > 1:
            raise FileError(
                f"{self.path}: {key} has shape {shape}, which may be channels first or last; use larger images"
            )
        return key, array

    def _scale(self, parts: list[tuple[str, np.ndarray]]) -> float | None:
        """Return the factor that converts pixels to [0, 255]; None if they are uint8 already.

        The values of all parts count, since one part may happen to be dark.
        """
        dtype, keys = parts[0][1].dtype, " and ".join(key for key, _ in parts)
        if dtype == np.uint8:
            return None
        low = min(float(array.min()) for _, array in parts)
        high = max(float(array.max()) for _, array in parts)
        what = f"{self.path}: {keys} with dtype {dtype} and values from {low:g} to {high:g}"
        if not np.isfinite([low, high]).all():
            raise FileError(f"{self.path}: {keys} with dtype {dtype} has values that are not finite")
        if low < 0:
            raise FileError(f"{what}: negative values; undo the normalization, and save 0 to 255 as uint8")
        if dtype.kind == "b" or (dtype.kind == "f" and high <= 1):
            scale, assumed = 255.0, "0 to 1"
        elif high <= _DIM:
            raise FileError(f"{what}: the scale is unclear; save pixels from 0 to 255 as uint8")
        elif high <= 255:
            scale, assumed = 1.0, "0 to 255"
        elif dtype == np.uint16 and high > _TWELVE_BITS:
            scale, assumed = 1 / 257, "0 to 65535"
        elif dtype == np.uint16:
            raise FileError(f"{what}: may have 12 bits; scale them to 0 to 65535, or save 0 to 255 as uint8")
        else:
            raise FileError(f"{what}: the scale is unclear; save pixels from 0 to 255 as uint8")
        log.info("%s: assuming a scale from %s; converted to 8 bits", what, assumed)
        return scale

    def _labels(self, given: list[tuple[str, np.ndarray]], counts: list[int]) -> list[np.ndarray]:
        """Convert labels to int64 ``(n,)`` per part, from 0."""
        parts = [self._flat(key, array, count) for (key, array), count in zip(given, counts, strict=True)]
        keys = " and ".join(key for key, _ in given)
        if any(part.dtype.kind == "U" for part in parts):
            return self._from_text(keys, parts)
        for (key, _), part in zip(given, parts, strict=True):
            if part.dtype.kind == "f" and not np.array_equal(part, np.rint(part)):
                raise FileError(f"{self.path}: {key} has labels that are not whole numbers; give integers from 0")
        if parts[0].dtype.kind == "f":
            log.info("%s: %s with dtype %s: assuming whole numbers", self.path, keys, parts[0].dtype)
        labels = [part.astype(np.int64) for part in parts]
        for (key, _), part in zip(given, labels, strict=True):
            if part.min() < 0:
                raise FileError(f"{self.path}: {key} has the label {part.min()}; labels start at 0")
        present = np.unique(labels[0])
        from_one = np.array_equal(present, np.arange(1, len(present) + 1)) and len(present) > 1
        if self.catalog or not from_one or any(part.min() < 1 for part in labels[1:]):
            return labels
        if self.names is not None and len(self.names) > len(present):
            return labels  # the names show that class 0 has no images, which is refused later
        log.info("%s: %s from 1 to %d: assuming classes numbered from 1", self.path, keys, len(present))
        return [part - 1 for part in labels]

    def _flat(self, key: str, array: np.ndarray, count: int) -> np.ndarray:
        """Return labels ``(n,)`` as numbers or text, from shape (n,), (n, 1) or one-hot (n, classes)."""
        if array.ndim == 2 and array.shape[0] == count and array.shape[1] > 1 and array.dtype.kind in "biuf":
            ones = array == 1
            if not ((ones.sum(1) == 1).all() and (ones | (array == 0)).all()):
                row = int(np.flatnonzero((ones.sum(1) != 1) | ~(ones | (array == 0)).all(1))[0])
                raise FileError(f"{self.path}: {key} has several columns, but row {row} is not one-hot; give labels")
            log.info("%s: %s has shape %s; assuming one-hot labels", self.path, key, array.shape)
            return ones.argmax(1)
        if array.shape not in ((count,), (count, 1)):
            raise FileError(f"{self.path}: {key} has shape {array.shape} for {count} images; ({count},) is needed")
        array = array.reshape(-1)
        if array.dtype.kind in "SU":
            return np.array(_decoded(array), dtype=np.str_)
        if array.dtype.kind not in "biuf":
            raise FileError(f"{self.path}: {key} has dtype {array.dtype}; labels must be integers from 0, or text")
        return array

    def _from_text(self, keys: str, parts: list[np.ndarray]) -> list[np.ndarray]:
        """Number text labels in the order of ``class_names``, or else of the alphabet."""
        if any(part.dtype.kind != "U" for part in parts):
            raise FileError(f"{self.path}: only one of {keys} is text; use the same labels in both")
        present = sorted(set(parts[0].tolist()))
        names = present if self.names is None else self.names
        unknown = sorted(set().union(*(part.tolist() for part in parts)) - set(names))
        if unknown:
            where = "y_train" if self.names is None else CLASS_NAMES
            raise FileError(f"{self.path}: {keys} have the label {unknown[0]!r}, which is not in {where}")
        log.info("%s: %s are text; numbered %d classes by name", self.path, keys, len(names))
        self.names = list(names)
        number = {name: label for label, name in enumerate(names)}
        return [np.array([number[name] for name in part.tolist()], dtype=np.int64) for part in parts]

    def _text(self, key: str, arrays: dict[str, np.ndarray]) -> list[str] | None:
        """Return an optional array of names, which can be printed even if their bytes are not valid UTF-8."""
        names = arrays.get(key)
        if names is None:
            return None
        if names.ndim != 1:
            raise FileError(f"{self.path}: {key} has shape {names.shape}; a list of names is needed")
        return _decoded(names)

    def check(self) -> list[str]:
        """Check the classes, and return their names, which are their numbers if the file has no valid names."""
        count = count_classes(str(self.path), self.labels[0], self.labels[1] if len(self.labels) > 1 else None)
        if self.names is None or len(self.names) != count:
            return [str(label) for label in range(count)]
        return self.names

    def digest(self) -> str:
        """Return the sha256 of the arrays, in hex."""
        digest = hashlib.sha256()
        for part, x, y in zip(PARTS, self.images, self.labels, strict=False):
            for name, array in ((f"x_{part}{tuple(x.shape)}", x.numpy()), (f"y_{part}", y)):
                digest.update(f"{name}\0{array.nbytes}\0".encode())
                digest.update(memoryview(array).cast("B"))
        return digest.hexdigest()


def _decoded(names: np.ndarray) -> list[str]:
    if names.dtype.kind == "S":
        return [name.decode("utf-8", errors="backslashreplace") for name in names]
    return [str(name).encode("utf-8", errors="backslashreplace").decode() for name in names]


def _as_bytes(array: np.ndarray, scale: float | None) -> Tensor:
    """Convert ``(n, h, w, c)`` to uint8 ``(n, c, h, w)``.

    Args:
        array: The images, of any dtype.
        scale: The factor that converts values to [0, 255]; None for uint8, which is rearranged in place.
    """
    count, height, width, channels = array.shape
    if scale is None:
        array = np.ascontiguousarray(array)
        result = array.reshape(count, channels, height, width)  # shares memory, to avoid a second copy
    else:
        result = np.empty((count, channels, height, width), np.uint8)
    for start in range(0, count, _BLOCK):
        block = array[start : start + _BLOCK].transpose(0, 3, 1, 2)
        result[start : start + _BLOCK] = block.copy() if scale is None else np.rint(block * scale)
    return torch.from_numpy(result)


def load_catalog_npz(entry: DatasetEntry, path: Path) -> tuple[ImageSet, ImageSet]:
    """Load a catalog data set from ``{name}.npz``, which may have any number of examples.

    The number of classes and the image size are those of the catalog.

    Raises:
        FileError: The file is damaged or does not fit the catalog.
    """
    data = _NpzFile(path, catalog=True)
    wanted = (entry.channels, entry.image_size, entry.image_size)
    found = tuple(data.images[0].shape[1:])
    if found != wanted:
        raise FileError(f"{path}: has images (c, h, w) = {found}; {entry.name} has {wanted}")
    for part, label in zip(PARTS, data.labels, strict=True):
        if label.max() >= entry.num_classes:
            raise FileError(
                f"{path}: y_{part} has the label {label.max()}; {entry.name} has classes 0 to {entry.num_classes - 1}"
            )
    names = data.names if data.names is not None and len(data.names) == entry.num_classes else None
    train, test = (
        ImageSet(entry, part, storage, torch.from_numpy(label), names, files=listed)
        for part, storage, label, listed in zip(PARTS, data.images, data.labels, data.files, strict=True)
    )
    return train, test


def load_npz(path: Path, config: DataConfig, cache_folder: Path | None = None) -> tuple[ImageSet, ImageSet]:
    """Load own data from an npz file.

    The data set's name is the file's stem and 8 hex digits of a hash of the converted arrays.

    Args:
        path: The file.
        config: The ``image_size`` and ``channels`` to convert images to, and how to draw test examples.
        cache_folder: Not used, because nothing is decoded.

    Raises:
        FileError: The file is missing, damaged, or not in a known format.
    """
    data = _NpzFile(path)
    names, digest, drawn = data.check(), data.digest(), draw_test(path, data.labels, config)
    images = convert_all(path, data.images, config)
    return own_sets(path.stem, digest, images, data.labels, names, files=data.files, drawn=drawn)


def npz_examples(path: Path, config: DataConfig, cache_folder: Path | None) -> Examples:
    """Return the training examples of an npz file.

    Raises:
        FileError: The file is missing, damaged, or not in a known format.
    """
    data = _NpzFile(path)
    names, digest, drawn = data.check(), data.digest(), draw_test(path, data.labels, config)
    name, content = own_name(path.stem, digest), content_of(digest, drawn)
    return Examples(name, data.labels[0], names, data.files[0], drawn, lambda: own_digest(content, None))
