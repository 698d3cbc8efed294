"""Loading, training on and scoring images, compared with standard loops.

python -m benchmarks.training [batches scoring steps optimizers ensemble] [--quick]
"""

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import PlainImages, Row, in_fresh_process, in_turn, random_images, run
from mpe.retraining import one_epoch
from mpe.schedules import MemberSchedules, own_schedules
from src.datasets import Batches, lookup
from src.devices import PRECISIONS, prepare
from src.metrics.samis import score_pair
from src.models import MODELS, build_model
from src.optimizers import IvonOpt, build_optimizer
from src.training import Dynamics, Trainer, TrainingConfig
from src.training.ensemble import Ensemble, vectorised_is_faster


def prepared_images(quick: bool) -> Row:
    """Time one sequential pass, and check that the images are equal."""
    count, repeats = (256, 1) if quick else (10_000, 3)
    images = random_images("mnist", count)
    batches = Batches(images, 256, normalization=images.entry.normalizations["mpe"])
    loader = torch.utils.data.DataLoader(PlainImages(images, augmented=False, normalization="mpe"), 256)
    for theirs, own in zip(loader, batches, strict=True):
        if not torch.equal(theirs[0], own.images):
            raise RuntimeError("the two implementations return different images")
    plain, ours = in_turn(
        (lambda: [batch[0].shape for batch in loader], lambda: [batch.images.shape for batch in batches]), repeats
    )
    scale = 1e6 / count
    return Row("images prepared, MNIST", plain * scale, ours * scale, "us per image", 20.0)


def batches(quick: bool = False) -> list[Row]:
    """Compare Batches with a DataLoader over PIL transforms.

    Uses CIFAR-sized random images with batch size 128, random crop with padding 4, horizontal flip and normalization;
    and MNIST-sized images with batch size 256, in order and only normalized, as in the sensitivity experiments. For
    the latter, both implementations must return exactly the same numbers.

    Raises:
        RuntimeError: The two implementations disagree.
    """
    count, repeats = (256, 1) if quick else (5_000, 3)
    images = random_images("cifar10", count)
    entry = images.entry
    batches = Batches(
        images,
        128,
        normalization=entry.normalizations["samis"],
        order="shuffled",
        augmentation=entry.training_augmentation(True),
        seed=1,
    )
    loader = torch.utils.data.DataLoader(PlainImages(images, augmented=True), 128, shuffle=True)
    plain, ours = in_turn(
        (lambda: [batch[0].shape for batch in loader], lambda: [batch.images.shape for batch in batches.epoch(1)]),
        repeats,
    )
    scale = 50_000 / count
    row = Row("epoch of batches, crop and flip", plain * scale, ours * scale, "s per 50,000 images", 12.0)
    return [row, prepared_images(quick)]


@dataclass(frozen=True)
class ScoringCase:
    """A model, a data set, the number of images, the target ratio, and whether to use all cores."""

    model: str
    dataset: str
    count: int
    target: float | None
    all_cores: bool = False


SCORING = (
    ScoringCase("mlp", "mnist", 2_000, 20.0),
    ScoringCase("lenet", "mnist", 2_000, 8.0),
    ScoringCase("resnet18", "cifar10", 128, None),
    ScoringCase("resnet18", "cifar10", 64, 2.0, all_cores=True),
)


def one_by_one(sgd: nn.Module, sam: nn.Module, loader: torch.utils.data.DataLoader) -> np.ndarray:
    """SAMIS-L and SAMIS-P, ``(n, 2)``."""
    sgd.eval()
    sam.eval()
    scores = []
    with torch.no_grad():
        for image, label, _ in loader:
            first, second = sgd(image), sam(image)
            loss = (F.cross_entropy(first, label) - F.cross_entropy(second, label)).abs()
            prob = (first.softmax(dim=1) - second.softmax(dim=1)).abs().sum()
            scores.append([loss.item(), prob.item()])
    return np.array(scores)


