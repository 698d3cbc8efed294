"""Unit costs at three sizes with their fits, and from them the cost of the papers' studies.

    python -m benchmarks.unit_costs [training passes retraining curvature selection memory files] \
        [--datasets_folder=data] [--out=docs/results/unit_costs.json]

A unit is measured at three sizes n and fitted by a + b n (selection: a + b n^2) with least squares. Times are CPU
seconds of one thread on real images. The cost of a study is b times its number of examples, summed over its jobs, see
``study_cost``; settings come from workflow/config/. Writes the JSON file and prints the tables of docs/scaling.md.
Measures all groups by default; named groups replace only their part of the JSON file.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import in_fresh_process, peak, seconds
from benchmarks.selection import clustered_class
from mpe import laplace_posterior, predict
from mpe.retraining import one_epoch
from mpe.schedules import own_schedules
from src.artifacts.io import read_json, write_json
from src.artifacts.paths import ROOT
from src.artifacts.store import read_scores, write_scores
from src.coresets.inputs import SelectionInputs, make_groups
from src.coresets.registry import find_method
from src.curvature.ntk import ntk_kernel
from src.curvature.operators import Hessian
from src.datasets import Batches, ImageSet, load_dataset, lookup
from src.datasets.augment import CROP_DRAWS
from src.datasets.files import write_score_table
from src.datasets.imagenet import read_image
from src.devices import PRECISIONS, prepare
from src.jacobians import OutputVariances, Posterior
from src.metrics.samis import score_pair
from src.models import MODELS, build_model
from src.training import Dynamics, Trainer, TrainingConfig
from src.training.config import RECIPES
from src.training.distributed import ProcessGroup
from src.training.ensemble import Ensemble, vectorised_is_faster

TRAIN = {"mnist": 60_000, "fmnist": 60_000, "cifar10": 50_000, "cifar100": 50_000}
TEST = 10_000
THREES_AND_FIVES = 11_552, 1_902  # of MNIST, for training and testing
SIZES = {  # images of an epoch, by model
    "resnet50": (8, 16, 24),
    "resnet18": (32, 64, 96),
    "fastnet": (256, 512, 768),
    "cnn_deepobs": (512, 1024, 1536),
    "resnet20_frn": (512, 1024, 1536),
}
SMALL = (2_000, 4_000, 8_000)  # images of an epoch of other models
BATCHES = {"resnet50": 8, "resnet18": 32, "fastnet": 256}  # images per step of the models of the SAMIS paper
PASSES = {"cnn_deepobs": (50, 100, 200), "resnet20_frn": (32, 64, 128)}  # images of a pass
FEW = (500, 1_000, 2_000)  # images of a pass of other models
DELTA = 60.0
SPECTRUM_STEPS, TRACE_PROBES = 300, 100  # the largest numbers of products of a spectrum
KERNEL_GROUPS = 20


@dataclass(frozen=True)
class Unit:
    """A cost at three sizes.

    Attributes:
        group: The function that measures it, as in the command line.
        name: What is measured.
        unit: Unit of the values.
        size: What n counts.
        sizes: The three sizes.
        values: Their costs.
        power: The cost is fitted by ``a + b n^power``.
    """

    group: str
    name: str
    unit: str
    size: str
    sizes: Sequence[int]
    values: Sequence[float]
    power: int = 1

    @property
    def fit(self) -> tuple[float, float]:
        """The coefficients a and b of the least-squares fit."""
        b, a = np.polyfit(np.array(self.sizes, dtype=np.float64) ** self.power, self.values, 1)
        return float(a), float(b)

    @property
    def error(self) -> float:
        """The largest deviation of the fit from a value, as a fraction of the value."""
        a, b = self.fit
        return max(
            abs(a + b * n**self.power - value) / value for n, value in zip(self.sizes, self.values, strict=True)
        )


def measured(measure: Callable[[int], float], sizes: Sequence[int]) -> list[float]:
    """The cost at each size, after a warm-up at the smallest."""
    measure(sizes[0])
    return [measure(size) for size in sizes]


def cpu(work: Callable[[], object]) -> float:
    return seconds(work, time.process_time)


@cache
def images_of(dataset: str, folder: Path) -> ImageSet:
    return load_dataset(dataset, folder)[0]


def network(model: str, images: ImageSet, seed: int = 0) -> nn.Module:
    entry = images.entry
    return build_model(model, entry.num_classes, entry.channels, entry.image_size, seed=seed)


def batches_of(images: ImageSet, count: int, size: int, kind: str = "mpe", **settings: Any) -> Batches:
    normalization = images.entry.normalizations[kind]
    return Batches(images.subset(torch.arange(count)), size, normalization=normalization, **settings)


# ----------------------------------------------------------------------------------------------- studies


def studies() -> dict[str, dict[str, Any]]:
    """The papers' studies by name, from the workflow's configuration."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((ROOT / "workflow" / "config").glob("*.yaml")):
        found |= yaml.safe_load(path.read_text()).get("studies", {})
    return {name: study for name, study in found.items() if not name.startswith(("digits_", "small_"))}


