"""Read stored scores: ``Proxy`` by name and data set, ``Memorization`` from one npz file. Fetch published files.

>>> Proxy("samis_loss", "digits").get_sorted_indices()[-5:]  # the five most atypical examples
"""

import csv
import glob
import hashlib
import logging
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from src.artifacts import paths, store
from src.artifacts.io import save_figure, write_with
from src.artifacts.paths import Folders
from src.artifacts.store import REPLACE, record_path
from src.cli import option
from src.datasets import DATASETS, dataset_flag, dataset_name
from src.errors import ArgumentError, FileError
from src.metrics.registry import (
    SCORES,
    SearchFolders,
    get_score,
    registered_scores,
    score_entry,
    search_folders,
)
from src.metrics.score import Score, warn_if_not_learned

log = logging.getLogger(__name__)

_RECIPES = {
    "pair": (
        "create it with compute_sam_sgd.py and average_scores.py "
        "--dataset {dataset} --model MODEL --seeds SEEDS --modes {mode}"
    ),
    "dynamics": (
        "create it with train_full.py --measure_proxies and average_scores.py "
        "--dataset {dataset} --model MODEL --seeds SEEDS --modes {mode}"
    ),
    "mpe": "create it with the scripts in examples/",
    "audit": "create it with audit_labels.py --dataset {dataset}",
    "registered": (
        "add it with register_score.py FILE --mode {mode} --dataset {dataset} --high atypical (typical: high "
        "values are typical)"
    ),
    "members": "create it with compute_memorization.py --dataset {dataset} --model MODEL --members 200",
}
_RECIPES["end"] = _RECIPES["dynamics"]


def min_max(scores: np.ndarray) -> np.ndarray:
    """Min-max scaling ``(x - min) / (max - min)``, ignoring NaN; all zeros if the scores are constant.

    Args:
        scores: ``(n,)``, at least one of them not NaN.
    """
    low, high = np.nanmin(scores), np.nanmax(scores)
    if high / 2 - low / 2 > np.finfo(np.float64).max / 2:  # high - low would overflow
        scores, low, high = scores / 2, low / 2, high / 2
    return (scores - low) / (high - low) if high > low else scores - low


def shares(scores: np.ndarray) -> np.ndarray:
    """Each score's fraction of the sum, ``x / sum x``, ignoring NaN. Scores may be all zeros.

    Args:
        scores: ``(n,)``.
    """
    largest = np.nanmax(np.abs(scores), initial=0.0)
    if largest > np.finfo(np.float64).max / max(len(scores), 1):  # the sum could overflow
        scores = scores / largest
    return scores / (np.nansum(scores) or 1.0)


