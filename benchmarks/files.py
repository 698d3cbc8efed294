"""Memory, files, start-up and figures.

python -m benchmarks.files [memory checkpoints start photos figures grid] [--quick]
"""

import copy
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from benchmarks.common import Row, fast_batches, in_fresh_process, in_turn, peak, random_images, run
from src.artifacts.io import save_figure
from src.artifacts.paths import ROOT, TRAINING_FOLDERS, Folders
from src.context import RunContext
from src.coresets.config import GridConfig, PretrainConfig, SelectionConfig
from src.coresets.grid import Grid
from src.datasets import Batches, DataConfig, Normalization, load_dataset
from src.datasets.decoding import as_seen, open_image
from src.datasets.own import resize
from src.devices import PRECISIONS, ComputeConfig, prepare
from src.figures import DPI
from src.metrics.plots import image_grid
from src.models import ModelConfig, build_model
from src.training import RunConfig, RunFiles, Trainer, TrainingConfig, run_training


def write_images(folder: Path, count: int) -> Path:
    """Write an npz file of ``count`` color images of noise."""
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
    """Growth of the peak memory from the first file to the second, in MiB."""
    peaks = []
    for path in paths:
        way(path)
        peaks.append(peak())
    return max(peaks[1] - peaks[0], 0.1)


def our_run(path: Path) -> None:
    """An epoch of the Trainer."""
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


def fast_run(path: Path) -> None:
    """The usual training loop over an airbench-like loader."""
    with np.load(path) as file:
        pixels = torch.from_numpy(file["x_train"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(file["y_train"])
    model = build_model("mlp", 10, 3, 32, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    normalization = Normalization((0.5,) * 3, (0.25,) * 3)
    for images, targets in fast_batches(pixels, labels, 128, normalization, augmented=True):
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()


def memory(quick: bool = False) -> list[Row]:
    """Memory of a training run for its images.

    A process reads one batch of images from an npz file and trains for an epoch on it, then does the same with many
    images. The growth of its peak memory is the cost of the images. The alternative is an airbench-like loader, whose
    padded copy of the images counts. The second row compares with the bytes of the images, the limit.
    """
    count = 2_000 if quick else 40_000
    measured = growth if quick else partial(in_fresh_process, growth)
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_images(Path(folder), n) for n in (128, count)]
        extra = {way: measured(way, paths) for way in (fast_run, our_run)}
    least = (count - 128) * 3 * 32**2 / 2**20
    name = f"peak memory of training on {count:,} CIFAR-sized images"
    return [
        Row(name, None, extra[fast_run], extra[our_run], "MiB", 1.8),
        Row(f"{name}, compared with their bytes", None, least, extra[our_run], "MiB", 0.8),
    ]


def written(work: Callable[[], object]) -> int:
    """Bytes that this process, with all its threads, writes to files during ``work``."""

    def now() -> int:
        return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])

    before = now()
    work()
    return now() - before


def save_in_loop(trainer: Trainer, folder: Path) -> None:
    """The papers' code: ``torch.save`` of the resume state, the epoch's checkpoint and the best one, in the loop."""
    for epoch in trainer.epochs():
        trainer.train_epoch(epoch)
        model = {"model_state": trainer.model.state_dict()}
        for file, state in ((epoch, trainer.state()), (f"epoch_{epoch}", model), ("best", model)):
            torch.save(state, folder / f"{file}.pt")


def save_in_background(trainer: Trainer, folder: Path) -> None:
    """The strongest alternative: a thread saves copies, and the best checkpoint is a link to the epoch's."""

    def save(states: dict[str, object]) -> None:
        for file, state in states.items():
            torch.save(state, folder / f"{file}.pt")
        best = folder / "best.pt"
        best.unlink(missing_ok=True)
        os.link(folder / f"{file}.pt", best)

    with ThreadPoolExecutor(1) as pool:
        for epoch in trainer.epochs():
            trainer.train_epoch(epoch)
            state = {f"{epoch}": trainer.state(), f"epoch_{epoch}": {"model_state": trainer.model.state_dict()}}
            pool.submit(save, copy.deepcopy(state))