def mpe_cost(settings: Mapping[str, Any], script: str) -> list[tuple[str, float]]:
    """The units of one experiment of the MPE paper, each with the number of examples that it processes."""
    if script.startswith("7"):
        return []  # minutes of one core
    model, epochs = settings["model"], settings["epochs"]
    n, t = THREES_AND_FIVES if "classes" in settings else (TRAIN[settings["dataset"]], TEST)
    shape = settings["dataset"].removeprefix("f")  # images of fmnist are as large as those of mnist
    optimizer = "iblr" if script.startswith("4") else settings.get("optimizer", "sgd").removesuffix("w")
    end = f"{model} {shape} {optimizer} {settings['bs']}"
    base = (f"training {end}", epochs * (n + t / 3))
    kfac = f"pass {model} {shape} kfac"
    if script.startswith("1"):
        evaluated = (1, 2, 5, 10, 20, 30, 40, 50, 75, 100, 150, 200, 250, 300)
        passes = len({epoch for epoch in evaluated if epoch < epochs} | {epochs})
        structure = "optimizer" if settings.get("optim_var") else settings["var_version"]
        return [base, (f"pass {model} {shape} {structure}", passes * n)]
    if script.startswith("2"):
        models = settings["n_exp"]
        return [(f"retraining {end}", models * epochs * n), (kfac, models * n)]
    if script.startswith("3"):
        models = settings["n_retrain"] + settings.get("n_spread", 0) + 1
        return [base, (kfac, n), (f"retraining {end}", models * settings["epochs_retrain"] * n)]
    if script.startswith("4"):
        return [base, (f"pass {model} {shape} optimizer", 4 * n)]
    models = settings["n_groups"] + 1 if script.startswith("6") else lookup(settings["dataset"]).num_classes
    return [base, (kfac, n), (f"retraining {end}", models * settings["epochs_retrain"] * n)]


