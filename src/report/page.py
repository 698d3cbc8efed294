"""Build the page: sheets of thumbnails, arrays as text, and the template with everything inside.

The page is one file. It loads nothing, so it works from the file system and when it is sent by mail. Class names and
file names are untrusted text: the template escapes them, and the script inserts them as text.
"""

from __future__ import annotations

import base64
import gzip
import io
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from src.artifacts.io import write_with
from src.datasets.files import ranks
from src.errors import FileError, UserError
from src.formatting import duration
from src.report import tables
from src.report.collect import Contents, ReportConfig

if TYPE_CHECKING:
    from PIL.Image import Image

    from src.datasets import ImageSet

MARK = "make_report.py"
"""What the page names as its generator, by which it is recognized."""

_TEMPLATES = Path(__file__).parent
_SHEET = 3200  # pixels per side of a sheet, at most
_PAGE = 29e6  # bytes of the page, at most, unless the thumbnails do not fit even at the lowest quality
_TABLES = 1.5e6  # bytes of the page besides thumbnails, arrays and plotly.js, about
_PIXELS = 62e6  # of all thumbnails, at most: 60,000 of 32x32
_LARGEST = 128  # pixels per side of a thumbnail, at most
_QUALITIES = (92, 85, 78, 70, 60, 50, 40, 30)
_FULL_COLOR = 80  # the quality above which color is not stored at half the resolution
_PROBED = 1024  # thumbnails from which the quality is chosen
_READ = 2048  # images read at once
_SPECTRUM = 1000  # points of a spectral density


# ----------------------------------------------------------------------------------------------------- thumbnails


def thumbnails(examples: ImageSet, shown: np.ndarray, side: int) -> Iterator[np.ndarray]:
    """Yield the images at positions ``shown`` scaled to ``side`` pixels, uint8 ``(b, side, side, c)``."""
    import torch
    from PIL import Image

    for start in range(0, len(shown), _READ):
        positions = torch.from_numpy(shown[start : start + _READ])
        images = examples.fetch(positions).cpu().permute(0, 2, 3, 1).contiguous().numpy()
        if images.shape[1] != side:
            scaled = [
                np.asarray(Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).resize((side, side)))
                for image in images
            ]
            images = np.stack(scaled).reshape(len(images), side, side, -1)
        yield images


class Sheets:
    """Thumbnails of all examples on the page, in rows on a few JPEG images.

    Cells are multiples of a JPEG block, so that a thumbnail is not compressed together with its neighbor; the edge of
    the image fills the rest of its cell.

    Args:
        train: The training set.
        shown: Positions of the examples on the page.
        room: Bytes of all sheets, at most.

    Attributes:
        side: Pixels per side of a thumbnail.
        cell: Pixels per side of its cell.
        columns: Cells per row and rows per sheet.
        quality: The JPEG quality, the highest at which all sheets fit into the page.
        sheets: The JPEG files.
    """

    def __init__(self, train: ImageSet, shown: np.ndarray, room: float) -> None:
        channels, size, _ = train.image_shape
        count = len(shown)
        self.side = min(size, _LARGEST, max(8, int(math.sqrt(_PIXELS / count))))
        block = 8 if channels == 1 else 16  # color may be stored at half the resolution
        self.cell = block * math.ceil(self.side / block)
        self.columns = min(_SHEET // self.cell, math.ceil(math.sqrt(count)))
        probed = shown[np.unique(np.linspace(0, count - 1, min(_PROBED, count)).astype(np.int64))]
        sample = self._sheet(np.concatenate(list(thumbnails(train, probed, self.side))))
        for self.quality in _QUALITIES:
            if len(_jpeg(sample, self.quality)) * count / len(probed) <= room:
                break
        self.sheets: list[bytes] = []
        waiting = np.empty((0, self.side, self.side, channels), np.uint8)
        full = self.columns**2
        for images in thumbnails(train, shown, self.side):
            waiting = np.concatenate([waiting, images])
            while len(waiting) >= full:
                self.sheets.append(_jpeg(self._sheet(waiting[:full]), self.quality))
                waiting = waiting[full:]
        if len(waiting):
            self.sheets.append(_jpeg(self._sheet(waiting), self.quality))

    def _sheet(self, images: np.ndarray) -> np.ndarray:
        """Arrange images ``(b, side, side, c)`` in rows: ``(h, w, c)``."""
        rows, pad = math.ceil(len(images) / self.columns), self.cell - self.side
        cells = np.pad(images, ((0, 0), (0, pad), (0, pad), (0, 0)), mode="edge")
        empty = np.zeros((rows * self.columns - len(cells), *cells.shape[1:]), np.uint8)
        grid = np.concatenate([cells, empty]).reshape(rows, self.columns, self.cell, self.cell, -1)
        return grid.transpose(0, 2, 1, 3, 4).reshape(rows * self.cell, self.columns * self.cell, -1)


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    from PIL import Image

    image: Image.Image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, optimize=True, subsampling=0 if quality > _FULL_COLOR else 2)
    return file.getvalue()