def scoring_row(case: ScoringCase, repeats: int) -> Row:
    """Time both implementations on one model.

    Raises:
        RuntimeError: The two implementations disagree.
    """
    torch.set_num_threads((os.cpu_count() or 1) if case.all_cores else 1)
    images = random_images(case.dataset, case.count)
    entry, layout = images.entry, MODELS[case.model].channels_last
    loader = torch.utils.data.DataLoader(PlainImages(images, augmented=False), 1)
    batches = Batches(images, 512, normalization=entry.normalizations["samis"], channels_last=layout)
    shape = (entry.num_classes, entry.channels, entry.image_size)
    plain_pair = [build_model(case.model, *shape, seed=seed) for seed in (1, 2)]
    memory = torch.channels_last if layout else torch.contiguous_format
    our_pair = [build_model(case.model, *shape, seed=seed).to(memory_format=memory) for seed in (1, 2)]
    found = {}
    plain, ours = in_turn(
        (
            lambda: found.update(plain=one_by_one(*plain_pair, loader)),
            lambda: found.update(ours=score_pair(*our_pair, batches)[1]),
        ),
        repeats,
        time.perf_counter if case.all_cores else time.process_time,
    )
    both = np.stack([found["ours"]["samis_loss"], found["ours"]["samis_prob"]], axis=1)
    if not np.allclose(both, found["plain"], rtol=1e-3, atol=1e-4):
        raise RuntimeError(f"{case.model}: the scores differ by up to {np.abs(both - found['plain']).max()}")
    scale = 1_000 / case.count
    name, unit = f"SAMIS scores of a pair, {case.model}", "s per 1,000 images"
    if case.all_cores:
        name, unit = f"{name}, all cores", f"{unit} (wall)"
    return Row(name, plain * scale, ours * scale, unit, case.target)


def scoring(quick: bool = False) -> list[Row]:
    """Compute SAMIS scores of a pair of models, one example at a time and in batches, including data loading.

    The plain implementation loops over a DataLoader with batch size one over PIL images with ToTensor and Normalize.
    Ours is ``score_pair`` as called by ``compute_sam_sgd.py``, with the scripts' allocator settings. The scores of
    both are compared. A row on all cores uses wall time. On one thread, batched convolutions run at the speed of a
    matrix product, which for resnet18 is not quite twice that of single images. On two threads, single images gain
    less from the second thread.

    Raises:
        RuntimeError: The two implementations disagree.
    """
    prepare(torch.device("cpu"), PRECISIONS["fp32"], deterministic=False)
    cases, repeats = SCORING, 2
    if quick:
        cases = [replace(case, model=case.model.replace("resnet18", "resnet8"), count=4) for case in SCORING]
        repeats = 1
    return [scoring_row(case, repeats) for case in cases]


RATE, MOMENTUM = 0.1, 0.9


@dataclass(frozen=True)
class Way:
    """One training setup, and the number of steps to time after one warm-up step."""

    model: str
    steps: int
    batch: int = 128
    loop: str = "ours"  # or "loader", "ready"
    channels_last: bool = False
    precision: str = "fp32"
    keep_memory: bool = True
    dynamics: bool = False


def seconds_per_step(way: Way) -> float:
    """Run one setup and return the CPU seconds per step, including loading the batch."""
    torch.manual_seed(0)
    entry = lookup("cifar10")
    model = build_model(way.model, entry.num_classes, entry.channels, entry.image_size, seed=0).train()
    moments: list[float] = []
    if way.loop == "ours":
        our_epoch(way, model, moments)
    else:
        plain_epoch(way, model, moments)
    return (moments[-1] - moments[0]) / (len(moments) - 1)


def plain_epoch(way: Way, model: nn.Module, moments: list[float]) -> None:
    """Run the standard tutorial loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    for images, labels in plain_batches(way):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()
        moments.append(time.process_time())


def plain_batches(way: Way) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches from a DataLoader over PIL transforms, or the same batch repeatedly."""
    images = random_images("cifar10", (way.steps + 1) * way.batch)
    if way.loop == "loader":
        for batch in torch.utils.data.DataLoader(PlainImages(images, augmented=True), way.batch, shuffle=True):
            yield batch[0], batch[1]
        return
    ready = torch.randn(way.batch, *images.image_shape), images.labels[: way.batch]
    for _ in range(way.steps + 1):
        yield ready


