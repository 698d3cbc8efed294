"""Stored scores: ``Proxy`` reads those of a data set, ``Memorization`` one npz file; published files are fetched.

>>> Proxy("samis_loss", "digits").get_sorted_indices()[-5:]  # the five most atypical examples
"""

import csv
import glob
import hashlib
import logging
import os
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
from src.metrics.registry import SCORES, get_score
from src.metrics.score import Score

log = logging.getLogger(__name__)

_RECIPES = {
    "pair": (
        "make it with compute_sam_sgd.py and average_scores.py "
        "--dataset {dataset} --model MODEL --seeds SEEDS --modes {mode}"
    ),
    "dynamics": (
        "make it with train_full.py --measure_proxies and average_scores.py "
        "--dataset {dataset} --model MODEL --seeds SEEDS --modes {mode}"
    ),
    "mpe": "make it with the scripts in examples/",
    "download": (
        "store estimates of your own there (an npz file with an array tr_mem); Feldman and Zhang's, of cifar100 and "
        "imagenet, are at https://pluskid.github.io/influence-memorization/"
    ),
}
_RECIPES["end"] = _RECIPES["dynamics"]

SearchFolders = str | Path | Iterable[str | Path] | None


def min_max(scores: np.ndarray) -> np.ndarray:
    """``(x - min) / (max - min)`` over what is not NaN; all zeros where nothing varies.

    Args:
        scores: ``(n,)``, at least one of them not NaN.
    """
    low, high = np.nanmin(scores), np.nanmax(scores)
    if high / 2 - low / 2 > np.finfo(np.float64).max / 2:  # the range itself would not be finite
        scores, low, high = scores / 2, low / 2, high / 2
    return (scores - low) / (high - low) if high > low else scores - low


def shares(scores: np.ndarray) -> np.ndarray:
    """``x / sum x`` over what is not NaN, which may be all zeros.

    Args:
        scores: ``(n,)``.
    """
    largest = np.nanmax(np.abs(scores), initial=0.0)
    if largest > np.finfo(np.float64).max / max(len(scores), 1):  # the sum might not be finite
        scores = scores / largest
    return scores / (np.nansum(scores) or 1.0)


class StoredScores:
    """Scores by index, with the methods that the field's scripts expect.

    Attributes:
        scores: float64 ``(n,)`` by original index; NaN where an example is not scored.
        indices: int64, the scored indices, ascending.
        path: The file that was read.
        label: The mode's symbol, for figures.
        title: The mode and the data set in words, for figures.
    """

    def __init__(self, scores: np.ndarray, path: str | Path, label: str, title: str, plots: str | Path) -> None:
        self.scores = scores
        self.indices = np.flatnonzero(~np.isnan(scores))
        self.path = Path(path)
        self.label = label
        self.title = title
        self._plots = Path(plots)
        # NaN sorts last, and a stable sort breaks ties by index.
        self._order = np.argsort(scores, kind="stable")[: len(self.indices)]

    def __len__(self) -> int:
        return len(self.scores)

    def get(self, idx: Any) -> Any:
        """The score of an index, or the scores of any numpy index (a slice, a list, a mask)."""
        return self.scores[idx]

    def full_list(self) -> list[float]:
        """All scores by index, as a Python list."""
        return self.scores.tolist()

    def get_dict_form(self, sort: bool = True) -> dict[int, float]:
        """Index to score, of the scored examples.

        Args:
            sort: Ascending by score, ties by index; otherwise in the order of the indices.
        """
        order = self._order if sort else self.indices
        return dict(zip(order.tolist(), self.scores[order].tolist(), strict=True))

    def get_sorted_indices(self, idx: Any = None) -> Any:
        """The scored indices, ascending by score (ties by index).

        Args:
            idx: None for all of them; otherwise the element, or elements, at these positions of that order.
        """
        return self._order.copy() if idx is None else self._order[idx]

    def check(
        self, n: int | None = None, label_hash: str | None = None, data_hash: str | None = None
    ) -> "StoredScores":
        """Stop if these scores are not of a data set of ``n`` examples with these labels and images.

        Returns:
            Itself, so that the check can be chained.

        Raises:
            FileError: The length, or a hash where it is known, differs.
        """
        store.check_score_data(self.path, self.scores, n, label_hash, data_hash)
        return self

    def _chosen(self, idx: Any) -> tuple[np.ndarray, np.ndarray]:
        """Indices and scores to plot."""
        indices = self.indices if idx is None else np.atleast_1d(np.arange(len(self))[idx])
        indices = indices[~np.isnan(self.scores[indices])]
        return indices, self.scores[indices]

    def _stem(self, folder: str | Path | None, idx: Any, name: str) -> Path:
        return Path(folder or self._plots) / (f"all_{name}" if idx is None else name)

    def plot_scores_hist(self, idx: Any = None, folder: str | Path | None = None) -> list[Path]:
        """Draw a histogram of 50 bins into ``all_scores_hist`` (``scores_hist`` of a subset), PNG and PDF.

        Args:
            idx: The indices to draw; None for all.
            folder: Where to; default the plots folder, ``proxies/{dataset}/{mode}``.

        Returns:
            The files.
        """
        from src.metrics import plots  # matplotlib takes a second to import, and most users never draw

        figure = plots.histogram(self._chosen(idx)[1], self.label, self.title)
        return save_figure(figure, self._stem(folder, idx, "scores_hist"))

    def plot_scores_kde(self, idx: Any = None, folder: str | Path | None = None) -> list[Path]:
        """Draw a filled kernel density estimate into ``all_scores_distribution`` (``scores_distribution``)."""
        from src.metrics import plots

        figure = plots.density(self._chosen(idx)[1], self.label, self.title)
        return save_figure(figure, self._stem(folder, idx, "scores_distribution"))

    def plot_prob_dist(self, idx: Any = None, plot: str = "scatter", folder: str | Path | None = None) -> list[Path]:
        """Draw each example's share of the sum against its index into ``all_prob_dist`` (``prob_dist``).

        Args:
            idx: The indices to draw; None for all. Shares are of the sum over all examples.
            plot: ``"scatter"`` or ``"line"``.
            folder: Where to.
        """
        from src.metrics import plots

        indices, _ = self._chosen(idx)
        figure = plots.share_figure(indices, shares(self.scores)[indices], self.label, self.title, plot)
        return save_figure(figure, self._stem(folder, idx, "prob_dist"))