def study_cost(study: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The units of a study, each with the number of examples that it processes in all jobs.

    An epoch on n images with evaluation on t test images costs as much as training on n + t/3 images.
    """
    if study["kind"] == "mpe":
        return [part for settings in study["experiments"].values() for part in mpe_cost(settings, study["script"])]
    if study["kind"] == "report":
        return []
    model, dataset, training = study["model"], study["dataset"], study["training"]
    n, seeds = TRAIN[dataset], len(study.get("seeds", ()))
    sgd, sam = (f"training {model} {dataset} {optimizer} {BATCHES[model]}" for optimizer in ("sgd", "sam"))
    if study["kind"] == "memorization":
        count, share = study["members"], study["memorization"]["fraction"]
        epochs = RECIPES[training["recipe"]]["epochs"]
        return [(sgd, count * (epochs * share * n + (n + TEST) / 3))]
    if study["kind"] == "pruning":
        epochs, before = study["selection"]["coreset_epochs"], study["selection"]["coreset_pretrain_epochs"]
        kept = len(study["funcs"]) * sum(study["fractions"]) + 1.0
        runs = len(study["funcs"]) * len(study["fractions"]) + 1
        networks = {"el2n": 5, "forget": 1}
        models = sum(networks.get(func, 0) for func in study["funcs"])
        return [(sgd, seeds * (epochs * (kept * n + runs * TEST / 3) + models * before * (n + TEST / 3)))]
    pairs, share = (10, 0.9) if study["protocol"] == "split" else (1, 1.0)
    runs = seeds * pairs * training["epochs"]
    parts = [(sgd, runs * (share * n + 2 * TEST / 3)), (sam, runs * share * n)]
    parts.append((f"scores {model} {dataset}", seeds * n))
    if study["kind"] == "geometry":
        products = seeds * 2 * (SPECTRUM_STEPS + TRACE_PROBES)
        kernels = seeds * len(study["kernels"]["ntk_velocity_epoch"]) * 2 * KERNEL_GROUPS
        parts.append((f"Hessian {model} {dataset}", products * study["spectrum"]["subset"]))
        parts.append((f"kernel {model} {dataset}", kernels * study["kernels"]["m_samples"]))
    return parts


def wanted(kind: str) -> list[list[str]]:
    """The units of a kind that the studies need, as words."""
    names = {unit for study in studies().values() for unit, _ in study_cost(study)}
    return sorted(name.split()[1:] for name in names if name.split()[0] == kind)


@cache
def flops(model: str, dataset: str) -> int:
    """Floating-point operations of a forward pass of one image."""
    entry = lookup(dataset)
    net = build_model(model, entry.num_classes, entry.channels, entry.image_size, seed=0).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, entry.channels, entry.image_size, entry.image_size))
    return counter.get_total_flops()


PASSES_PER_IMAGE = {"training": 3, "retraining": 3, "scores": 2}  # in forward passes; twice as many for SAM


def operations(parts: Sequence[tuple[str, float]]) -> float:
    """Floating-point operations of the trainings, retrainings and SAMIS scores of a study."""
    total = 0.0
    for unit, count in parts:
        kind, model, dataset, *rest = unit.split()
        forward = PASSES_PER_IMAGE.get(kind, 0) * (2 if "sam" in rest else 1)
        total += count * forward * flops(model, dataset)
    return total


# ----------------------------------------------------------------------------------------------- measuring


def train(model: str, images: ImageSet, optimizer: str, batch: int, count: int) -> float:
    """CPU seconds of one epoch, as the scripts train; evaluation is on two images."""
    entry, net, last = images.entry, network(model, images), MODELS[model].channels_last
    net = net.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    of_samis = model in BATCHES
    shared = {"kind": "samis" if of_samis else "mpe", "channels_last": last}
    augmentation = entry.training_augmentation(True) if of_samis else None
    more = {"delta": DELTA, "hess_init": 0.1} if optimizer == "iblr" else {}
    precision = RECIPES["fast"]["precision"]() if model == "fastnet" else "fp32"
    trainer = Trainer(
        net,
        batches_of(images, count, batch, order="shuffled", augmentation=augmentation, seed=1, **shared),
        batches_of(images, 2, batch, **shared),
        TrainingConfig(epochs=1, optimizer=optimizer, learning_rate=0.001, precision=precision, **more),
    )
    return cpu(trainer.fit)


def training(folder: Path) -> list[Unit]:
    """An epoch, by model, data set, optimizer and batch size."""
    units = []
    for model, dataset, optimizer, batch in wanted("training"):
        sizes, images = SIZES.get(model, SMALL), images_of(dataset, folder)
        if int(batch) < 100 and model not in BATCHES:
            sizes = tuple(n // 4 for n in sizes)
        values = measured(partial(train, model, images, optimizer, int(batch)), sizes)
        name = f"training {model} {dataset} {optimizer} {batch}"
        units.append(Unit("training", name, "CPU s", "images", sizes, values))
    return units


def leave_one_out(model: str, images: ImageSet, structure: str, count: int) -> float:
    """CPU seconds of the variances of all outputs, and of the Laplace posterior unless it is the optimizer's."""
    net = network(model, images).eval()
    batches = batches_of(images, count, min(500, count))

    def work() -> None:
        if structure == "optimizer":
            posterior = Posterior({name: torch.full_like(p, 1e-3).detach() for name, p in net.named_parameters()})
        else:
            posterior = laplace_posterior(net, batches, DELTA, structure=structure)
        with OutputVariances(net, posterior) as engine:
            predict(engine, batches)

    return cpu(work)


def passes(folder: Path) -> list[Unit]:
    """Passes over the training set: leave-one-out estimates, and SAMIS scores of a pair."""
    units = []
    for model, dataset, structure in wanted("pass"):
        sizes, images = PASSES.get(model, FEW), images_of(dataset, folder)
        values = measured(partial(leave_one_out, model, images, structure), sizes)
        units.append(Unit("passes", f"pass {model} {dataset} {structure}", "CPU s", "images", sizes, values))
    for model, dataset in wanted("scores"):
        images, sizes = images_of(dataset, folder), (16, 32, 48)
        layout = torch.channels_last if MODELS[model].channels_last else torch.contiguous_format
        pair = [network(model, images, seed).to(memory_format=layout) for seed in (1, 2)]

        def score(count: int, images: ImageSet = images, pair: list[nn.Module] = pair, model: str = model) -> float:
            batches = batches_of(images, count, 64, "samis", channels_last=MODELS[model].channels_last)
            return cpu(lambda: score_pair(*pair, batches))

        values = measured(score, sizes)
        units.append(Unit("passes", f"scores {model} {dataset}", "CPU s", "images", sizes, values))
    return units


def retraining(folder: Path) -> list[Unit]:
    """An epoch of one of several models that are trained together without some examples, or with several L2 terms."""
    units = []
    for model, dataset, optimizer, batch in wanted("retraining"):
        images, size = images_of(dataset, folder), int(batch)
        sizes = tuple(n // 2 for n in SIZES.get(model, SMALL))
        base, together = network(model, images), vectorised_is_faster(network(model, images), "cpu", size)
        members = 10 if together else 1
        ensemble = Ensemble(base, members, l2=1e-3, optimizer=optimizer, vectorised=together)
        prepared = torch.cat([part.images for part in batches_of(images, sizes[-1], 1000)])

        def epoch(count: int, images=images, ensemble=ensemble, prepared=prepared, size=size) -> float:
            orders = own_schedules([np.empty(0, np.int64)] * len(ensemble), range(len(ensemble)), count)
            part = prepared[:count], images.labels[:count]
            return cpu(lambda: one_epoch(ensemble, *part, orders, size, 1e-3)) / len(ensemble)

        name = f"retraining {model} {dataset} {optimizer} {batch}"
        units.append(Unit("retraining", name, "CPU s", "images", sizes, measured(epoch, sizes)))
    return units


def curvature(folder: Path) -> list[Unit]:
    """A Hessian product and a tangent kernel of all logits."""
    units = []
    for model, dataset in wanted("Hessian"):
        images = images_of(dataset, folder)
        net = network(model, images).eval()
        vector = torch.randn(sum(p.numel() for p in net.parameters()), generator=torch.Generator().manual_seed(0))

        def product(count: int, images=images, net=net, vector=vector) -> float:
            matrix = Hessian(net, batches_of(images, count, 32, "samis"), count)
            return cpu(lambda: matrix @ vector)

        sizes = (16, 32, 48)
        units.append(
            Unit("curvature", f"Hessian {model} {dataset}", "CPU s", "images", sizes, measured(product, sizes))
        )

        def kernel(count: int, images=images, net=net) -> float:
            batch = next(iter(batches_of(images, count, count, "samis")))
            return cpu(lambda: ntk_kernel(net, batch.images, batch.labels))

        sizes = (2, 4, 8)
        units.append(
            Unit("curvature", f"kernel {model} {dataset}", "CPU s", "examples", sizes, measured(kernel, sizes))
        )
    return units


def selection(folder: Path) -> list[Unit]:
    """A tenth of one class by the exact quadratic algorithms."""
    units, sizes = [], (1_000, 2_000, 4_000)
    for name in ("craig", "graph_cut", "k_center", "gradmatch"):
        method = find_method(name)

        def select(count: int, method=method) -> float:
            layer = clustered_class(count, 10, 512)
            inputs = SelectionInputs(layer.labels.numpy(), 10, layers=[layer])
            groups = make_groups(inputs.labels, 10, fraction=0.1)
            return cpu(lambda: method.select(inputs, groups, method.options(selection_subsample="exact")))

        units.append(
            Unit("selection", f"{name}, 10 % of one class", "CPU s", "examples", sizes, measured(select, sizes), 2)
        )
    return units


# ----------------------------------------------------------------------------------------------- memory and files

CLASSES, EPOCHS = 100, 10
LARGE = (50_000, 100_000, 200_000)


def dynamics_peak(count: int) -> float:
    """Growth of the peak memory in bytes while the dynamics of ten epochs are recorded and written."""
    before = peak()
    dynamics, draw = Dynamics(count, CLASSES, torch.device("cpu")), torch.Generator().manual_seed(0)
    logits, labels = torch.randn(1_000, CLASSES, generator=draw), torch.zeros(1_000, dtype=torch.int64)
    for epoch in range(1, EPOCHS + 1):
        for indices in torch.arange(count).split(1_000):
            dynamics.record(logits, labels, indices, labels.float(), labels.float())
        dynamics.end_epoch(epoch, ProcessGroup(), torch.ones(2, CLASSES, dtype=torch.float64))
    with tempfile.TemporaryDirectory() as folder:
        dynamics.write(Path(folder) / "dynamics.npz", np.zeros(count, dtype=np.int64), {})
    return (peak() - before) * 2**20


def epoch_start(count: int) -> tuple[float, float]:
    """CPU seconds and growth of the peak memory in bytes until the first batch of an ImageNet epoch."""
    entry = lookup("imagenet")
    pixels = torch.zeros(1, 3, entry.image_size, entry.image_size, dtype=torch.uint8)
    one = torch.zeros(count, dtype=torch.int64)  # all examples are the same image
    images = ImageSet(entry, "train", pixels, one, rows=one, indices=torch.arange(count))
    settings = {"order": "shuffled", "augmentation": entry.training_augmentation(True), "seed": 1}
    batches = Batches(images, 8, normalization=entry.normalizations["samis"], **settings)
    before = peak()
    taken = cpu(lambda: next(batches.epoch(1)))
    return taken, (peak() - before) * 2**20


def read_peak(path: Path) -> float:
    """Growth of the peak memory in bytes while a score file is read."""
    before = peak()
    read_scores(path)
    return (peak() - before) * 2**20


def write_peak(path: Path, count: int) -> float:
    """Growth of the peak memory in bytes while a score file and its csv file are written."""
    values = np.random.default_rng(0).random(count)
    before = peak()
    write_scores(path, values, {})
    write_score_table(path, values, None)
    return (peak() - before) * 2**20


def decode(folder: Path, count: int) -> float:
    """CPU seconds of reading one JPEG file of ImageNet's usual size ``count`` times, with a random crop."""
    pixels = np.random.default_rng(0).integers(0, 256, (25, 33, 3), dtype=np.uint8)
    path, draws = folder / "photo.jpg", torch.rand(CROP_DRAWS, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    return cpu(lambda: [read_image(path, 224, draws) for _ in range(count)])


def memory(folder: Path) -> list[Unit]:
    """Memory per example: recorded dynamics, the start of an epoch, reading a score file."""
    dynamics = [in_fresh_process(dynamics_peak, size) for size in LARGE]
    starts = [in_fresh_process(epoch_start, size) for size in LARGE]
    name = f"dynamics of {EPOCHS} epochs, {CLASSES} classes: peak memory"
    return [
        Unit("memory", name, "bytes", "examples", LARGE, dynamics),
        Unit("memory", "start of an ImageNet epoch", "CPU s", "examples", LARGE, [start[0] for start in starts]),
        Unit(
            "memory",
            "start of an ImageNet epoch: peak memory",
            "bytes",
            "examples",
            LARGE,
            [one[1] for one in starts],
        ),
    ]


def files(folder: Path) -> list[Unit]:
    """Score files by format, the dynamics file, members of memorization, and the page."""
    scores, reading, writing = {suffix: [] for suffix in (".pkl", ".csv")}, [], []
    dynamics, members, pages, page_times = [], [], [], []
    few, shown, photos = (1_000, 2_000, 4_000), (2_000, 4_000, 8_000), (50, 100, 200)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        for count in LARGE:
            path = base / f"{count}.pkl"
            writing.append(in_fresh_process(write_peak, path, count))
            reading.append(in_fresh_process(read_peak, path))
            for suffix, sizes in scores.items():
                sizes.append(path.with_suffix(suffix).stat().st_size)
            recorded = Dynamics(count, CLASSES, torch.device("cpu"))
            recorded.end_epoch(1, ProcessGroup(), torch.ones(2, CLASSES, dtype=torch.float64))
            file = recorded.write(base / f"dynamics_{count}.npz", np.zeros(count, dtype=np.int64), {})
            dynamics.append(file.stat().st_size - 8 * count)  # without the labels
        for count in few:
            flags = "--dataset=mnist --model=small_mlp --members=10 --epochs=1 --batch_size=256 --train_only"
            run_script("compute_memorization.py", folder, *flags.split(), f"--subset={count}",
                       f"--metrics_folder={base / str(count)}")  # fmt: skip
            members.append(sum(path.stat().st_size for path in (base / str(count)).rglob("*.npz")) / 10)
        decoding = measured(partial(decode, base), photos)
        write_scores(base / "scores/sam_sgd/samis_loss_mnist.pkl", np.random.default_rng(0).random(60_000), {})
        for count in shown:
            page = base / f"{count}.html"
            taken = run_script("make_report.py", folder, "--dataset=mnist", f"--examples={count}", f"--out={page}",
                               f"--scores_folder={base / 'scores'}", "--modes", "samis_loss")  # fmt: skip
            page_times.append(taken)
            pages.append(page.stat().st_size)
    return [
        *(
            Unit("files", f"score file, {suffix}", "bytes", "examples", LARGE, sizes)
            for suffix, sizes in scores.items()
        ),
        Unit("files", "writing a score file, pkl and csv: peak memory", "bytes", "examples", LARGE, writing),
        Unit("files", "reading a score file: peak memory", "bytes", "examples", LARGE, reading),
        Unit("files", "reading JPEGs of 500x375, random crop", "CPU s", "images", photos, decoding),
        Unit("files", "dynamics file, per epoch", "bytes", "examples", LARGE, dynamics),
        Unit("files", "predictions of one member, with 10,000 test images", "bytes", "examples", few, members),
        Unit("files", "page of MNIST with one score", "CPU s", "examples shown", shown, page_times),
        Unit("files", "page of MNIST with one score: size", "bytes", "examples shown", shown, pages),
    ]


def run_script(name: str, folder: Path, *flags: str) -> float:
    """Run a script and return its CPU seconds."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    command = [sys.executable, ROOT / name, f"--datasets_folder={folder}", *flags]
    subprocess.run(command, check=True, capture_output=True)
    return spent() - before


# ----------------------------------------------------------------------------------------------- output

GROUPS = {
    "training": training,
    "passes": passes,
    "retraining": retraining,
    "curvature": curvature,
    "selection": selection,
    "memory": memory,
    "files": files,
}


def unit_table(units: Sequence[Unit]) -> str:
    """The units as Markdown."""
    lines = ["| what | sizes n | measured | unit | fit | largest error | command |", "|---|---|---|---|---|---|---|"]
    for one in units:
        a, b = one.fit
        sizes, values = (", ".join(f"{x:,}" for x in one.sizes), ", ".join(f"{x:.3g}" for x in one.values))
        if one.unit == "bytes":
            values = ", ".join(f"{x:,.0f}" for x in one.values)
        power = "n" if one.power == 1 else f"n^{one.power}"
        sign = "-" if a < 0 else "+"
        slope = f"{b:,.1f}" if one.unit == "bytes" else f"{b:.3g}"
        start = f"{abs(a):,.0f}" if one.unit == "bytes" else f"{abs(a):.2g}"
        lines.append(
            f"| {one.name} | {sizes} {one.size} | {values} | {one.unit} | {slope} {power} {sign} {start} "
            f"| {100 * one.error:.0f} % | `{one.group}` |"
        )
    return "\n".join(lines)


def study_table(units: Mapping[str, Unit]) -> tuple[str, dict[str, dict[str, float]]]:
    """The studies as Markdown and as numbers."""
    lines = ["| study | core-hours | share of the largest part | 10^18 operations |", "|---|---|---|---|"]
    costs = {}
    for name, study in studies().items():
        parts = study_cost(study)
        if not parts or any(unit not in units for unit, _ in parts):
            continue
        hours: dict[str, float] = {}
        for unit, count in parts:
            kind = unit.split()[0]
            hours[kind] = hours.get(kind, 0.0) + units[unit].fit[1] * count / 3600
        largest = max(hours, key=hours.get)
        total, work = sum(hours.values()), operations(parts)
        costs[name] = {"core_hours": total, "operations": work}
        lines.append(
            f"| `{name}` | {total:,.3g} | {100 * hours[largest] / total:.0f} % {largest} | {work / 1e18:,.3g} |"
        )
    return "\n".join(lines), costs


def main() -> None:
    """Measure, fit, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"{', '.join(GROUPS)} (default: all)")
    parser.add_argument("--datasets_folder", type=Path, default=ROOT / "data", help="folder of data sets")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "unit_costs.json", help="JSON file")
    args = parser.parse_args()
    if unknown := set(args.groups) - set(GROUPS):
        parser.error(f"unknown group {', '.join(unknown)}; choose from {', '.join(GROUPS)}")
    torch.set_num_threads(1)
    prepare(torch.device("cpu"), PRECISIONS["fp32"], deterministic=False)
    stored = read_json(args.out)["units"] if args.out.exists() else []
    units = {one["name"]: Unit(**{key: one[key] for key in Unit.__dataclass_fields__}) for one in stored}
    for group in args.groups or GROUPS:
        units = {name: unit for name, unit in units.items() if unit.group != group}
        units |= {unit.name: unit for unit in GROUPS[group](args.datasets_folder)}
    ordered = sorted(units.values(), key=lambda unit: list(GROUPS).index(unit.group))
    table, costs = study_table(units)
    print(f"{unit_table(ordered)}\n\n{table}\n")
    rows = [{**asdict(unit), "a": unit.fit[0], "b": unit.fit[1], "error": unit.error} for unit in ordered]
    print(write_json(args.out, {"units": rows, "studies": costs}))


if __name__ == "__main__":
    main()