def our_epoch(way: Way, model: nn.Module, moments: list[float]) -> None:
    """Run one epoch of the Trainer, set up as in the scripts."""
    if way.keep_memory:
        prepare(torch.device("cpu"), PRECISIONS[way.precision], deterministic=False)
    images = random_images("cifar10", (way.steps + 1) * way.batch)
    entry = images.entry
    if way.channels_last:
        model = model.to(memory_format=torch.channels_last)
    shared = {"normalization": entry.normalizations["samis"], "channels_last": way.channels_last}
    augmentation = entry.training_augmentation(True)
    trainer = Trainer(
        model,
        Batches(images, way.batch, order="shuffled", augmentation=augmentation, seed=1, **shared),
        Batches(images.subset(torch.arange(2)), way.batch, **shared),
        TrainingConfig(epochs=1, learning_rate=RATE, momentum=MOMENTUM, precision=way.precision),
        dynamics=Dynamics(images.total, entry.num_classes, torch.device("cpu")) if way.dynamics else None,
        after_step=[lambda *_: moments.append(time.process_time())],
    )
    trainer.fit()


def steps(quick: bool = False) -> list[Row]:
    """Compare training steps of our Trainer with the standard tutorial loop.

    Trains with SGD with momentum on random CIFAR-sized images with crop and flip, in batches of 128. The plain
    implementation loops over a DataLoader over PIL transforms; a loop on one prepared batch shows the time without
    data loading. Ours is timed as in the scripts, and with one change at a time: memory format, bfloat16, and
    returning freed memory to the system. Each setup runs in its own process, because the allocator settings cannot be
    undone; the processes run in turn.
    """
    large = Way("resnet18", steps=1, channels_last=MODELS["resnet18"].channels_last)
    small = Way("resnet8", steps=20, channels_last=MODELS["resnet8"].channels_last, dynamics=True)
    rounds = 2
    if quick:
        large, small = (replace(way, model="resnet8", steps=1, batch=4) for way in (large, small))
        rounds = 1
    narrow = replace(large, batch=4)  # bf16 is very slow on CPUs without native support
    # name, plain, ours, target
    pairs = [
        (f"training, {large.model}: DataLoader loop", replace(large, loop="loader"), large, 1.0),
        (f"training, {large.model}: loop on a ready batch", replace(large, loop="ready"), large, None),
        (
            f"training, {large.model}: ours with freed memory returned, kept",
            replace(large, keep_memory=False),
            large,
            None,
        ),
        (
            f"training, {large.model}: ours contiguous, channels_last",
            replace(large, channels_last=False),
            replace(large, channels_last=True),
            None,
        ),
        (f"training, {large.model}: ours in fp32, bf16", narrow, replace(narrow, precision="bf16"), None),
        (f"training, {small.model}, with dynamics: DataLoader loop", replace(small, loop="loader"), small, 1.0),
        (f"training, {small.model}, with dynamics: ready batch", replace(small, loop="ready"), small, None),
    ]
    ways = list(dict.fromkeys(way for _, plain, ours, _ in pairs for way in (plain, ours)))
    once = seconds_per_step if quick else partial(in_fresh_process, seconds_per_step)
    times = [[once(way) for way in ways] for _ in range(rounds)]
    best = dict(zip(ways, map(min, zip(*times, strict=True)), strict=True))
    return [
        Row(name, best[plain], best[ours], f"s per step of {ours.batch}", target)
        for name, plain, ours, target in pairs
    ]


LR, L2 = 1e-3, 1e-3