@dataclass(frozen=True)
class ScoreConfig:
    """Where stored scores are searched.

    Attributes:
        scores_folder: Folders, or MODE=FOLDER for one score; see :func:`score_folders`.
    """

    scores_folder: list[str] = option(
        [],
        "read score files from this folder, or those of one score from it; may be given several times "
        "(default: --metrics_folder where it is given, else metrics/, then src/metrics/)",
        action="append",
        metavar="DIR|MODE=DIR",
    )


def score_folders(given: Sequence[str], mode: str, metrics_folder: Path | None = None) -> list[Path] | None:
    """The folders in which a score's files are searched, first to last.

    Folders given for this score come before those for all. Where there are any, no other folder is searched: scores
    that happen to exist elsewhere are not the ones that were asked for.

    Args:
        given: Folders, or ``MODE=FOLDER`` for one score.
        mode: The score.
        metrics_folder: The last to be searched, unless it is the default of ``Folders``.

    Returns:
        The folders; None where none was given, so that the default ones are searched.

    Raises:
        ArgumentError: A given folder does not exist, or its score is unknown.
    """
    general, own = [], []
    for text in given:
        if Path(text).is_dir():  # "=" may be part of its name
            general.append(Path(text))
            continue
        name, separator, folder = text.partition("=")
        if separator and name not in SCORES:
            raise ArgumentError(
                "scores_folder",
                f"{text}: there is no such folder, nor a score {name!r}; choose from {', '.join(SCORES)}",
            )
        path = Path(folder if separator else text)
        if not path.is_dir():
            raise ArgumentError("scores_folder", f"{text}: there is no folder {path}")
        if name == mode:
            own.append(path)
    chosen = [*own, *general]
    if metrics_folder is not None and metrics_folder is not Folders.metrics_folder:  # given, even if it is the same
        chosen.append(metrics_folder)
    return chosen or None


def recipe(score: Score, dataset: str) -> str:
    """The command (or address) that a score file of this kind comes from, for this data set."""
    own = _RECIPES[score.source].format(mode=score.name, dataset=dataset_flag(dataset))
    if dataset not in published_datasets(score.name):
        return own
    return f"get the published ones with fetch_scores.py --dataset {dataset} --modes {score.name}, or {own}"