class StoredScores:
    """Scores by index, with the interface of the papers' ``Proxy`` and ``Memorization`` classes.

    Attributes:
        scores: float64 ``(n,)`` by original index; NaN for examples without a score.
        indices: int64, the scored indices in ascending order.
        path: The file that was read.
        label: The score's symbol, for figures.
        title: The names of the score and the data set, for figures.
    """

    def __init__(self, scores: np.ndarray, path: str | Path, label: str, title: str, plots: str | Path) -> None:
        self.scores = scores
        self.indices = np.flatnonzero(~np.isnan(scores))
        self.path = Path(path)
        self.label = label
        self.title = title
        self._plots = Path(plots)
        # NaN sorts last. A stable sort breaks ties by index.
        self._order = np.argsort(scores, kind="stable")[: len(self.indices)]

    def __len__(self) -> int:
        return len(self.scores)

    def get(self, idx: Any) -> Any:
        """Return the score at an index, or the scores at any numpy index (a slice, a list, a mask)."""
        return self.scores[idx]

    def full_list(self) -> list[float]:
        """Return all scores by index, as a Python list."""
        return self.scores.tolist()

    def get_dict_form(self, sort: bool = True) -> dict[int, float]:
        """Return a dict index -> score of the scored examples.

        Args:
            sort: Whether to order the dict by ascending score (ties broken by index) instead of by index.
        """
        order = self._order if sort else self.indices
        return dict(zip(order.tolist(), self.scores[order].tolist(), strict=True))

    def get_sorted_indices(self, idx: Any = None) -> Any:
        """Return the scored indices in ascending order of score (ties broken by index).

        Args:
            idx: Positions in the sorted order to return; None for all.
        """
        return self._order.copy() if idx is None else self._order[idx]

    def check(
        self, n: int | None = None, label_hash: str | None = None, data_hash: str | None = None
    ) -> "StoredScores":
        """Check that these scores belong to a data set with ``n`` examples and these labels and images.

        Returns:
            self, for chaining.

        Raises:
            FileError: The length differs, or a recorded hash differs.
        """
        store.check_score_data(self.path, self.scores, n, label_hash, data_hash)
        return self

    def _chosen(self, idx: Any) -> tuple[np.ndarray, np.ndarray]:
        """The indices and scores to plot."""
        indices = self.indices if idx is None else np.atleast_1d(np.arange(len(self))[idx])
        indices = indices[~np.isnan(self.scores[indices])]
        return indices, self.scores[indices]

    def _stem(self, folder: str | Path | None, idx: Any, name: str) -> Path:
        return Path(folder or self._plots) / (f"all_{name}" if idx is None else name)

    def plot_scores_hist(self, idx: Any = None, folder: str | Path | None = None) -> list[Path]:
        """Plot a histogram with 50 bins as PNG and PDF, named ``all_scores_hist`` (``scores_hist`` for a subset).

        Args:
            idx: The indices to plot; None for all.
            folder: The output folder; by default ``proxies/{dataset}/{mode}`` in the plots folder.

        Returns:
            The paths of the two files.
        """
        from src.metrics import plots  # imported here because matplotlib takes a second to import

        figure = plots.histogram(self._chosen(idx)[1], self.label, self.title)
        return save_figure(figure, self._stem(folder, idx, "scores_hist"))

    def plot_scores_kde(self, idx: Any = None, folder: str | Path | None = None) -> list[Path]:
        """Plot a filled kernel density estimate as ``all_scores_distribution`` (``scores_distribution``)."""
        from src.metrics import plots

        figure = plots.density(self._chosen(idx)[1], self.label, self.title)
        return save_figure(figure, self._stem(folder, idx, "scores_distribution"))

    def plot_prob_dist(self, idx: Any = None, plot: str = "scatter", folder: str | Path | None = None) -> list[Path]:
        """Plot each example's fraction of the total score against its index as ``all_prob_dist`` (``prob_dist``).

        Args:
            idx: The indices to plot; None for all. Fractions are always relative to the sum over all examples.
            plot: ``"scatter"`` or ``"line"``.
            folder: The output folder.
        """
        from src.metrics import plots

        indices, _ = self._chosen(idx)
        figure = plots.share_figure(indices, shares(self.scores)[indices], self.label, self.title, plot)
        return save_figure(figure, self._stem(folder, idx, "prob_dist"))


@dataclass(frozen=True)
class ScoreConfig:
    """Where to search for stored scores.

    Attributes:
        scores_folder: Folders, or MODE=FOLDER for a single score; see :func:`score_folders`.
    """

    scores_folder: list[str] = option(
        [],
        "folder to read score files from, for all scores or only for score MODE; repeatable "
        "(default: --metrics_folder if given, otherwise metrics/, then src/metrics/)",
        action="append",
        metavar="DIR|MODE=DIR",
    )


def score_folders(given: Sequence[str], mode: str, metrics_folder: Path | None = None) -> list[Path] | None:
    """The folders to search for a score's files, in search order.

    Folders given for this score come before folders given for all scores. If any folder is given, the default folders
    are not searched: scores found there are not the ones the user asked for.

    Args:
        given: Folders, or ``MODE=FOLDER`` for a single score.
        mode: The score.
        metrics_folder: Searched last, unless it is the default of ``Folders``.

    Returns:
        The folders; None if none was given, which means the default folders.

    Raises:
        ArgumentError: A given folder does not exist, or its score is unknown.
    """
    general, own = [], []
    for text in given:
        if Path(text).is_dir():  # a folder name may contain "="
            general.append(Path(text))
            continue
        name, separator, folder = text.partition("=")
        if separator and name not in SCORES and name not in registered_scores(folder):
            raise ArgumentError(
                "scores_folder",
                f"{text}: no such folder, and no score named {name!r}; choose from {', '.join(SCORES)}, or a score "
                "registered in this folder",
            )
        path = Path(folder if separator else text)
        if not path.is_dir():
            raise ArgumentError("scores_folder", f"{text}: folder {path} does not exist")
        if name == mode:
            own.append(path)
    chosen = [*own, *general]
    if (
        metrics_folder is not None and metrics_folder is not Folders.metrics_folder
    ):  # `is not`: a given folder counts even if it equals the default
        chosen.append(metrics_folder)
    return chosen or None