@dataclass(frozen=True)
class EnsembleCase:
    """One row.

    Attributes:
        name: The model.
        members: Number of copies of the model.
        batch: Examples per step.
        steps: Steps per model.
        target: Target ratio; None for no target.
        channels: Channels of the images.
        size: Height and width of the images.
    """

    name: str
    members: int
    batch: int
    steps: int
    target: float | None = None
    channels: int = 1
    size: int = 28


ENSEMBLES = (
    EnsembleCase("small_mlp", 32, 32, 20, 3.0),
    EnsembleCase("small_mlp", 32, 256, 5, 1.5),
    EnsembleCase("small_mlp", 32, 1024, 3),
    EnsembleCase("mlp", 32, 256, 2),
    EnsembleCase("mlp", 32, 1024, 1),
    EnsembleCase("large_mlp", 32, 32, 2),
    EnsembleCase("large_mlp", 32, 256, 1),
    EnsembleCase("large_mlp", 16, 512, 1),
    EnsembleCase("large_mlp", 8, 1024, 1),
    EnsembleCase("lenet", 8, 32, 1),
    EnsembleCase("lenet", 8, 256, 1),
    EnsembleCase("cnn_deepobs", 2, 32, 1, channels=3, size=32),
)
QUICK = (EnsembleCase("small_mlp", 3, 4, 2, size=8), EnsembleCase("lenet", 2, 3, 1))


def one_after_another(
    models: list[nn.Module], images: Tensor, labels: Tensor, orders: MemberSchedules, batch: int
) -> Callable[[], None]:
    """Return the plain implementation: an epoch of each model in turn."""
    settings = {"lr": LR, "momentum": 0.9, "weight_decay": L2, "fused": True}
    optimizers = [torch.optim.SGD(model.parameters(), **settings) for model in models]

    def epoch() -> None:
        for model, optimizer, order in zip(models, optimizers, orders.table, strict=True):
            for index in order.split(batch):
                optimizer.zero_grad()
                chosen, targets = images.index_select(0, index), labels.index_select(0, index)
                nn.functional.cross_entropy(model(chosen), targets).backward()
                optimizer.step()

    return epoch


def compare_weights(name: str, models: list[nn.Module], ensemble: Ensemble) -> None:
    """Raise an error if the weights of the two implementations differ by more than single-precision rounding."""
    for number, model in enumerate(models):
        found = ensemble.member(number)
        for key, value in model.state_dict().items():
            if not torch.allclose(found[key], value, rtol=1e-3, atol=1e-5):
                raise RuntimeError(f"{name}: the two implementations disagree on {key} of model {number}")


def ensemble_row(case: EnsembleCase, repeats: int) -> Row:
    """Time both implementations, in milliseconds per step and model, with the scripts' allocator settings.

    Raises:
        RuntimeError: The two implementations disagree.
    """
    prepare(torch.device("cpu"), PRECISIONS["fp32"], deterministic=False)
    total = case.batch * case.steps
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(total, case.channels, case.size, case.size, generator=draw)
    labels = torch.randint(10, (total,), generator=draw)
    base = build_model(case.name, 10, case.channels, case.size, seed=0)
    removed = [np.empty(0, np.int64)] * case.members
    orders = own_schedules(removed, range(case.members), total)
    models = [copy.deepcopy(base) for _ in range(case.members)]
    ensemble = Ensemble(base, case.members, l2=L2)
    plain = one_after_another(models, images, labels, orders, case.batch)
    times = in_turn((plain, lambda: one_epoch(ensemble, images, labels, orders, case.batch, LR)), repeats)
    compare_weights(case.name, models, ensemble)
    each = [1_000 * seconds / case.members / case.steps for seconds in times]
    choice = "chosen" if vectorised_is_faster(base, "cpu", case.batch) else "not chosen on a CPU"
    return Row(
        f"retraining {case.members} {case.name} at batch {case.batch} at once ({choice})",
        *each,
        "ms per step and model",
        case.target,
    )


