"""Shared code of the benchmarks: rows of the table, and timing.

A benchmark is a function of ``quick`` that returns rows. A module lists its benchmarks in ``BENCHMARKS``. Times are
CPU seconds (user and system) on one thread, unless a row says otherwise. The implementations to compare are run in
turn, and the minimum time of each is used, so that other load on the machine has little effect on the ratio.
"""

import argparse
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from src.datasets import DatasetEntry, ImageSet, lookup

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: The task.
        plain: Cost of the plain implementation; NaN if it is not feasible.
        ours: Cost of this project's implementation.
        unit: The unit of both.
        target: Target for the ratio ``plain / ours``; None for no target.
    """

    name: str
    plain: float
    ours: float
    unit: str
    target: float | None = None

    @property
    def ratio(self) -> float:
        """Cost of the plain implementation relative to ours."""
        return self.plain / self.ours

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is none."""
        return None if self.target is None else self.ratio >= self.target


def seconds(work: Work, clock: Callable[[], float]) -> float:
    """Return the seconds that ``work`` takes on a clock."""
    start = clock()
    work()
    return clock() - start


def in_turn(ways: Sequence[Work], repeats: int, clock: Callable[[], float] = time.process_time) -> list[float]:
    """Run functions in turn and return the minimum time of each, in seconds.

    Args:
        ways: The functions to compare.
        repeats: Number of timed turns, after one warm-up turn.
        clock: The CPU clock, or the wall clock for multithreaded work.
    """
    for way in ways:
        way()
    times = [[seconds(way, clock) for way in ways] for _ in range(repeats)]
    return [min(column) for column in zip(*times, strict=True)]


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(*arguments)``, called in a new process on one thread with default allocator settings."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(function, *arguments).result()


def peak() -> float:
    """Return the peak resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage also counts the parent's memory at the time it started this process
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 2**10
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / 2**20 if sys.platform == "darwin" else largest / 2**10


def random_images(dataset: str, count: int, seed: int = 0) -> ImageSet:
    """Return random noise images with the shape of a catalog data set's training images."""
    entry = lookup(dataset)
    generator = torch.Generator().manual_seed(seed)
    shape = (count, entry.channels, entry.image_size, entry.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return ImageSet(entry, "train", pixels, torch.randint(entry.num_classes, (count,), generator=generator))


class PlainImages(torch.utils.data.Dataset):
    """The plain implementation: images in memory, converted to PIL images and transformed one at a time."""

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
    """Return the usual torchvision transforms: crop and flip if augmented, conversion to a tensor, normalization."""
    from src._torchvision import torchvision

    transforms = torchvision.transforms

    normal = entry.normalizations[normalization]
    chosen = [transforms.ToTensor(), transforms.Normalize(normal.mean, normal.std)]
    if augmented:
        chosen[:0] = [transforms.RandomCrop(entry.image_size, 4), transforms.RandomHorizontalFlip()]
    return transforms.Compose(chosen)


def table(rows: Sequence[Row]) -> str:
    """Format the rows as a text table with a header."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'what':{width}s}  {'plain':>10s}  {'ours':>10s}  {'ratio':>7s}  {'target':>6s}  met  unit"]
    for row in rows:
        target = "-" if row.target is None else f"{row.target:.3g}"
        met = {True: "yes", False: "NO", None: "-"}[row.met]
        plain, ratio = ("-", "-") if math.isnan(row.plain) else (f"{row.plain:.4g}", f"{row.ratio:.2f}")
        lines.append(
            f"{row.name:{width}s}  {plain:>10s}  {row.ours:10.4g}  {ratio:>7s}  {target:>6s}  {met:3s}  {row.unit}"
        )
    return "\n".join(lines)


def run(benchmarks: Mapping[str, Callable[[bool], list[Row]]], description: str) -> None:
    """Run a module's benchmarks, or those given on the command line, and print their rows."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    names = ", ".join(benchmarks)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"benchmarks to run: {names} (default: all)")
    parser.add_argument("--quick", action="store_true", help="use toy sizes, to test that the benchmarks run")
    args = parser.parse_args()
    if unknown := set(args.names) - set(benchmarks):
        parser.error(f"unknown benchmark {', '.join(unknown)}; choose from {names}")
    rows = []
    for name in args.names or benchmarks:
        torch.set_num_threads(1)
        rows += benchmarks[name](args.quick)
    print(table(rows))