def given_folders(given: Sequence[str], metrics_folder: Path | None = None) -> list[Path] | None:
    """All folders of :func:`score_folders`, for any score; None if none was given."""
    names = dict.fromkeys(text.partition("=")[0] for text in given if not Path(text).is_dir())
    found = [score_folders(given, name, metrics_folder) or [] for name in (*names, "")]
    return list(dict.fromkeys(folder for folders in found for folder in folders)) or None


def recipe(score: Score, dataset: str, folder: str | Path = paths.PACKAGED_SCORES) -> str:
    """Say how to get a score file for this data set: the command that creates it, or where to download it.

    Args:
        score: The score.
        dataset: The data set's name in file names.
        folder: The metrics folder in which the file is missing.
    """
    own = _RECIPES[score.source].format(mode=score.name, dataset=dataset_flag(dataset))
    if score.published_file:
        own += (
            f", or store your own estimates there ({score.published_path('', dataset).name} with an array tr_mem); "
            "Feldman and Zhang's estimates for cifar100 and imagenet are at "
            "https://pluskid.github.io/influence-memorization/"
        )
    if dataset not in published_datasets(score.name):
        return own
    target = "" if Path(folder) == paths.PACKAGED_SCORES else f" --folder={shlex.quote(str(folder))}"
    command = f"fetch_scores.py --dataset {dataset} --modes {score.name}{target}"
    return f"download the published scores with {command}, or {own}"


class Proxy(StoredScores):
    """The averaged scores of one mode for one data set. High means atypical.

    Args:
        mode: A key of ``SCORES``, or a score registered in one of the folders.
        dataset: The value of ``--dataset``, or the data set's name in file names. For the user's own data, the hash
            at the end of that name may be omitted if only one file matches.
        normalize: Whether to scale the scores to [0, 1].
        folder: A metrics folder, or several in search order; only these are searched. By default ``metrics/``, then
            the packaged scores.
        n: The expected number of examples; a file for a different number is refused.
        label_hash: The expected label hash; a file recorded for different labels is refused.
        data_hash: The expected image hash (``ImageSet.digest``); a file recorded for different images is refused.

    Attributes:
        mode: The mode's name.
        dataset: The data set's name in file names.
        record: How the file was made, from the json file next to it.

    Raises:
        ArgumentError: The mode does not exist.
        FileError: The file is missing (the message says how to get it), damaged, incomplete, or for other data.
    """

    def __init__(
        self,
        mode: str = "mem",
        dataset: str = "cifar100",
        normalize: bool = True,
        folder: SearchFolders = None,
        *,
        n: int | None = None,
        label_hash: str | None = None,
        data_hash: str | None = None,
    ) -> None:
        folders = search_folders(folder)
        kind = get_score(mode, folders)
        path, dataset = _find(mode, dataset, folders)
        log.info("%s scores of %s: read from %s", mode, dataset, path)
        # As in the papers' class, unnormalized memorization is a fraction of the sum; min-max scaling cancels this.
        raw = shares(store.read_memorization(path)) if path.suffix == ".npz" else store.read_scores(path)
        plots = paths.ROOT / "plots" / "proxies" / dataset / mode
        super().__init__(min_max(raw) if normalize else raw, path, kind.symbol, f"{kind.title}, {dataset}", plots)
        self.mode = mode
        self.dataset = dataset
        self.record = store.read_record(path)
        if self.record.get("mode", mode) != mode:
            raise FileError(f"{path}: contains {self.record['mode']} scores, not {mode}; it was copied or renamed")
        self.check(n, label_hash, data_hash)
        warn_if_not_learned([kind], _lowest(self.record.get("training_accuracy")), path)


def _lowest(accuracies: Any) -> float | None:
    """The lowest known training accuracy of the averaged seeds; None if none is known."""
    known = [value for value in accuracies or () if isinstance(value, int | float)]
    return min(known, default=None)