def ensemble(quick: bool = False) -> list[Row]:
    """Compare retraining many copies of a model one after another with retraining all at once.

    The plain implementation trains one model after another: gather a batch, forward, backward, torch's fused SGD with
    momentum 0.9 and weight decay. Ours steps all models at once. Both use the same batches of noise images, with a
    separate permutation per model, and their final weights are compared. The rows support
    ``src.training.ensemble.vectorised_is_faster``. On one CPU thread, perceptrons, whose gradients are hand-written,
    gain more the shorter a step is. Convolutions lose, because ``vmap`` turns them into grouped convolutions. Each
    row states what the rule chooses, and runs in its own process, because the allocator settings cannot be undone.

    Raises:
        RuntimeError: The two implementations disagree.
    """
    row = ensemble_row if quick else partial(in_fresh_process, ensemble_row)
    return [row(case, 1 if quick else 3) for case in (QUICK if quick else ENSEMBLES)]


def step_seconds(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Return the CPU seconds of a full training step, and of the optimizer's part of it."""
    sampled = getattr(optimizer, "sampled_params", nullcontext)
    begin = time.process_time()
    with sampled():
        sampling = time.process_time() - begin
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        end = time.process_time()
    optimizer.step()
    return time.process_time() - begin, time.process_time() - end + sampling


def optimizer_rows(name: str, images: tuple[int, int], batch: int, repeats: int) -> list[Row]:
    """Return the rows of one model. Each optimizer trains a copy of it, and minimum times are used."""
    prepare(torch.device("cpu"), PRECISIONS["fp32"], deterministic=False)
    base = build_model(name, 10, *images, seed=0)
    draw = torch.Generator().manual_seed(0)
    ready = torch.randn(batch, images[0], images[1], images[1], generator=draw), torch.arange(batch) % 10
    plain = {
        "sgd": partial(torch.optim.SGD, lr=LR, momentum=MOMENTUM),
        "adam": partial(torch.optim.Adam, lr=LR),
        "adamw": partial(torch.optim.AdamW, lr=LR, weight_decay=0.0),
        "iblr": partial(IvonOpt, lr=LR, num_examples=60_000, delta=10.0),
    }
    rows = []
    for kind, build in plain.items():
        models = [copy.deepcopy(base) for _ in range(2)]
        config = TrainingConfig(epochs=1, learning_rate=LR, optimizer=kind)
        optimizers = build(models[0].parameters()), build_optimizer(config, models[1].parameters(), 60_000)
        pairs = list(zip(models, optimizers, strict=True))
        times = [[step_seconds(*pair, ready) for pair in pairs] for _ in range(repeats + 1)][1:]
        for what, part in (("training step", 0), ("optimizer only", 1)):
            theirs, ours = (1_000 * min(turn[way][part] for turn in times) for way in (0, 1))
            target = 1.3 if (name, kind, part) == ("large_mlp", "iblr", 1) else None
            way = "ivon-opt, own" if kind == "iblr" else "torch's default, fused"
            rows.append(Row(f"{name} at batch {batch}, {kind}, {what}: {way}", theirs, ours, "ms per step", target))
    return rows


def optimizers(quick: bool = False) -> list[Row]:
    """Compare other optimizer implementations with ours, for full training steps and for the optimizer only.

    For SGD, Adam and AdamW, torch's default is compared with our fused version. For iBLR, the package ivon-opt is
    compared with our implementation. Both include sampling the noise.
    """
    cases = [
        ("small_mlp", (1, 28), 32),
        ("large_mlp", (1, 28), 256),
        ("lenet", (1, 28), 256),
        ("resnet8", (3, 32), 128),
    ]
    if quick:
        return optimizer_rows("small_mlp", (1, 8), 4, 1)
    rows = [in_fresh_process(optimizer_rows, *case, 30) for case in cases]
    return [row for found in rows for row in found]


BENCHMARKS = {
    "batches": batches,
    "scoring": scoring,
    "steps": steps,
    "optimizers": optimizers,
    "ensemble": ensemble,
}

if __name__ == "__main__":
    run(BENCHMARKS, __doc__)
