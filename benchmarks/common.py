"""What the benchmarks share: rows of the table, and how times are taken.

A benchmark is a function of ``quick`` that returns rows; a module lists its own as ``BENCHMARKS``. Times are
processor seconds (of the user and the system) on one thread, where a row does not say otherwise. Both ways of doing a
thing take turns, and of each the smallest time counts, so that other work on the machine changes the ratio little.
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
        name: What is done.
        plain: What the plain way takes; NaN where it is out of reach.
        ours: What the project takes.
        unit: The unit of both.
        target: The ratio ``plain / ours`` that is asked for; None where none is.
    """

    name: str
    plain: float
    ours: float
    unit: str
    target: float | None = None

    @property
    def ratio(self) -> float:
        """How many times as much the plain way takes."""
        return self.plain / self.ours

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        return None if self.target is None else self.ratio >= self.target


def seconds(work: Work, clock: Callable[[], float]) -> float:
    """What ``work`` takes by a clock."""
    start = clock()
    work()
    return clock() - start


def in_turn(ways: Sequence[Work], repeats: int, clock: Callable[[], float] = time.process_time) -> list[float]:
    """Run the ways in turn and return the smallest time of each, in seconds.

    Args:
        ways: What to compare.
        repeats: Turns that count; one more before them warms up.
        clock: The processor's clock, or the wall's for work on several threads.
    """
    for way in ways:
        way()
    times = [[seconds(way, clock) for way in ways] for _ in range(repeats)]
    return [min(column) for column in zip(*times, strict=True)]


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function(*arguments)`` returns in a process of its own, on one thread, with an untouched allocator."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(function, *arguments).result()


def peak() -> float:
    """The largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage would also count what the parent held when it started this process
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 2**10
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / 2**20 if sys.platform == "darwin" else largest / 2**10


def random_images(dataset: str, count: int, seed: int = 0) -> ImageSet:
    """Noise in the shape of a catalogue data set's training part."""
    entry = lookup(dataset)
    generator = torch.Generator().manual_seed(seed)
    shape = (count, entry.channels, entry.image_size, entry.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return ImageSet(entry, "train", pixels, torch.randint(entry.num_classes, (count,), generator=generator))


class PlainImages(torch.utils.data.Dataset):
    """The plain way: images in memory, turned one at a time into PIL images and transformed."""

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
    """Torchvision's transforms as papers write them: (crop, flip,) to a tensor, normalise."""
    from src._torchvision import torchvision

    transforms = torchvision.transforms

    normal = entry.normalizations[normalization]
    chosen = [transforms.ToTensor(), transforms.Normalize(normal.mean, normal.std)]
    if augmented:
        chosen[:0] = [transforms.RandomCrop(entry.image_size, 4), transforms.RandomHorizontalFlip()]
    return transforms.Compose(chosen)


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one line each under a heading."""
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
    """Run a module's benchmarks, or those named on the command line, and print their rows."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(benchmarks)}")
    parser.add_argument("--quick", action="store_true", help="toy sizes: whether it runs, not how fast")
    args = parser.parse_args()
    if unknown := set(args.names) - set(benchmarks):
        parser.error(f"no benchmark is called {', '.join(unknown)}: choose from {', '.join(benchmarks)}")
    rows = []
    for name in args.names or benchmarks:
        torch.set_num_threads(1)
        rows += benchmarks[name](args.quick)
    print(table(rows))
