"""Data sets of the Hugging Face ``datasets`` package: from the hub, or offline from a local folder."""

import logging
import sys
from pathlib import Path
from typing import Any

from src.datasets.batches import ImageSet
from src.datasets.decoding import Faults, Photos, files_stamp
from src.datasets.files import Examples, FileNames
from src.datasets.own_images import load_photos, photo_examples
from src.datasets.registry import DataConfig
from src.errors import ArgumentError, FileError

TEST_SPLITS = ("test", "validation", "val", "valid")  # in order of preference
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")  # decides between several possible columns

log = logging.getLogger(__name__)


class HuggingFaceImages(Photos):
    """Images and labels of a data set, found by the types of its columns.

    The image column has the type ``Image``. The label column has the type ``ClassLabel`` or, if no column has it,
    integers or text. The training part is the split ``train``, or the only split. The test part is the first of
    ``TEST_SPLITS`` that is labeled; without one, there is none.

    Args:
        text: The name of a data set on the hub, or a local folder (parquet files, an ``imagefolder``, or the result
            of ``save_to_disk``), and optionally a colon and a configuration.

    Raises:
        ArgumentError: The package is not installed.
        FileError: The data set cannot be loaded, or its columns or splits are unclear.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.splits, self.root, self.stem, self.place = _open(text)
        self.faults = Faults(self.root)
        self.parts = ("train",)
        splits = {"train": self._training_split()}
        self.image, self.label = self._columns(splits["train"])
        values = {"train": self._values(splits["train"])}
        if None in values["train"]:
            raise self._fault(f"{self.label} has no value for some training examples")
        for name in TEST_SPLITS:
            if name in self.splits and self.splits[name] is not splits["train"]:
                found = self._values(self.splits[name])
                if None not in found and -1 not in found:  # the labels of published test splits are often missing
                    log.info("hf:%s: using the split %s for testing", text, name)
                    self.parts, splits["test"], values["test"] = ("train", "test"), self.splits[name], found
                    break
                log.info("hf:%s: not using the split %s, because its examples have no labels", text, name)
        self._number(splits["train"].features[self.label], values)
        self._encoded = {part: self._undecoded(split) for part, split in splits.items()}
        self.files = {part: [(part, row) for row in range(len(split))] for part, split in self._encoded.items()}

    def _fault(self, message: str) -> FileError:
        return FileError(f"hf:{self.text}: {message}")

    def _training_split(self) -> Any:
        if "train" in self.splits:
            return self.splits["train"]
        if len(self.splits) > 1:
            raise self._fault(f"has no split train, only {', '.join(self.splits)}; rename one of them")
        return next(iter(self.splits.values()))

    def _columns(self, split: Any) -> tuple[str, str]:
        """Return the names of the image column and of the label column."""
        import datasets

        features = split.features
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        if len(images) != 1:
            found = f"the image columns {', '.join(images)}" if images else f"only the columns {', '.join(features)}"
            raise self._fault(f"has {found}; exactly one column of type Image is needed")
        labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        if not labels:
            dtypes = {name: getattr(kind, "dtype", "") for name, kind in features.items() if name not in images}
            labels = [name for name, kind in dtypes.items() if "int" in str(kind) or "string" in str(kind)]
        preferred = [name for name in LABEL_COLUMNS if name in labels]
        if len(labels) > 1 and preferred:
            labels = preferred[:1]
        if len(labels) != 1:
            raise self._fault(
                f"has {', '.join(labels) or 'no columns'} that may be labels; exactly one column of type ClassLabel "
                f"is needed, or one called {LABEL_COLUMNS[0]}"
            )
        log.info("hf:%s: images in column %s, labels in column %s", self.text, images[0], labels[0])
        return images[0], labels[0]

    def _values(self, split: Any) -> list:
        if {self.image, self.label} - set(split.features):
            raise self._fault(f"a split has no column {self.image} or {self.label}; all need the same columns")
        return split.select_columns(self.label)[:][self.label]

    def _number(self, feature: Any, values: dict[str, list]) -> None:
        """Set the class names and the labels. Classes without training examples are left out."""
        present = sorted(set(values["train"]))
        known = getattr(feature, "names", None)
        unknown = sorted(set().union(*values.values()) - set(present))
        names = [str(value) if known is None else known[value] for value in (*present, *unknown)]
        if unknown:
            raise self._fault(f"the class {names[-1]} has test images, but no training images")
        if len(present) < 2:
            raise self._fault(f"has only class {names[0] if names else ''}; at least two classes are needed")
        if known is not None and len(known) > len(present):
            log.info("hf:%s: %d of %d classes have images; the others are left out",
                     self.text, len(present), len(known))  # fmt: skip
        number = {value: label for label, value in enumerate(present)}
        self.names = names
        self.labels = {part: [number[value] for value in column] for part, column in values.items()}

    def _undecoded(self, split: Any) -> Any:
        import datasets

        return split.select_columns(self.image).cast_column(self.image, datasets.Image(decode=False))

    def relative(self, item: tuple[str, int]) -> str:
        """Return the part and row of an item."""
        return f"{item[0]}/{item[1]}"

    def read(self, item: tuple[str, int]) -> bytes:
        """Return an item's encoded image."""
        part, row = item
        found = self._encoded[part][row][self.image]
        if found is None:
            raise ValueError("has no image")
        return found["bytes"] if found["bytes"] is not None else Path(found["path"]).read_bytes()

    def _paths(self, part: str) -> list[str] | None:
        """Return the paths that the data set stores for its images; None if some are missing."""
        column = f"{self.image}.path"
        found = self._encoded[part].flatten().select_columns(column)[:][column]
        return None if None in found else found

    def file_names(self, part: str) -> FileNames | None:
        """Return the paths relative to the folder; None if some are missing, or not unique even with their class."""
        paths = self._paths(part)
        if paths is None:
            return None
        inside = [Path(path).is_relative_to(self.root) for path in paths]
        if all(inside):
            return FileNames(self.root, [Path(path).relative_to(self.root).as_posix() for path in paths])
        names = [Path(path).name for path in paths]
        if len(set(names)) < len(names):
            names = [f"{self.names[label]}/{name}" for label, name in zip(self.labels[part], names, strict=True)]
        return FileNames(self.root, names) if len(set(names)) == len(names) else None

    def stamp(self) -> tuple[int, str | None]:
        """Return the size of the tables or of the files that they list, and a digest that changes when they do."""
        paths = [path for part in self.parts for path in self._paths(part) or [""]]
        if all(Path(path).is_absolute() and Path(path).is_file() for path in paths):
            return files_stamp((path, Path(path)) for path in paths)
        splits = [self._encoded[part] for part in self.parts]
        return sum(split.data.nbytes for split in splits), "\0".join(split._fingerprint for split in splits)


