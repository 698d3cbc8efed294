"""From an example to its file: file names, tables of scores and selections, and folders of selected examples."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from src.artifacts.io import label_hash, link, write_csv
from src.errors import FileError

if TYPE_CHECKING:
    from src.datasets.batches import ImageSet


def printable(name: str) -> str:
    r"""Return a file name that can be printed: bytes that are not valid UTF-8 are escaped, for example ``\xff``."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


class FileNames(Sequence):
    """The files of a full training or test set, by original index.

    ``names[i]`` is the printable name of the file of example i, relative to the root.

    Args:
        root: The folder that contains the files, or the archive.
        names: Their paths relative to the root, as text, or as an array of bytes, which takes less memory.
    """

    def __init__(self, root: Path, names: Sequence[str] | np.ndarray) -> None:
        self.root = root
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> str:
        return printable(os.fsdecode(self._names[index]))

    def of(self, indices: np.ndarray) -> FileNames:
        """Return the names of some examples, as those of a set of their own."""
        return FileNames(self.root, [self._names[index] for index in indices])

    def relative(self, path: str) -> str:
        """Return a path, absolute or relative to the current folder, as a name relative to the root."""
        return Path(os.path.relpath(path, self.root)).as_posix() if path else ""

    def path(self, index: int) -> Path | None:
        """Return the path of an example's file; None if the files are in an archive."""
        path = self.root / os.fsdecode(self._names[index])
        return path if path.is_file() else None


@dataclass(frozen=True)
class Examples:
    """The examples of a full training set, without their images.

    Attributes:
        name: The data set's name in file names.
        labels: int64 ``(total,)``.
        class_names: One name per class.
        files: The file of each example; None if the images do not come from single files.
        drawn: The examples drawn for testing, int64 ``(m,)``, which are not for training; None if there are none.
        find_digest: Returns ``digest``. May decode the images.
    """

    name: str
    labels: np.ndarray
    class_names: Sequence[str]
    files: FileNames | None = None
    drawn: np.ndarray | None = None
    find_digest: Callable[[], str | None] = lambda: None

    @cached_property
    def digest(self) -> str | None:
        """The digest that identifies the images, as ``ImageSet.digest``; None if unknown."""
        return self.find_digest()

    @cached_property
    def label_hash(self) -> str:
        """The hash of the labels."""
        return label_hash(self.labels)

    def columns(self, index: int) -> dict[str, Any]:
        """Return the first columns of a table for one example: index, file and class."""
        file = "" if self.files is None else self.files[index]
        return {"index": index, "file": file, "class": self.class_names[self.labels[index]]}


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank scores ``(n,)``: 1 is the highest, equal scores have the same rank, and 0 means NaN."""
    ordered = np.sort(-scores)  # NaN comes last
    return np.where(np.isnan(scores), 0, np.searchsorted(ordered, -scores) + 1)


def write_score_table(path: Path, scores: np.ndarray, examples: Examples | None) -> Path:
    """Write scores as a csv file, most atypical first, next to the pickle of the same name.

    The columns are index, file, class, score, rank (1 is the most atypical example) and rank within class. Equal
    scores have the same rank, the best of them, and are listed by index.

    Args:
        path: The path of the pickle or of the csv file.
        scores: float64 ``(total,)``, NaN for examples without a score, which are left out.
        examples: The training examples; None if they are not at hand, which leaves file, class and rank within class
            empty.

    Returns:
        The path of the csv file.
    """
    order = np.argsort(-scores, kind="stable")[: np.count_nonzero(~np.isnan(scores))].tolist()
    rank, within = ranks(scores), np.zeros(len(scores), np.int64)
    if examples is not None:
        for label in np.unique(examples.labels):
            members = np.flatnonzero(examples.labels == label)
            within[members] = ranks(scores[members])
    rows = []
    for index in order:
        row = {"index": index, "file": "", "class": ""} if examples is None else examples.columns(index)
        row |= {"score": float(scores[index]), "rank": int(rank[index])}
        rows.append({**row, "rank within class": "" if examples is None else int(within[index])})
    return write_csv(path.with_suffix(".csv"), rows)


def write_selection_table(path: Path, chosen: ImageSet, weights: np.ndarray) -> Path:
    """Write selected examples as a csv file with the columns index, file, class and weight.

    Args:
        path: The path of the selection's npz file or of the csv file.
        chosen: The selected examples.
        weights: Their weights ``(m,)``.

    Returns:
        The path of the csv file.
    """
    rows = []
    pairs = zip(chosen.indices.tolist(), chosen.labels.tolist(), weights.tolist(), strict=True)
    for index, label, weight in pairs:
        file = "" if chosen.files is None else chosen.files[index]
        rows.append({"index": index, "file": file, "class": chosen.class_names[label], "weight": weight})
    return write_csv(path.with_suffix(".csv"), rows)


def require_new_folder(folder: Path) -> None:
    """Check that a folder does not exist or is empty, so that writing it replaces nothing.

    Raises:
        FileError: It is a file, or a folder with contents.
    """
    try:
        used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise FileError(f"{folder}: cannot be read ({error.strerror})") from error
    if used:
        raise FileError(f"{folder}: exists already; choose a new or empty folder")


def materialize(chosen: ImageSet, folder: Path) -> Path:
    """Write examples as a folder with one folder per class, which other programs read.

    Images that come from single files are hard links to them, or copies where links are not possible; the files keep
    their names. All others are written as PNG files named by index. The class folders appear once all are complete.

    Args:
        chosen: The examples.
        folder: The folder to write.

    Returns:
        The folder.

    Raises:
        FileError: The folder exists and is not empty, or it cannot be written.
    """
    import torch
    from PIL import Image

    require_new_folder(folder)
    folder = folder.resolve()  # the current folder has no name of its own
    partial = folder.with_name(f".{folder.name}.part")
    files, classes = chosen.files, _folder_names(chosen.class_names)
    digits = len(str(chosen.total - 1))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for position, (index, label) in enumerate(zip(chosen.indices.tolist(), chosen.labels.tolist(), strict=True)):
            place = partial / classes[label]
            place.mkdir(exist_ok=True)
            source = None if files is None else files.path(index)
            if source is not None:
                # the link's target, because a hard link to a relative symbolic link would point elsewhere
                name = f"{index}_{source.name}" if (place / source.name).exists() else source.name
                link(source.resolve(), place / name)
                continue
            image = chosen.fetch(torch.tensor([position]))[0].cpu().permute(1, 2, 0).numpy()
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(place / f"{index:0{digits}}.png")
        folder.mkdir(exist_ok=True)  # an empty folder is filled, not replaced: a shell may be in it
        for place in partial.iterdir():
            place.rename(folder / place.name)
    except OSError as error:
        raise FileError(
            f"{folder}: could not be written ({error.strerror}); free disk space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _folder_names(classes: Sequence[str]) -> list[str]:
    """Return a folder name for each class. Names that a file system refuses are changed, and kept distinct."""
    names = [re.sub(r"[/\0]", "_", name) for name in classes]
    names = [f"_{name}" if name.startswith(".") or not name else name for name in names]
    return [f"{label}_{name}" if names.count(name) > 1 else name for label, name in enumerate(names)]


def short_name(file: str, length: int = 14) -> str:
    """Return the last part of a file's name, shortened in the middle to at most ``length`` characters."""
    name = PurePosixPath(file).name
    head = length // 4  # file names usually differ at their end
    return name if len(name) <= length else f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"
