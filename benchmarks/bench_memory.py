"""How much memory a training run needs for its images.

    python -m benchmarks.bench_memory [--quick]

A process reads one batch of images from an npz file and trains an epoch on it, then does the same with many: by how
much the peak of its resident memory grows is what the images cost. Ours should need one copy as uint8 (ratio 4
to a copy in float32); the plain way keeps normalised float32 images in a TensorDataset.
"""

import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.common import Row, in_fresh_process, run
from src.datasets import Batches, load_dataset
from src.devices import PRECISIONS, prepare
from src.models import build_model
from src.training import Trainer, TrainingConfig

BATCH, SIZE = 128, 32
TARGET = 3.5


def write_images(folder: Path, count: int) -> Path:
    """An npz file of ``count`` colour images of noise."""
    rng = np.random.default_rng(0)
    path = folder / f"noise_{count}.npz"
    np.savez(
        path,
        x_train=rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8),
        y_train=np.arange(count) % 10,
        x_test=np.zeros((10, SIZE, SIZE, 3), np.uint8),
        y_test=np.arange(10),
    )
    return path


def peak() -> float:
    """The largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage would also count what the parent held when it started this process
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 2**10
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / 2**20 if sys.platform == "darwin" else largest / 2**10


def growth(way: Callable[[Path], None], paths: Sequence[Path]) -> float:
    """By how much the peak grows from the first file to the second, in MiB."""
    torch.set_num_threads(1)
    peaks = []
    for path in paths:
        way(path)
        peaks.append(peak())
    return max(peaks[1] - peaks[0], 0.1)


def ours(path: Path) -> None:
    """A run of ours."""
    prepare(torch.device("cpu"), PRECISIONS["fp32"], deterministic=False)
    train, test = load_dataset(f"npz:{path}", path.parent)
    normal = train.entry.normalisations["samis"]
    trainer = Trainer(
        build_model("mlp", 10, 3, SIZE, seed=0),
        Batches(train, BATCH, normalisation=normal, order="shuffled", augmentation=train.entry.augmentation),
        Batches(test, BATCH, normalisation=normal),
        TrainingConfig(epochs=1),
    )
    trainer.fit()


def plain(path: Path) -> None:
    """A loop over a TensorDataset of normalised images."""
    with np.load(path) as file:
        images = torch.from_numpy(file["x_train"]).permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.25)
        labels = torch.from_numpy(file["y_train"])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), BATCH, shuffle=True)
    model = build_model("mlp", 10, 3, SIZE, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch, target in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(batch), target).backward()
        optimizer.step()


def measure(quick: bool = False) -> list[Row]:
    """The images' memory both ways, and ours against the bytes of the images themselves."""
    count = 2_000 if quick else 40_000
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_images(Path(folder), n) for n in (BATCH, count)]
        extra = {way: in_fresh_process(growth, way, paths) for way in (plain, ours)}
    copy = (count - BATCH) * 3 * SIZE**2 / 2**20
    name = f"memory of {count:,} CIFAR-sized images"
    return [
        Row(f"{name}: float32 copy", extra[plain], extra[ours], "MiB at the peak", TARGET),
        Row(f"{name}: their bytes as uint8", copy, extra[ours], "MiB at the peak", 0.8),
    ]


def main() -> None:
    run(measure, __doc__)


if __name__ == "__main__":
    main()
