"""Files, startup and memory: costs other than computation.

python -m benchmarks.files [memory checkpoints start photos figures] [--quick]
"""

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from benchmarks.common import Row, in_fresh_process, in_turn, peak, random_images, run
from src.artifacts.io import save_figure
from src.artifacts.paths import ROOT
from src.datasets import Batches, load_dataset
from src.datasets.decoding import as_seen, open_image
from src.datasets.own import resize
from src.devices import PRECISIONS, prepare
from src.figures import DPI
from src.metrics.plots import image_grid
from src.models import build_model
from src.training import RunFiles, Trainer, TrainingConfig, run_training


def write_images(folder: Path, count: int) -> Path:
    """Write an npz file of ``count`` color noise images."""
    rng = np.random.default_rng(0)
    path = folder / f"noise_{count}.npz"
    np.savez(
        path,
        x_train=rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
        y_train=np.arange(count) % 10,
        x_test=np.zeros((10, 32, 32, 3), np.uint8),
        y_test=np.arange(10),
    )
    return path


def growth(way: Callable[[Path], None], paths: Sequence[Path]) -> float:
    """Return the growth of peak memory from the first file to the second, in MiB."""
    peaks = []
    for path in paths:
        way(path)
        peaks.append(peak())
    return max(peaks[1] - peaks[0], 0.1)


def our_run(path: Path) -> None:
    """Train with this project's loop."""
    prepare(torch.device("cpu"), PRECISIONS["fp32"], deterministic=False)
    train, test = load_dataset(f"npz:{path}", path.parent)
    normal = train.entry.normalizations["samis"]
    trainer = Trainer(
        build_model("mlp", 10, 3, 32, seed=0),
        Batches(train, 128, normalization=normal, order="shuffled", augmentation=train.entry.augmentation),
        Batches(test, 128, normalization=normal),
        TrainingConfig(epochs=1),
    )
    trainer.fit()


def plain_run(path: Path) -> None:
    """Train with a loop over a TensorDataset of normalized images."""
    with np.load(path) as file:
        images = torch.from_numpy(file["x_train"]).permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.25)
        labels = torch.from_numpy(file["y_train"])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 128, shuffle=True)
    model = build_model("mlp", 10, 3, 32, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch, target in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(batch), target).backward()
        optimizer.step()


def memory(quick: bool = False) -> list[Row]:
    """Measure the memory that a training run needs for its images, compared with their size in bytes.

    A process reads one batch of images from an npz file and trains on it for an epoch, then does the same with many.
    The growth of its peak resident memory is the cost of the images. Ours should need one uint8 copy (ratio 4 to a
    float32 copy). The plain implementation keeps normalized float32 images in a TensorDataset.
    """
    count = 2_000 if quick else 40_000
    measured = growth if quick else partial(in_fresh_process, growth)
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_images(Path(folder), n) for n in (128, count)]
        extra = {way: measured(way, paths) for way in (plain_run, our_run)}
    copy = (count - 128) * 3 * 32**2 / 2**20
    name = f"memory of {count:,} CIFAR-sized images"
    return [
        Row(f"{name}: float32 copy", extra[plain_run], extra[our_run], "MiB at the peak", 3.5),
        Row(f"{name}: their bytes as uint8", copy, extra[our_run], "MiB at the peak", 0.8),
    ]


def written(work: Callable[[], object]) -> int:
    """Return the number of bytes that this process writes to files during ``work``, over all its threads."""

    def now() -> int:
        return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])

    before = now()
    work()
    return now() - before