class Memorization(StoredScores):
    """Raw memorization scores from one npz file, with :meth:`get_prob` and :meth:`full_prob`.

    Args:
        file: The npz file with an array ``tr_mem``.

    Raises:
        FileError: The file is missing, damaged, or has no ``tr_mem``.
    """

    def __init__(self, file: str | Path) -> None:
        kind = get_score("mem")
        dataset = Path(file).name.split("_infl_matrix")[0]
        if not Path(file).exists():
            raise FileError(f"{file}: memorization file not found; {recipe(kind, dataset)}")
        plots = paths.ROOT / "plots" / "proxies" / dataset / "mem"
        super().__init__(store.read_memorization(file), file, kind.symbol, f"{kind.title}, {dataset}", plots)
        self._prob = shares(self.scores)

    def get_prob(self, idx: Any) -> Any:
        """Return the fraction of the total score at an index, or at any numpy index."""
        return self._prob[idx]

    def full_prob(self) -> list[float]:
        """Return each example's fraction of the total score by index, as a Python list."""
        return self._prob.tolist()


def find_score_file(mode: str, dataset: str, folder: SearchFolders = None) -> Path:
    """Find the file that :class:`Proxy` reads.

    Args:
        mode: See :class:`Proxy`.
        dataset: See :class:`Proxy`.
        folder: See :class:`Proxy`.

    Raises:
        FileError: No file matches (the message lists the searched folders and says how to get one), or several data
            sets match the name.
    """
    return _find(mode, dataset, folder)[0]


def _find(mode: str, dataset: str, folder: SearchFolders) -> tuple[Path, str]:
    """The score file, and the data set's name in its file name."""
    folders = search_folders(folder)
    score, dataset = get_score(mode, folders), dataset_name(dataset)
    for place in folders:
        for path in (score.path(place, dataset), score.published_path(place, dataset)):
            if path.exists():
                return path, dataset
    for place in folders if dataset not in DATASETS else ():
        full = _own_data(score, place, dataset)
        if len(full) > 1:
            raise FileError(
                f"{place}: has {score.title} scores of {len(full)} data sets named {dataset}; "
                f"choose from {', '.join(full)}"
            )
        if full:
            own, published = score.path(place, full[0]), score.published_path(place, full[0])
            return own if own.exists() else published, full[0]
    raise _missing(score, dataset, folders)


def _own_data(score: Score, folder: Path, stem: str) -> list[str]:
    """The user's data sets with scores whose name is this stem followed by eight hex digits of a content hash."""
    found = set()
    for path_in in (score.path, score.published_path):
        pattern = path_in(folder, glob.escape(f"{stem}-") + 8 * "[0-9a-f]")
        start = path_in(folder, "|").name.index("|")
        found |= {path.name[start : start + len(stem) + 9] for path in pattern.parent.glob(pattern.name)}
    return sorted(found)


def _missing(score: Score, dataset: str, folders: list[Path]) -> FileError:
    """The error for scores that are in none of the folders, with instructions for getting them."""
    known = [score_entry(name) for name in (*SCORES, *registered_scores(folders))]
    there = [
        other.name
        for other in known
        if any(path(place, dataset).exists() for place in folders for path in (other.path, other.published_path))
    ]
    looked = ", ".join(map(str, folders))
    message = f"{score.path('', dataset).name}: no {score.title} scores of {dataset} in {looked} "
    message += f"(subfolder {score.folder}); {recipe(score, dataset, folders[-1])}"
    message += f"; scores found for this data set: {', '.join(there)}" if there else ""
    shipped = paths.PACKAGED_SCORES
    if shipped not in folders and score.path(shipped, dataset).exists():
        folder = os.path.relpath(shipped)
        message += f"; the scores shipped with the project are in {folder} (--scores_folder={folder})"
    return FileError(message)


COMMIT = "61b2ed3fbb1b25a4f1deeed0b415a0d3bfe4f942"
BASE_URL = f"https://raw.githubusercontent.com/AndAgio/SAMIS/{COMMIT}/src/metrics"
TABLE = Path(__file__).with_name("published_scores.tsv")
CHUNK = 1 << 18  # bytes
_TIMEOUT = 60  # seconds without a response


@dataclass(frozen=True)
class PublishedFile:
    r"""One published file. Size and sha256 are None if only its git blob id is known.

    A git blob id is the sha1 of ``blob SIZE\0`` followed by the content.
    """

    mode: str
    dataset: str
    size: int | None
    sha256: str | None
    blob: str

    def path(self, folder: str | Path) -> Path:
        """The file's path in a metrics folder."""
        return SCORES[self.mode].published_path(folder, self.dataset)

    def is_content_of(self, file: BinaryIO) -> bool:
        """Whether an open file is identical to this published file."""
        size = file.seek(0, os.SEEK_END)
        if self.size is not None and size != self.size:
            return False
        file.seek(0)
        if self.sha256 is not None:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
        digest = hashlib.sha1(b"blob %d\0" % size)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        return digest.hexdigest() == self.blob