class Proxy(StoredScores):
    """The averaged scores of one mode of one data set. HIGH means atypical.

    Args:
        mode: A name of ``SCORES``.
        dataset: What scripts take as ``--dataset``, or the name in file names, of which the part before the digits
            of its content is enough where one file fits.
        normalize: Scale to [0, 1].
        folder: A metrics folder, or several to search in this order; no other is searched then. By default
            ``metrics/``, then the packaged scores.
        n: Refuse a file that does not score a part of ``n`` examples.
        label_hash: Refuse a file that is known to be of other labels.
        data_hash: Refuse a file that is known to be of other images (``ImageSet.digest``).

    Attributes:
        mode: The mode's name.
        dataset: The data set's name in file names.
        record: How the file was made, from the json beside it.

    Raises:
        ArgumentError: There is no such mode.
        FileError: No such file (the message says how to get one), or it is damaged, incomplete or foreign.
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
        kind = get_score(mode)
        path, dataset = _find(mode, dataset, folder)
        log.info("%s of %s: read from %s", mode, dataset, path)
        # shares are what the papers' class gives; the scaling below undoes them
        raw = shares(store.read_memorization(path)) if mode == "mem" else store.read_scores(path)
        plots = paths.ROOT / "plots" / "proxies" / dataset / mode
        super().__init__(min_max(raw) if normalize else raw, path, kind.symbol, f"{kind.title}, {dataset}", plots)
        self.mode = mode
        self.dataset = dataset
        self.record = store.read_record(path)
        if self.record.get("mode", mode) != mode:
            raise FileError(f"{path}: has the scores {self.record['mode']}, not {mode}; it was copied or renamed")
        self.check(n, label_hash, data_hash)


class Memorization(StoredScores):
    """Raw memorization scores of one npz file, with :meth:`get_prob` and :meth:`full_prob`.

    Args:
        file: The npz file with ``tr_mem``.

    Raises:
        FileError: The file is missing, damaged, or holds no ``tr_mem``.
    """

    def __init__(self, file: str | Path) -> None:
        kind = get_score("mem")
        dataset = Path(file).name.split("_infl_matrix")[0]
        if not Path(file).exists():
            raise FileError(f"{file}: there is no such memorization file; {recipe(kind, dataset)}")
        plots = paths.ROOT / "plots" / "proxies" / dataset / "mem"
        super().__init__(store.read_memorization(file), file, kind.symbol, f"{kind.title}, {dataset}", plots)
        self._prob = shares(self.scores)

    def get_prob(self, idx: Any) -> Any:
        """The share of the sum of an index, or of any numpy index."""
        return self._prob[idx]

    def full_prob(self) -> list[float]:
        """All shares of the sum by index, as a Python list."""
        return self._prob.tolist()


def find_score_file(mode: str, dataset: str, folder: SearchFolders = None) -> Path:
    """The file that :class:`Proxy` reads.

    Args:
        mode: A name of ``SCORES``.
        dataset: See :class:`Proxy`.
        folder: See :class:`Proxy`.

    Raises:
        FileError: There is none, or several data sets have such a name; the message says where was looked and how to
            get one.
    """
    return _find(mode, dataset, folder)[0]


def _find(mode: str, dataset: str, folder: SearchFolders) -> tuple[Path, str]:
    """The score file, and the data set's name in it."""
    score, dataset = get_score(mode), dataset_name(dataset)
    given = [] if folder is None else [folder] if isinstance(folder, str | Path) else folder
    folders = [Path(place) for place in given] or [paths.ROOT / "metrics", paths.PACKAGED_SCORES]
    for place in folders:
        path = score.path(place, dataset)
        if path.exists():
            return path, dataset
    for place in folders if dataset not in DATASETS else ():
        full = _own_data(score, place, dataset)
        if len(full) > 1:
            raise FileError(
                f"{place}: has {score.title} scores of {len(full)} data sets called {dataset}; "
                f"choose one of {', '.join(full)}"
            )
        if full:
            return score.path(place, full[0]), full[0]
    raise _missing(score, dataset, folders)


def _own_data(score: Score, folder: Path, stem: str) -> list[str]:
    """The names, a stem and eight digits of the content, of the user's data sets of this stem that have scores."""
    pattern = score.path(folder, glob.escape(f"{stem}-") + 8 * "[0-9a-f]")
    start = score.path(folder, "|").name.index("|")
    return sorted(path.name[start : start + len(stem) + 9] for path in pattern.parent.glob(pattern.name))


def _missing(score: Score, dataset: str, folders: list[Path]) -> FileError:
    """What to do about scores that are in none of the folders."""
    there = [other.name for other in SCORES.values() if any(other.path(place, dataset).exists() for place in folders)]
    looked = ", ".join(map(str, folders))
    message = f"{score.path('', dataset).name}: no {score.title} scores of {dataset} in {looked} "
    message += f"(sub-folder {score.folder}); {recipe(score, dataset)}"
    message += f"; there are those called {', '.join(there)}" if there else ""
    shipped = paths.PACKAGED_SCORES
    if shipped not in folders and score.path(shipped, dataset).exists():
        folder = os.path.relpath(shipped)
        message += f"; those that ship with the project are in {folder} (--scores_folder={folder})"
    return FileError(message)