def checkpoints(quick: bool = False) -> list[Row]:
    """Measure the cost of an epoch's files: bytes written, and wall seconds that the training loop waits.

    The plain implementation calls ``torch.save`` in the loop for the resume state, the epoch's checkpoint and the
    best one, without waiting for the disk. Ours is ``run_training``: the loop's time minus the time of the epochs,
    which its background thread may slow down. The last row is the total time.
    """
    name, epochs, count = ("resnet8", 2, 8) if quick else ("resnet18", 4, 64)
    images = random_images("cifar10", count)
    normal = {"normalization": images.entry.normalizations["samis"]}
    measured: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
    for ours in (False, True) * (1 if quick else 3):
        trainer = Trainer(
            build_model(name, 10, 3, 32, seed=0),
            Batches(images, count // 2, order="shuffled", **normal),
            Batches(images.subset(torch.arange(2)), 2, **normal),
            TrainingConfig(epochs=epochs),
        )
        with tempfile.TemporaryDirectory() as folder:

            def plain(trainer: Trainer = trainer, folder: str = folder) -> None:
                for epoch in trainer.epochs():
                    trainer.train_epoch(epoch)
                    model = {"model_state": trainer.model.state_dict()}
                    for file, state in ((epoch, trainer.state()), (f"epoch_{epoch}", model), ("best", model)):
                        torch.save(state, Path(folder, f"{file}.pt"))

            def own(trainer: Trainer = trainer, folder: str = folder) -> None:
                run_training(trainer, RunFiles(Path(folder, "a"), Path(folder, "b")), {}, {})

            start = time.perf_counter()
            size = written(own if ours else plain)
            total = time.perf_counter() - start
        waits = total - sum(record["seconds"] for record in trainer.history)
        measured[ours].append((size / 1e6 / epochs, waits / epochs, total / epochs))
    theirs, mine = (np.min(measured[ours], axis=0) for ours in (False, True))
    names = ("written", "waiting for files", "in all")
    units = ("MB per epoch", "s per epoch (wall)", "s per epoch (wall)")
    return [
        Row(f"checkpoints, {name}: {what}", *both, unit)
        for what, both, unit in zip(names, zip(theirs, mine, strict=True), units, strict=True)
    ]


STARTS = {
    "train_full.py": "--model=lenet --epochs=1",
    "train_prune.py": "--model=lenet --coreset_func=random --coreset_fraction=0.5 --coreset_epochs=1",
    "examples/1_loo_iterations.py": "--model=small_mlp --epochs=1 --bs=32",
}


def children_seconds() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    spent = os.times()
    return spent.children_user + spent.children_system


def start(quick: bool = False) -> list[Row]:
    """Time full script runs on 50 digits images for one epoch, compared with ``import torch``.

    Training takes a few hundredths of a second. The estimates in 1_loo_iterations.py differentiate with given output
    gradients, for which torch imports sympy.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = [f"--{name}_folder={folder}" for name in ("datasets", "models", "log", "resume_ckpts")]
        lines = {
            script: [script, "--dataset=digits", "--subset=50", *flags.split(), *places, "--overwrite"]
            for script, flags in STARTS.items()
        }
        lines["examples/1_loo_iterations.py"].append(f"--pickles_folder={folder}")

        def run_python(*words: str) -> None:
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)

        ways = [partial(run_python, "-c", "import torch"), *(partial(run_python, *line) for line in lines.values())]
        plain, *ours = in_turn(ways, 1 if quick else 5, children_seconds)
    return [Row(f"start of {script}", plain, own, "s", 0.65) for script, own in zip(lines, ours, strict=True)]


def photos(quick: bool = False) -> list[Row]:
    """Time loading a folder of photos: decoded in full, decoded in draft mode, and read from an earlier run's cache.

    The photos are 1600x1200 JPEG files of random waves of all wavelengths, with larger amplitudes at longer ones, and
    the image size is 64. The plain implementation decodes them in full, one after another. Times are CPU seconds,
    so the gain from several threads shows only in the wall-clock row.
    """
    count, repeats = (4, 1) if quick else (100, 3)
    with tempfile.TemporaryDirectory() as base:
        root = Path(base) / "photos"
        for number in range(count):
            folder = root / ("test" if number % 4 == 3 else "train") / f"class_{number % 8 // 4}"
            folder.mkdir(parents=True, exist_ok=True)
            _photo(number).save(folder / f"{number}.jpg", quality=90)
        for part in ("train", "test"):  # a quick run has too few photos for every class in every part
            (root / part / "class_1").mkdir(exist_ok=True)
            _photo(count).save(root / part / "class_1" / "last.jpg", quality=90)
        files = sorted(root.rglob("*.jpg"))

        def plainly() -> list[Tensor]:
            decoded = []
            for path in files:
                with path.open("rb") as file:
                    pixels, _ = as_seen(open_image(file)[0], None)
                decoded.append(resize(torch.from_numpy(pixels)[None], 64))
            return decoded

        def start(decode: str, cache: str) -> None:
            load_dataset(f"folder:{root}", base, image_size=64, decode=decode, cache_folder=Path(base) / cache)

        (Path(base) / "none").write_text("")  # a file, so no cache can be written inside it
        log = logging.getLogger("src.datasets.own")
        log.disabled = True
        ways = (plainly, lambda: start("draft", "none"), lambda: start("draft", "kept"))
        while time.time() < max(path.stat().st_ctime for path in files) + 3:
            time.sleep(0.1)  # the cache does not trust the timestamps of newer photos
        times = [1_000 / len(files) * taken for taken in in_turn(ways, repeats)]
        walls = [1_000 / len(files) * taken for taken in in_turn(ways[:2], repeats, time.perf_counter)]
        log.disabled = False
    unit = "s per 1,000 photos of 1600x1200"
    return [
        Row("loading photos, decoded in draft mode", times[0], times[1], unit),
        Row(f"loading photos, decoded in draft mode, wall clock, {os.cpu_count()} CPUs", *walls, unit),
        Row("loading photos from the cache", times[0], times[2], unit),
    ]


def _photo(seed: int) -> Image.Image:
    """Return an image of random waves."""
    generator = np.random.default_rng(seed)
    size = (1200, 1600)
    frequency = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None])
    frequency[0, 0] = 1
    waves = generator.normal(size=(2, 3, *frequency.shape)) / frequency**1.5
    image = np.fft.irfft2(waves[0] + 1j * waves[1], size).transpose(1, 2, 0)
    return Image.fromarray(np.clip(128 + 55 * (image - image.mean()) / image.std(), 0, 255).astype(np.uint8))


def figures(quick: bool = False) -> list[Row]:
    """Time a figure of three rows of five images with scores, as PNG and PDF, compared with one axes per image."""
    rows = []
    for size in (8,) if quick else (32, 224):
        draw = np.random.default_rng(0)
        small = draw.integers(0, 256, (15, 12, 12, 3), dtype=np.uint8)
        images = np.stack([np.asarray(Image.fromarray(image).resize((size, size), 3)) for image in small])
        scores, symbols = [f"{score:.3g}" for score in draw.random(15)], ["$S(x_i)$", "$F(x_i)$", "$M(x_i)$"]

        def plain(folder: str, images: np.ndarray = images, scores: list = scores, symbols: list = symbols) -> None:
            figure = Figure(figsize=(4.9, 3.3), layout="constrained")
            grid = figure.subplots(3, 5)
            for axes, image, score in zip(grid.flat, images, scores, strict=True):
                axes.imshow(image)
                axes.set(xticks=[], yticks=[], xlabel=score)
            for axes, symbol in zip(grid[:, 0], symbols, strict=True):
                axes.set_ylabel(symbol, rotation=0)
            figure.suptitle("lowest 5")
            for kind in ("png", "pdf"):
                with matplotlib.rc_context({"pdf.fonttype": 42}):  # as journals require, and as save_figure does
                    figure.savefig(Path(folder, f"plain.{kind}"), dpi=DPI)

        def own(folder: str, images: np.ndarray = images, scores: list = scores, symbols: list = symbols) -> None:
            parts = np.split(images.transpose(0, 3, 1, 2), 3)
            captions = [scores[5 * k : 5 * k + 5] for k in range(3)]
            save_figure(image_grid(parts, captions, symbols, "lowest 5"), Path(folder, "own"))

        with tempfile.TemporaryDirectory() as folder:
            times = in_turn([partial(plain, folder), partial(own, folder)], 1 if quick else 5)
        rows.append(Row(f"a figure of 15 images of {size}x{size}, PNG and PDF", *times, "s"))
    return rows


BENCHMARKS = {
    "memory": memory,
    "checkpoints": checkpoints,
    "start": start,
    "photos": photos,
    "figures": figures,
}

if __name__ == "__main__":
    run(BENCHMARKS, __doc__)