def save_ours(trainer: Trainer, folder: Path) -> None:
    """``run_training``."""
    run_training(trainer, RunFiles(folder / "a", folder / "b"), {}, {})


def checkpoints(quick: bool = False) -> list[Row]:
    """Cost of an epoch's files: bytes written, wall seconds that the training loop waits, and CPU seconds.

    Neither alternative waits for the disk; this project does, and its background thread may slow down training.
    The waiting time excludes the epochs themselves; the last row is the CPU time of all threads, epochs included.
    """
    name, epochs, count = ("resnet8", 2, 8) if quick else ("resnet18", 4, 64)
    images = random_images("cifar10", count)
    normal = {"normalization": images.entry.normalizations["samis"]}
    ways = (save_in_loop, save_in_background, save_ours)
    measured: dict[Callable, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for way in ways * (1 if quick else 3):
        trainer = Trainer(
            build_model(name, 10, 3, 32, seed=0),
            Batches(images, count // 2, order="shuffled", **normal),
            Batches(images.subset(torch.arange(2)), 2, **normal),
            TrainingConfig(epochs=epochs),
        )
        with tempfile.TemporaryDirectory() as folder:
            start, spent = time.perf_counter(), time.process_time()
            size = written(partial(way, trainer, Path(folder)))
            spent = time.process_time() - spent
            waits = time.perf_counter() - start - sum(record["seconds"] for record in trainer.history)
        measured[way].append((size / 1e6 / epochs, waits / epochs, spent / epochs))
    best = [np.min(measured[way], axis=0) for way in ways]
    names = ("checkpoints, bytes written", "checkpoints, waiting for files", "epoch with checkpoints")
    units = ("MB per epoch", "s per epoch (wall)", "s per epoch")
    return [
        Row(f"{what}, {name}", *values, unit)
        for what, values, unit in zip(names, zip(*best, strict=True), units, strict=True)
    ]


STARTS = {
    "train_full.py": "--model=lenet --epochs=1",
    "train_prune.py": "--model=lenet --coreset_func=random --coreset_fraction=0.5 --coreset_epochs=1",
    "examples/1_loo_iterations.py": "--model=small_mlp --epochs=1 --bs=32",
}


def children_seconds() -> float:
    """CPU seconds of the child processes that have ended."""
    spent = os.times()
    return spent.children_user + spent.children_system


def start(quick: bool = False) -> list[Row]:
    """Whole scripts on 50 images of digits for one epoch, against ``import torch``, the only sensible comparison.

    The training itself takes a few hundredths of a second. For the estimates of 1_loo_iterations.py, which
    differentiate with given output gradients, torch imports sympy.
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
    return [
        Row(f"{script} on 50 digits, compared with import torch", None, plain, own, "s", 0.6)
        for script, own in zip(lines, ours, strict=True)
    ]


def photos(quick: bool = False) -> list[Row]:
    """Loading a folder of photos: 100 JPEG files of 1600x1200 pixels at image size 64.

    Authors: each photo is decoded in full, one after another, as by torchvision. Strongest alternative: PIL's draft
    mode and a resize, one after another; for a later start, ``np.load`` of the decoded images. Ours checks every file
    for changes on a later start. The wall-clock row includes the gain of several threads.
    """
    count, repeats = (4, 1) if quick else (100, 3)
    with tempfile.TemporaryDirectory() as base:
        root = Path(base) / "photos"
        for number in range(count):
            folder = root / ("test" if number % 4 == 3 else "train") / f"class_{number % 8 // 4}"
            folder.mkdir(parents=True, exist_ok=True)
            _photo(number).save(folder / f"{number}.jpg", quality=90)
        for part in ("train", "test"):  # a quick run has too few photos for each class of each part
            (root / part / "class_1").mkdir(exist_ok=True)
            _photo(count).save(root / part / "class_1" / "last.jpg", quality=90)
        files = sorted(root.rglob("*.jpg"))

        def in_full() -> list[Tensor]:
            decoded = []
            for path in files:
                with path.open("rb") as file:
                    pixels, _ = as_seen(open_image(file)[0], None)
                decoded.append(resize(torch.from_numpy(pixels)[None], 64))
            return decoded

        def by_draft() -> np.ndarray:
            decoded = []
            for path in files:
                with Image.open(path) as image:
                    image.draft("RGB", (64, 64))
                    decoded.append(np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)))
            return np.stack(decoded)

        def start(decode: str, cache: str) -> None:
            load_dataset(f"folder:{root}", base, image_size=64, decode=decode, cache_folder=Path(base) / cache)

        (Path(base) / "none").write_text("")  # a file, so that no cache can be written below it
        kept = Path(base) / "decoded.npy"
        np.save(kept, by_draft())
        log = logging.getLogger("src.datasets.own_images")
        log.disabled = True
        ways = (in_full, by_draft, lambda: start("draft", "none"))
        while time.time() < max(path.stat().st_ctime for path in files) + 3:
            time.sleep(0.1)  # more recently changed photos are not read from the cache
        times, walls = in_turn(ways, repeats), in_turn(ways, repeats, time.perf_counter)
        later = in_turn((lambda: np.load(kept), lambda: start("draft", "kept")), repeats)
        log.disabled = False
    scale, unit = 1_000 / len(files), "s per 1,000 of 1600x1200"
    return [
        Row("first start with photos", *(scale * t for t in times), unit),
        Row(f"first start with photos, {os.cpu_count()} cores", *(scale * t for t in walls), f"{unit} (wall)"),
        Row("later start with photos", scale * times[0], *(scale * t for t in later), unit),
    ]


def _photo(seed: int) -> Image.Image:
    """A synthetic photo of random waves, in which low frequencies are strongest."""
    generator = np.random.default_rng(seed)
    size = (1200, 1600)
    frequency = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None])
    frequency[0, 0] = 1
    waves = generator.normal(size=(2, 3, *frequency.shape)) / frequency**1.5
    image = np.fft.irfft2(waves[0] + 1j * waves[1], size).transpose(1, 2, 0)
    return Image.fromarray(np.clip(128 + 55 * (image - image.mean()) / image.std(), 0, 255).astype(np.uint8))


def figures(quick: bool = False) -> list[Row]:
    """Three rows of five images with their scores, as PNG and PDF; the only alternative is one axes per image."""
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
        rows.append(Row(f"figure of 15 images of {size}x{size}, PNG and PDF", None, *times, "s"))
    return rows


def grid(quick: bool = False) -> list[Row]:
    """A grid of short runs on digits: its figure is drawn after every run, or once a minute, which is the default."""
    seeds, epochs = ([1], 1) if quick else ([1, 2], 5)
    config = GridConfig(funcs=["random", "csl", "forget"], fractions=[0.1, 0.5], seeds=seeds)
    run_config = RunConfig(
        ModelConfig("small_mlp"), TrainingConfig(epochs=epochs, learning_rate=0.05, lr_sched="const"), batch_size=64
    )
    selections = {name: SelectionConfig(coreset_func=name) for name in config.funcs}
    pretrain = PretrainConfig(coreset_pretrain_epochs=2)
    warned, times = logging.root.level, {-1.0: math.inf, 60.0: math.inf}
    logging.root.setLevel(logging.WARNING)
    for every in list(times) * (1 if quick else 3):
        with tempfile.TemporaryDirectory() as name, mock.patch("src.coresets.grid._DRAW_EVERY", every):
            folders = Folders(**{kind: Path(name, kind) for kind in (*TRAINING_FOLDERS, "plots_folder")})
            with RunContext(DataConfig("digits"), ComputeConfig(), folders.datasets_folder, seed=1) as context:
                table = Grid(context, config, selections, pretrain, run_config, folders)
                start = time.process_time()
                table.run()
                table.write()
                times[every] = min(times[every], time.process_time() - start)
    logging.root.setLevel(warned)
    return [
        Row(
            f"grid of {len(table.runs)} runs: figure after each / at most once a minute",
            None,
            *times.values(),
            "s",
            variant=True,
        )
    ]


BENCHMARKS = {
    "memory": memory,
    "checkpoints": checkpoints,
    "start": start,
    "photos": photos,
    "figures": figures,
    "grid": grid,
}

if __name__ == "__main__":
    run(BENCHMARKS, __doc__)
