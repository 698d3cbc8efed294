"""Code shared by the benchmarks: table rows, timing, and the baselines' data loaders.

A benchmark is a function of ``quick`` that returns rows; each module lists its own in ``BENCHMARKS``. A row compares
this project with two baselines: the papers' released code, and the strongest alternative that a competent user would
plausibly write. A few rows compare two variants of this project instead. Times are CPU seconds (user and system) on
one thread unless a row's unit says otherwise. Implementations in a row alternate within one run, and the minimum time
of each is reported, which reduces the effect of other load on the ratios.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from src.datasets import DatasetEntry, ImageSet, Normalization, lookup

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: What is measured.
        authors: Cost of the method in the papers' code. None if that code has no such step, or if there is only one
            sensible alternative.
        strongest: Cost of the strongest alternative. None if no alternative is feasible.
        ours: Cost of this project's implementation.
        unit: Unit of the three costs.
        target: Lowest acceptable ratio ``strongest / ours``, if any: below all ratios that were measured, so that a
            lower one means that this project has become slower.
        variant: Whether ``strongest`` is another variant of this project.
    """

    name: str
    authors: float | None
    strongest: float | None
    ours: float
    unit: str
    target: float | None = None
    variant: bool = False

    @property
    def ratio(self) -> float | None:
        """The strongest alternative's cost divided by this project's cost."""
        return None if self.strongest is None else self.strongest / self.ours

    @property
    def authors_ratio(self) -> float | None:
        """The cost of the papers' code divided by this project's cost."""
        return None if self.authors is None else self.authors / self.ours

    @property
    def met(self) -> bool | None:
        """Whether the ratio reaches the target; None without a target or an alternative."""
        return None if self.target is None or self.ratio is None else self.ratio >= self.target


def seconds(work: Work, clock: Callable[[], float]) -> float:
    """Elapsed time of ``work`` on a clock."""
    start = clock()
    work()
    return clock() - start


def in_turn(ways: Sequence[Work], repeats: int, clock: Callable[[], float] = time.process_time) -> list[float]:
    """Run the implementations alternately and return the minimum time of each, in seconds.

    Args:
        ways: The ways to compare.
        repeats: Timed rounds, after one round of warm-up.
        clock: CPU time, or wall time for work on several threads.
    """
    for way in ways:
        way()
    times = [[seconds(way, clock) for way in ways] for _ in range(repeats)]
    return [min(column) for column in zip(*times, strict=True)]


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(*arguments)`` from a new process, on one thread, with the default allocator."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(function, *arguments).result()


def peak() -> float:
    """Peak resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage also counts the parent's memory at the time it started this process
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 2**10
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / 2**20 if sys.platform == "darwin" else largest / 2**10


def random_images(dataset: str, count: int, seed: int = 0) -> ImageSet:
    """Noise images in the shape of a catalog data set's training set."""
    entry = lookup(dataset)
    generator = torch.Generator().manual_seed(seed)
    shape = (count, entry.channels, entry.image_size, entry.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return ImageSet(entry, "train", pixels, torch.randint(entry.num_classes, (count,), generator=generator))


class PlainImages(torch.utils.data.Dataset):
    """The authors' data pipeline: images in memory, each converted to PIL and transformed on its own."""

    def __init__(self, images: ImageSet, *, augmented: bool, normalization: str = "samis") -> None:
        pixels = images.fetch(torch.arange(len(images))).permute(0, 2, 3, 1)
        self.pixels = (pixels[..., 0] if images.entry.channels == 1 else pixels).contiguous().numpy()
        self.labels = images.labels.tolist()
        self.transform = plain_transform(images.entry, augmented, normalization)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index], index


def plain_transform(
    entry: DatasetEntry, augmented: bool, normalization: str = "samis"
) -> Callable[[Image.Image], torch.Tensor]:
    """The authors' torchvision transforms: (random crop, flip,) ToTensor, Normalize."""
    from src._torchvision import torchvision

    transforms = torchvision.transforms

    normal = entry.normalizations[normalization]
    chosen = [transforms.ToTensor(), transforms.Normalize(normal.mean, normal.std)]
    if augmented:
        chosen[:0] = [transforms.RandomCrop(entry.image_size, 4), transforms.RandomHorizontalFlip()]
    return transforms.Compose(chosen)