def listed_test_images(found: Contents) -> dict[int, str]:
    """The test images of which a listed training example is a duplicate, by index, as base64 JPEG files."""
    rows = [row for row in (found.duplicates or [])[: tables.LISTED] if row["in"] == "test"]
    indices = found.test.indices.cpu().numpy()
    positions = np.flatnonzero(np.isin(indices, [int(row["duplicate of"]) for row in rows]))
    side = min(found.test.image_shape[1], _LARGEST)
    images = (image for part in thumbnails(found.test, positions, side) for image in part)
    return {int(indices[k]): text_of(_jpeg(image, 85)) for k, image in zip(positions, images, strict=True)}


# --------------------------------------------------------------------------------------------------------- arrays


def text_of(values: np.ndarray | bytes) -> str:
    """Encode an array's bytes, little-endian, as base64."""
    content = values if isinstance(values, bytes) else np.ascontiguousarray(values).tobytes()
    return base64.b64encode(content).decode()


def example_arrays(found: Contents, shown: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of the examples on the page by name, each ``(m,)``, or ``(m, k)`` for curves.

    Scores are float32. Ranks are those among all examples, at full precision.
    """
    arrays: dict[str, np.ndarray] = {"index": shown.astype("<u4"), "label": found.labels[shown].astype("<u2")}
    if found.predictions is not None:
        p = found.predictions[shown]
        known = np.isfinite(p).all(1)
        best = np.where(known, np.where(known[:, None], p, 0).argmax(1), -1)
        arrays["prediction"] = best.astype("<i2")
        arrays["confidence"] = np.where(known, np.where(known[:, None], p, 0).max(1), np.nan).astype("<f4")
        arrays["correct"] = np.where(known, best == found.labels[shown], 2).astype("u1")
    elif found.dynamics is not None:
        arrays["correct"] = np.nan_to_num(found.dynamics.correct[shown], nan=2).astype("u1")
    if found.kept is not None:
        arrays["kept"] = (found.kept[shown] > 0).astype("u1")
    if found.planted is not None:
        arrays["planted"] = found.planted[shown].astype("u1")
    for k, values in enumerate(found.scores.values()):
        arrays[f"score{k}"] = values[shown].astype("<f4")
        arrays[f"rank{k}"] = ranks(values)[shown].astype("<u2" if len(values) < 2**16 else "<u4")
    if found.dynamics is not None:
        arrays["losses"] = one_byte(np.sqrt(found.dynamics.losses[:, shown] / largest_loss(found))).T
        arrays["probabilities"] = one_byte(found.dynamics.probabilities[:, shown]).T
    return arrays


def largest_loss(found: Contents) -> float:
    """The loss that the largest byte represents."""
    losses = np.ones(1) if found.dynamics is None else found.dynamics.losses
    return max(float(losses.max(where=np.isfinite(losses), initial=0)), 1e-6)


def one_byte(values: np.ndarray) -> np.ndarray:
    """Round values in [0, 1] to multiples of 1/254; 255 is NaN."""
    return np.where(np.isnan(values), 255, np.clip(np.nan_to_num(values), 0, 1) * 254).round().astype("u1")


def description(
    found: Contents, shown: np.ndarray, sheets: Sheets, rho: list[list[float]], anonymize: bool
) -> dict[str, Any]:
    """What the script needs besides the arrays, as plain values."""
    files = None if anonymize or found.files is None else found.files
    linked = files is not None and _root(found) is not None
    described: dict[str, Any] = {
        "name": found.train.entry.name,
        "total": len(found.used),
        "shown": len(shown),
        "classes": list(found.class_names),
        "scores": [
            {
                "mode": mode,
                "title": _capital(tables.title(found, mode)),
                "source": found.entries[mode].source,
                "meaning": tables.meaning(found, mode),
                "scored": int(np.count_nonzero(~np.isnan(values))),
            }
            for mode, values in found.scores.items()
        ],
        "thumbnail": {
            "side": sheets.side,
            "cell": sheets.cell,
            "columns": sheets.columns,
            "count": len(sheets.sheets),
        },
        "files": None if files is None else [files[index] for index in shown.tolist()],
        "root": _root(found) if linked else None,
        "key": f"{found.train.entry.name}-{found.train.digest}",
        "rho": rho,
        "predictor": found.predictor,
    }
    if found.dynamics is not None:
        described["curves"] = {"epochs": found.dynamics.epochs.tolist(), "largest": largest_loss(found)}
    return described


def _root(found: Contents) -> str | None:
    """The address of the folder of the original files; None if they are in an archive."""
    files = found.train.files
    if files is None or not len(files) or files.path(0) is None:
        return None
    return files.root.resolve().as_uri().rstrip("/") + "/"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def plots(found: Contents) -> dict[str, Any]:
    """The points of the figures that the script draws with plotly, besides the scatter of scores."""
    figures: dict[str, Any] = dict.fromkeys(("classes", "loo", "retrained", "spectra", "velocities"))
    if found.dynamics is not None:
        figures["classes"] = {
            "loss": _rounded(found.dynamics.loss.T),
            "accuracy": _rounded(found.dynamics.accuracy.T),
            "test_loss": _rounded(found.dynamics.test_loss.T),
        }
    if (experiment := found.sensitivity) is not None:
        if len(experiment.epochs):
            figures["loo"] = {
                "epochs": experiment.epochs.tolist(),
                "estimates": _rounded(experiment.estimates),
                "test": _rounded(experiment.test_nlls),
            }
        if len(experiment.retrained):
            figures["retrained"] = {
                "index": experiment.retrained.tolist(),
                "estimated": _rounded(experiment.estimated),
                "deviations": _rounded(experiment.deviations),
            }
    if found.spectra:
        from src.curvature.plots import extent, grid, spectral_density, width  # imports matplotlib

        figures["spectra"] = []
        for name, spectrum in found.spectra.items():
            low, high = extent(spectrum.nodes)
            points = grid(low, high, width(low, high))
            heights = spectral_density(spectrum.nodes, spectrum.weights, points, width(low, high))
            parts = [part.max() for part in np.array_split(heights, _SPECTRUM)]  # a peak is narrower than a pixel
            where = [part.mean() for part in np.array_split(points, _SPECTRUM)]
            figures["spectra"].append({"name": name, "x": _rounded(where), "y": _rounded(parts)})
    if found.velocities:
        figures["velocities"] = [
            {
                "name": f"{name}, epoch {one.epoch}",
                "x": _rounded(one.positions),
                "y": _rounded(one.values.mean(0)),
                "percent": one.in_percent,
            }
            for name, several in found.velocities.items()
            for one in several
        ]
    return figures


def _rounded(values: Any) -> list[Any]:
    """Plain numbers with five significant digits; None for NaN, which JSON does not have."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values]


# ----------------------------------------------------------------------------------------------------------- page


def require_page(path: Path, overwrite: bool) -> None:
    """Refuse to replace a file that is not such a page.

    Raises:
        FileError: It is another file, and ``overwrite`` is False, or it is a folder.
    """
    if path.is_dir():
        raise FileError(f"{path}: is a folder; give --out the name of a file")
    if overwrite or not path.exists():
        return
    with path.open("rb") as file:
        start = file.read(1024)
    if f'name="generator" content="{MARK}"'.encode() not in start:
        raise FileError(f"{path}: exists and was not written by {MARK}; give --overwrite to replace it")


def library() -> str:
    """The text of plotly.js. Called first, it also checks that the packages are installed.

    Raises:
        UserError: The packages plotly and jinja2 are not installed.
    """
    try:
        import jinja2  # noqa: F401
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError(
            "the page needs the packages plotly and jinja2; install them with: pip install -r requirements.txt"
        ) from error
    return get_plotlyjs()


def write_page(path: Path, found: Contents, config: ReportConfig) -> list[Path]:
    """Write the page and, if not all examples are on it, a table of all examples beside it.

    Args:
        path: The page.
        found: What was read.
        config: What to show.

    Returns:
        The paths of the page and of the table.
    """
    script = library()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    shown = tables.shown_examples(found, config.examples)
    arrays = {name: text_of(array) for name, array in example_arrays(found, shown).items()}
    test_images = listed_test_images(found)
    rest = _TABLES + len(script) + sum(map(len, [*arrays.values(), *test_images.values()]))
    sheets = Sheets(found.train, shown, (_PAGE - rest) * 3 / 4)  # base64 has 4 bytes for 3
    places = {int(index): place for place, index in enumerate(shown.tolist())}
    names = [str(name) for name in found.class_names]
    files = None if config.anonymize else found.files
    issues, how = tables.likely_errors(found)
    truth, agreement = tables.agreement(found)
    modes, matrix = tables.correlations(found)
    several = tables.findings(found)
    values: dict[str, Any] = {
        "generator": MARK,
        "today": date.today().isoformat(),
        "found": found,
        "name": found.train.entry.name,
        "names": names,
        "file": lambda index: "" if files is None else files[index],
        "has_files": files is not None,
        "shape": found.train.image_shape,
        "shown": len(shown),
        "total": len(found.used),
        "sheets": sheets,
        "places": places,
        "findings": [(one.text, [places[i] for i in one.examples if i in places]) for one in several],
        "meaning": {mode: tables.meaning(found, mode) for mode in found.scores},
        "titles": {mode: _capital(tables.title(found, mode)) for mode in found.scores},
        "unlearned": tables.unlearned(found),
        "histograms": {mode: tables.histogram(values) for mode, values in found.scores.items()},
        "modes": modes,
        "matrix": matrix,
        "class_rows": tables.class_rows(found),
        "score_rows": tables.score_rows(found),
        "runs": tables.run_rows(found),
        "best": tables.best_accuracy(found),
        "issues": issues,
        "how": how,
        "pairs": tables.common_pairs(found, issues),
        "truth": truth,
        "agreement": agreement,
        "duplicates": (found.duplicates or [])[: tables.LISTED],
        "test_images": test_images,
        "relabeled": sum(row["class"] != row["its class"] for row in found.duplicates or []),
        "duplicate_indices": [int(row["index"]) for row in found.duplicates or []],
        "selected": tables.selection_settings(found.selection),
        "percent": tables.percent,
        "number": number,
        "duration": duration,
        "anonymize": config.anonymize,
        "table": f"{path.stem}.csv.gz",
        "data": description(found, shown, sheets, _rounded(matrix), config.anonymize),
        "plots": plots(found),
        "arrays": arrays,
        "images": [text_of(sheet) for sheet in sheets.sheets],
        "plotly": script,
        "style": (_TEMPLATES / "page.css").read_text(),
        "script": (_TEMPLATES / "page.js").read_text(),
    }
    # The table is written first, since the page names it.
    beside = write_table(path, found, config) if len(shown) < len(found.used) else []
    template = environment.get_template("template.html")
    return [write_with(path, _streamed(template.stream(**values))), *beside]


def _streamed(parts: Iterator[str]) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        for part in parts:
            file.write(part.encode("utf-8", errors="replace"))

    return write


def number(value: Any, digits: int = 4) -> str:
    """Format a number with so many significant digits; a dash if it is not finite."""
    return f"{value:.{digits}g}" if isinstance(value, int | float | np.number) and np.isfinite(value) else "–"


def write_table(path: Path, found: Contents, config: ReportConfig) -> list[Path]:
    """Write all examples with their scores and ranks beside the page, as csv.gz and, with pyarrow, as parquet.

    Raises:
        FileError: A file of this name exists without a page, so it is not such a table.
    """
    import csv

    targets = [path.with_name(f"{path.stem}{suffix}") for suffix in (".csv.gz", ".parquet")]
    for target in targets:
        if target.exists() and not path.exists() and not config.overwrite:
            raise FileError(f"{target}: exists; the table of all examples would replace it; give --overwrite")
    names, files = found.class_names, None if config.anonymize else found.files
    used = found.used
    columns: Mapping[str, Any] = {
        "index": used.tolist(),
        **({} if files is None else {"file": [files[i] for i in used.tolist()]}),
        "class": [names[label] for label in found.labels[used]],
        **{mode: [None if v != v else v for v in values[used].tolist()] for mode, values in found.scores.items()},
        **{
            f"rank {mode}": [r or None for r in ranks(values)[used].tolist()] for mode, values in found.scores.items()
        },
    }

    def write(file: BinaryIO) -> None:
        with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=4, mtime=0) as packed:
            text = io.TextIOWrapper(packed, "utf-8", newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
            text.flush()
            text.detach()

    written = [write_with(targets[0], write, interruptible=True)]
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return written
    table = pyarrow.table({name: list(values) for name, values in columns.items()})
    return [
        *written,
        write_with(targets[1], lambda file: pyarrow.parquet.write_table(table, file), interruptible=True),
    ]