@cache
def published_table() -> tuple[PublishedFile, ...]:
    """Every published file, from ``published_scores.tsv`` next to this module (``-`` marks unknown values)."""
    rows = csv.DictReader(TABLE.read_text().splitlines(), delimiter="\t")
    return tuple(
        PublishedFile(
            mode=row["mode"],
            dataset=row["dataset"],
            size=None if row["bytes"] == "-" else int(row["bytes"]),
            sha256=None if row["sha256"] == "-" else row["sha256"],
            blob=row["git_blob"],
        )
        for row in rows
    )


def published_datasets(mode: str | None = None) -> list[str]:
    """The data sets with published scores of this mode, or of any mode if None."""
    return list(dict.fromkeys(file.dataset for file in published_table() if mode in (None, file.mode)))


def published_summary() -> str:
    """One line that lists the published scores per data set."""
    return "; ".join(
        f"{dataset}: {', '.join(file.mode for file in published_table() if file.dataset == dataset)}"
        for dataset in published_datasets()
    )


def published_files(dataset: str, modes: Iterable[str] | None = None) -> list[PublishedFile]:
    """The published files of a data set.

    Args:
        dataset: ``cifar10``, ``cifar100`` or ``svhn``.
        modes: The modes; None for all published ones.

    Raises:
        ArgumentError: No scores were published for the data set, or for one of the modes.
    """
    there = {file.mode: file for file in published_table() if file.dataset == dataset.lower()}
    if not there:
        raise ArgumentError("dataset", f"{dataset}: has no published scores; available: {published_summary()}")
    missing = [mode for mode in modes or () if mode not in there]
    if missing:
        raise ArgumentError(
            "modes", f"{' '.join(missing)}: not published for {dataset}; available: {published_summary()}"
        )
    return [there[mode] for mode in modes] if modes else list(there.values())


def fetch(file: PublishedFile, folder: str | Path, base_url: str = BASE_URL, overwrite: bool = False) -> bool:
    """Download one published file into a metrics folder and verify its size and hash.

    Args:
        file: The published file.
        folder: The metrics folder.
        base_url: The URL that contains the folders of the published scores.
        overwrite: Whether to replace an existing file with different content.

    Returns:
        Whether the file was downloaded; False if an identical file already exists.

    Raises:
        FileError: The download failed or does not match the published file (nothing is written), or a file with
            different content exists.
    """
    path = file.path(folder)
    if path.exists():
        with path.open("rb") as there:
            if file.is_content_of(there):
                return False
        if not overwrite:
            raise FileError(f"{path}: differs from the published file; {REPLACE}")
    url = f"{base_url.rstrip('/')}/{path.relative_to(folder).as_posix()}"

    def write(target: BinaryIO) -> None:
        _download(file, url, target)
        # The record of the replaced scores does not describe the published ones.
        record_path(path).unlink(missing_ok=True)

    write_with(path, write)
    return True


def _download(file: PublishedFile, url: str, target: BinaryIO) -> None:
    """Stream a URL into an open file and verify the content."""
    for chunk in _chunks(url, file.size):
        target.write(chunk)
    target.flush()
    # The target is open for writing only, so a second file object reads the content back.
    with os.fdopen(os.dup(target.fileno()), "rb") as written:
        right = file.is_content_of(written)
    if not right:
        raise FileError(
            f"{url}: does not match the published file (size or hash differs); nothing was written; try again"
        )


def _chunks(url: str, size: int | None) -> Iterator[bytes]:
    """Yield the content of a URL in chunks, with a progress bar. Network errors become a ``FileError``."""
    import http.client  # imported here because only downloads need these three modules
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            announced = answer.headers.get("Content-Length", "")
            total = int(announced) if announced.isdigit() else size
            with tqdm(total=total, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1], disable=None) as bar:
                while chunk := answer.read(CHUNK):
                    bar.update(len(chunk))
                    yield chunk
    except urllib.error.HTTPError as error:
        raise FileError(f"{url}: the server responded with {error.code} {error.reason}; check the URL") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise FileError(f"{url}: download failed ({reason}); check the connection and the URL") from error