def fast_batches(
    pixels: Tensor,
    labels: Tensor,
    batch_size: int,
    normalization: Normalization,
    *,
    augmented: bool,
    channels_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """An airbench-like loader, the strongest alternative: the set is one tensor, batches are augmented as a whole.

    Args:
        pixels: uint8 ``(n, c, s, s)``.
        labels: ``(n,)``.
        batch_size: Examples per batch.
        normalization: Mean and standard deviation per channel, of pixels in [0, 1].
        augmented: Whether to shuffle, crop at random from images padded by 4 pixels, and flip at random.
        channels_last: Memory layout of the batches.

    Yields:
        Normalized images ``(b, c, s, s)`` and their labels.
    """
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (normalization.mean, normalization.std))
    count, size = len(pixels), pixels.shape[-1]
    order = torch.randperm(count) if augmented else torch.arange(count)
    windows = (
        F.pad(pixels, (4,) * 4).unfold(2, size, 1).unfold(3, size, 1) if augmented else None
    )  # (n, c, 9, 9, s, s)
    for rows in order.split(batch_size):
        if windows is None:
            images = pixels[rows[0] : rows[-1] + 1]
        else:
            images = windows[rows, :, torch.randint(9, rows.shape), torch.randint(9, rows.shape)]
            flipped = torch.rand(rows.shape) < 0.5
            images[flipped] = images[flipped].flip(-1)
        images = images.float().div_(255).sub_(mean).div_(std)
        yield images.contiguous(memory_format=torch.channels_last) if channels_last else images, labels[rows]


def median_run(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Of each row's measurements in several runs of a benchmark, the one with the median ratio."""
    return [
        sorted(found, key=lambda row: row.ours if row.ratio is None else row.ratio)[len(found) // 2]
        for found in zip(*runs, strict=True)
    ]


HEADER = ("what", "papers' code", "strongest", "ours", "unit", "papers' / ours", "strongest / ours", "target")
LEGEND = """\
Times are CPU seconds on one thread unless the unit says otherwise. Larger ratios are better; a target is the lowest
acceptable ratio to the strongest alternative. "-" under papers' code: it has no such step, or there is only one
sensible alternative; under strongest: no alternative is feasible.
Benchmarks: `training steps` means `python -m benchmarks.training steps`.
"""


def table(found: Mapping[str, Sequence[Row]]) -> str:
    """Format rows as Markdown: comparisons with alternatives, then variants of this project.

    Args:
        found: The rows of each benchmark, by its module and name.
    """

    def shown(value: float | None, form: str = ".3g") -> str:
        if value is None:
            return "-"
        return f"{value:,.0f}" if value >= 100 else format(value, form)

    parts = []
    for variants in (False, True):
        cells = [
            (
                row.name,
                shown(row.authors),
                shown(row.strongest),
                shown(row.ours),
                row.unit,
                shown(row.authors_ratio, ".2g"),
                shown(row.ratio, ".2f" if (row.ratio or 0) < 2 else ".2g"),
                f"{shown(row.target)}{' (missed)' if row.met is False else ''}",
                f"`{benchmark}`",
            )
            for benchmark, rows in found.items()
            for row in rows
            if row.variant == variants
        ]
        header = (*HEADER, "benchmark")
        if variants:  # drop the columns without meaning
            cells = [(cell[0], *cell[2:5], cell[6], cell[8]) for cell in cells]
            header = ("variants of this project: first / second", "first", "second", "unit", "ratio", "benchmark")
        if cells:
            widths = [max(len(line[column]) for line in (header, *cells)) for column in range(len(header))]
            lines = [header, ["-" * width for width in widths], *cells]
            parts.append(
                "\n".join(
                    f"| {' | '.join(text.ljust(width) for text, width in zip(line, widths, strict=True))} |"
                    for line in lines
                )
            )
    return "\n\n".join(parts)


def run(benchmarks: Mapping[str, Callable[[bool], list[Row]]], description: str) -> None:
    """Run all benchmarks of the main module, or those named on the command line, and print their rows."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    names = ", ".join(benchmarks)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"benchmarks to run: {names} (default: all)")
    parser.add_argument("--quick", action="store_true", help="use toy sizes, to test that the benchmarks run")
    args = parser.parse_args()
    if unknown := set(args.names) - set(benchmarks):
        parser.error(f"unknown benchmark {', '.join(unknown)}; choose from {names}")
    module, found = Path(sys.argv[0]).stem, {}
    for name in args.names or benchmarks:
        torch.set_num_threads(1)
        found[f"{module} {name}"] = benchmarks[name](args.quick)
    print(LEGEND)
    print(table(found))
