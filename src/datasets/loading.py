"""From a name to a training and a test part. Torch is imported by who loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from src.datasets.catalogue import CATALOGUE, DatasetEntry, lookup
from src.errors import ArgumentError, FileError
from src.lazy import later

if TYPE_CHECKING:
    from src.datasets.images import ImageSet

    Parts = tuple[ImageSet, ImageSet]

# Who loads a catalogue entry, by its source; the folder is {datasets_folder}/{name}.
SOURCES: dict[str, Callable[[DatasetEntry, Path], Parts]] = {
    "digits": later("src.datasets.digits", "load_digits"),
    "torchvision": later("src.datasets.vision", "load_vision"),
    "tiny_imagenet": later("src.datasets.tiny_imagenet", "load_tiny_imagenet"),
    "imagenet": later("src.datasets.imagenet", "load_imagenet"),
}

# Who loads own data, by the word before the colon.
OWN_SOURCES: dict[str, Callable[[Path, int | None, int | None], Parts]] = {
    "npz": later("src.datasets.own", "load_npz"),
    "folder": later("src.datasets.own", "load_folder"),
}

_load_catalogue_npz = later("src.datasets.own", "load_catalogue_npz")


def dataset_name(text: str) -> str:
    """The name in file names of a data set.

    Args:
        text: What ``load_dataset`` takes, or such a name. Own data (``npz:FILE``, ``folder:DIR``) are read, as their
            name depends on their content.

    Raises:
        ArgumentError: It is none of these.
        FileError: Own data are missing, damaged, or not as they should be.
    """
    if text.partition(":")[0] in OWN_SOURCES and ":" in text:
        # of a small size, on which the name does not depend: images that are not square cannot be loaded without
        return load_dataset(text, ".", image_size=8)[0].entry.name
    if text.lower() in CATALOGUE:
        return text.lower()
    if not text or text.startswith(".") or ":" in text or Path(text).name != text:
        names = ", ".join(CATALOGUE)
        raise ArgumentError(
            "dataset", f"{text!r}: is not the name of a data set; give one of {names}, npz:FILE or folder:DIR"
        )
    return text


def check_arguments(name: str, image_size: int | None, channels: int | None) -> None:
    """Stop at arguments of ``load_dataset`` that are wrong whatever the files contain.

    Raises:
        ArgumentError: The name is unknown, or an argument does not apply to it.
    """
    if image_size is not None and image_size < 1:
        raise ArgumentError("image_size", f"{image_size}: must be at least 1")
    if channels not in (None, 1, 3):
        raise ArgumentError("channels", f"{channels}: must be 1 (gray) or 3 (color)")
    kind, colon, path = name.partition(":")
    if colon and kind in OWN_SOURCES:
        if not path:
            raise ArgumentError("dataset", f"{name}: no path after the colon; npz:FILE or folder:DIR is needed")
        return
    entry = lookup(name)
    for option, value, fixed in (
        ("image_size", image_size, entry.image_size),
        ("channels", channels, entry.channels),
    ):
        if value not in (None, fixed):
            raise ArgumentError(
                option, f"{value}: applies to own data (npz:FILE, folder:DIR); {entry.name} has {fixed}"
            )


def load_dataset(
    name: str, folder: str | Path, *, image_size: int | None = None, channels: int | None = None
) -> tuple[ImageSet, ImageSet]:
    """Load a data set.

    A catalogue name is read from ``{folder}/{name}.npz`` if that exists (of any length), else from its source
    under ``{folder}/{name}/``, which downloads what is missing. ``npz:FILE`` and ``folder:DIR`` are own data.

    Args:
        name: A catalogue name in either case, ``npz:FILE`` or ``folder:DIR``.
        folder: The folder of data sets.
        image_size: Own data only: resize to this height and width.
        channels: Own data only: turn into grey (1) or colour (3).

    Returns:
        The training and the test part.

    Raises:
        ArgumentError: The name is unknown, or an argument does not apply to it.
        FileError: The data are missing, damaged, or not as they should be.
    """
    check_arguments(name, image_size, channels)
    kind, colon, path = name.partition(":")
    if colon and kind in OWN_SOURCES:
        return _together(OWN_SOURCES[kind](Path(path).expanduser(), image_size, channels))
    entry = lookup(name)
    folder = Path(folder)
    local = folder / f"{entry.name}.npz"
    try:
        return _together(
            _load_catalogue_npz(entry, local) if local.exists() else SOURCES[entry.source](entry, folder / entry.name)
        )
    except OSError as error:
        raise FileError(
            f"{folder}: {entry.name} could not be read or made there ({error.strerror or error})"
        ) from error


def _together(parts: Parts) -> Parts:
    """Both parts, with what identifies their images."""
    from src.datasets.images import Content

    content = Content(*parts)
    for part in parts:
        part.content = content
    return parts