COMMIT = "61b2ed3fbb1b25a4f1deeed0b415a0d3bfe4f942"
BASE_URL = f"https://raw.githubusercontent.com/AndAgio/SAMIS/{COMMIT}/src/metrics"
TABLE = Path(__file__).with_name("published_scores.tsv")
CHUNK = 1 << 18  # bytes
_TIMEOUT = 60  # seconds without an answer


@dataclass(frozen=True)
class PublishedFile:
    r"""One published file. Size and sha256 are None where only its git blob id is known.

    A git blob id is the sha1 of ``blob SIZE\0`` and the content.
    """

    mode: str
    dataset: str
    size: int | None
    sha256: str | None
    blob: str

    def path(self, folder: str | Path) -> Path:
        """Where the file belongs in a metrics folder."""
        return SCORES[self.mode].path(folder, self.dataset)

    def is_content_of(self, file: BinaryIO) -> bool:
        """Whether an open file holds exactly this one."""
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
    """Every published file, from ``published_scores.tsv`` beside this module (``-`` where unknown)."""
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
    """The data sets of which this score was published, or, without one, any."""
    return list(dict.fromkeys(file.dataset for file in published_table() if mode in (None, file.mode)))


def published_summary() -> str:
    """What was published for which data set, in one line."""
    return "; ".join(
        f"{dataset}: {', '.join(file.mode for file in published_table() if file.dataset == dataset)}"
        for dataset in published_datasets()
    )


def published_files(dataset: str, modes: Iterable[str] | None = None) -> list[PublishedFile]:
    """The published files of a data set.

    Args:
        dataset: ``cifar10``, ``cifar100`` or ``svhn``.
        modes: Which modes; None for all that were published.

    Raises:
        ArgumentError: Nothing was published for the data set, or for one of the modes.
    """
    there = {file.mode: file for file in published_table() if file.dataset == dataset.lower()}
    if not there:
        raise ArgumentError("dataset", f"{dataset}: no scores of it were published; there are {published_summary()}")
    missing = [mode for mode in modes or () if mode not in there]
    if missing:
        raise ArgumentError(
            "modes", f"{' '.join(missing)}: not published for {dataset}; there are {published_summary()}"
        )
    return [there[mode] for mode in modes] if modes else list(there.values())


def fetch(file: PublishedFile, folder: str | Path, base_url: str = BASE_URL, overwrite: bool = False) -> bool:
    """Bring one published file into a metrics folder, verified by size and hash.

    Args:
        file: Which one.
        folder: The metrics folder.
        base_url: Where the folders of the published scores stand.
        overwrite: Replace a file of other content.

    Returns:
        Whether it was downloaded; False if the right file was there already.

    Raises:
        FileError: It could not be downloaded, or is not the published one (nothing is written then); or there is a
            file of other content.
    """
    path = file.path(folder)
    if path.exists():
        with path.open("rb") as there:
            if file.is_content_of(there):
                return False
        if not overwrite:
            raise FileError(f"{path}: has different scores than the published file; {REPLACE}")
    url = f"{base_url.rstrip('/')}/{path.relative_to(folder).as_posix()}"

    def write(target: BinaryIO) -> None:
        _download(file, url, target)
        # A record of the scores that are replaced must not be taken for one of these.
        record_path(path).unlink(missing_ok=True)

    write_with(path, write)
    return True


def _download(file: PublishedFile, url: str, target: BinaryIO) -> None:
    """Stream a url into an open file and verify what came."""
    for chunk in _chunks(url, file.size):
        target.write(chunk)
    target.flush()
    # The target is open for writing only; a second file object reads what was written.
    with os.fdopen(os.dup(target.fileno()), "rb") as written:
        right = file.is_content_of(written)
    if not right:
        raise FileError(f"{url}: is not the published file (size or hash differ); nothing was written, try again")


def _chunks(url: str, size: int | None) -> Iterator[bytes]:
    """The content of a url, piece by piece, with a progress bar. What the network does wrong is one line."""
    import http.client  # three modules that only a download needs
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
        raise FileError(f"{url}: the server answers {error.code} {error.reason}; check the address") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise FileError(f"{url}: could not be downloaded ({reason}); check the connection or the address") from error
