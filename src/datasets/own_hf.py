"""Data sets of the Hugging Face ``datasets`` package: from the hub, or offline from a local folder."""

import logging
import sys
from pathlib import Path
from typing import Any

from src.datasets.decoding import Faults, Photos, files_stamp
from src.datasets.files import FileNames
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
        path: The name of a data set on the hub, or a local folder (parquet files, an ``imagefolder``, or the result
            of ``save_to_disk``), and optionally a colon and a configuration.

    Raises:
        ArgumentError: The package is not installed.
        FileError: The data set cannot be loaded, or its columns or splits are unclear.
    """

    def __init__(self, path: Path) -> None:
        self.text = text = str(path)
        self.splits, self.root, self.stem, self.place = _open(text)
        self.faults = Faults(self.root)
        self.parts = ("train",)
        splits = {"train": self._training_split()}
        self.image, self.label = self._columns(splits["train"])
        values = {"train": self._values(splits["train"])}
        feature = splits["train"].features[self.label]
        # the package stores -1 for a missing class, but integer labels may be -1 and 1
        missing = {None, -1} if hasattr(feature, "names") else {None}
        if missing & set(values["train"]):
            raise self._fault(f"{self.label} has no value for some training examples; remove them or label them")
        missing = {None, -1} - set(values["train"])
        for name in TEST_SPLITS:
            if name in self.splits and self.splits[name] is not splits["train"]:
                found = self._values(self.splits[name])
                if not missing & set(found):  # the labels of published test splits are often missing
                    log.info("hf:%s: using the split %s for testing", text, name)
                    self.parts, splits["test"], values["test"] = ("train", "test"), self.splits[name], found
                    break
                log.info("hf:%s: not using the split %s, because its examples have no labels", text, name)
        self._number(feature, values)
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
        """Return the part, class and row of an item. The digest of the data set therefore covers all labels."""
        part, row = item
        return f"{part}/{self.names[self.labels[part][row]]}/{row}"

    def read(self, item: tuple[str, int]) -> bytes:
        """Return an item's encoded image."""
        part, row = item
        found = self._encoded[part][row][self.image]
        if found is None:
            raise ValueError("has no image")
        return found["bytes"] if found["bytes"] is not None else Path(found["path"]).read_bytes()

    def _paths(self, part: str) -> list[str | None]:
        """Return the path that the data set stores for each image."""
        column = f"{self.image}.path"
        return self._encoded[part].flatten().select_columns(column)[:][column]

    def file_names(self, part: str) -> FileNames | None:
        """Return the paths relative to the folder; None if some are missing, or not unique even with their class."""
        paths = self._paths(part)
        if None in paths:
            return None
        inside = [Path(path).is_relative_to(self.root) for path in paths]
        if all(inside):
            return FileNames(self.root, [Path(path).relative_to(self.root).as_posix() for path in paths])
        names = [Path(path).name for path in paths]
        if len(set(names)) < len(names):
            names = [f"{self.names[label]}/{name}" for label, name in zip(self.labels[part], names, strict=True)]
        return FileNames(self.root, names) if len(set(names)) == len(names) else None

    def stamp(self) -> tuple[int, str | None]:
        """Return the size of the tables, or of the files if they only list files, and a digest of these."""
        splits = [self._encoded[part] for part in self.parts]
        size, rows = sum(split.data.nbytes for split in splits), sum(len(split.data) for split in splits)
        columns = [split.flatten().data.column(f"{self.image}.bytes") for split in splits]
        outside = sum(column.null_count for column in columns)  # images that are not in the tables
        if not outside:
            return size, "\0".join(split._fingerprint for split in splits)
        paths = [path for part in self.parts for path in self._paths(part)]
        if outside < rows or None in paths or not all(Path(path).is_file() for path in paths):
            return size, None
        names = map(self.relative, self.all_files())
        return files_stamp((name, Path(path)) for name, path in zip(names, paths, strict=True))


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