def _open(text: str) -> tuple[dict[str, Any], Path, str, str]:
    """Return the splits by name, the root folder, the stem of the data set's name, and what identifies its cache."""
    try:
        import datasets
        from datasets import load_dataset, load_from_disk  # fails if a folder called datasets was imported
    except ImportError as error:
        raise ArgumentError(
            "dataset",
            f"hf:{text}: needs Hugging Face's package datasets; run pip install -r requirements-hf.txt",
        ) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    name, colon, config = text.rpartition(":")
    if not colon or Path(text).exists():
        name, config = text, ""
    folder = Path(name).expanduser()
    local = folder.is_dir()
    try:
        if local and ((folder / "dataset_dict.json").exists() or (folder / "state.json").exists()):
            found = load_from_disk(str(folder))
        else:
            found = load_dataset(str(folder) if local else name, config or None)
    except MemoryError:
        raise
    except Exception as error:  # the package and its parsers raise almost any exception
        reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
        raise FileError(
            f"hf:{text}: cannot be loaded ({reason}); give a data set of the hub, or a folder with parquet files or "
            "images"
        ) from error
    splits = dict(found) if isinstance(found, dict) else {"train": found}
    root = folder.resolve() if local else Path(f"hf:{text}")
    stem = f"{root.name if local else name}{'-' if config else ''}{config}"
    return splits, root, stem, f"hf:{root if local else name}:{config}"


def load_hf(path: Path, config: DataConfig, cache_folder: Path) -> tuple[ImageSet, ImageSet]:
    """Load a data set of Hugging Face; see ``HuggingFaceImages`` and ``load_photos``.

    Raises:
        ArgumentError: The package is not installed.
        FileError: The data set cannot be loaded, is unclear, or has images that cannot be read.
    """
    return load_photos(HuggingFaceImages(str(path)), config, cache_folder)


def hf_examples(path: Path, config: DataConfig, cache_folder: Path | None) -> Examples:
    """Return the training examples of a data set of Hugging Face, without decoding the images.

    Raises:
        ArgumentError: The package is not installed.
        FileError: The data set cannot be loaded, or is unclear.
    """
    return photo_examples(HuggingFaceImages(str(path)), config, cache_folder)
