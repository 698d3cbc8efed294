"""A training step of our Trainer against the loop that most people write.

    python -m benchmarks.bench_training [--quick]

SGD with momentum on random CIFAR-sized images with crop and flip, batches of 128. The plain way is a loop over a
DataLoader over PIL transforms; a loop on one ready batch shows what remains if data cost nothing. Ours is timed as
the scripts run it, and with one thing changed at a time: memory layout, bfloat16, and freed memory given back.
Each way runs in a process of its own, because the allocator's setting cannot be undone; the processes take turns.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common import PlainImages, Row, in_fresh_process, random_images, run
from src.datasets import Batches, lookup
from src.devices import PRECISIONS, prepare
from src.models import MODELS, build_model
from src.training import Dynamics, Trainer, TrainingConfig

RATE, MOMENTUM = 0.1, 0.9


@dataclass(frozen=True)
class Way:
    """One way of training, with the steps that are timed after one that warms up."""

    model: str
    steps: int
    batch: int = 128
    loop: str = "ours"  # or "loader", "ready"
    channels_last: bool = False
    precision: str = "fp32"
    keep_memory: bool = True
    dynamics: bool = False


def seconds_per_step(way: Way) -> float:
    """Run one way; processor seconds of a step, the batch's making included."""
    torch.set_num_threads(1)
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
    """The loop of any tutorial."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    for images, labels in plain_batches(way):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()
        moments.append(time.process_time())


def plain_batches(way: Way) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """From a DataLoader over PIL transforms, or the same ready batch again and again."""
    images = random_images("cifar10", (way.steps + 1) * way.batch)
    if way.loop == "loader":
        for batch in torch.utils.data.DataLoader(PlainImages(images, augmented=True), way.batch, shuffle=True):
            yield batch[0], batch[1]
        return
    ready = torch.randn(way.batch, *images.image_shape), images.labels[: way.batch]
    for _ in range(way.steps + 1):
        yield ready


def our_epoch(way: Way, model: nn.Module, moments: list[float]) -> None:
    """One epoch of the Trainer, set up as the scripts do."""
    if way.keep_memory:
        prepare(torch.device("cpu"), PRECISIONS[way.precision], deterministic=False)
    images = random_images("cifar10", (way.steps + 1) * way.batch)
    entry = images.entry
    if way.channels_last:
        model = model.to(memory_format=torch.channels_last)
    shared = {"normalisation": entry.normalisations["samis"], "channels_last": way.channels_last}
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


def measure(quick: bool = False) -> list[Row]:
    """Time every way, and pair them."""
    large = Way("resnet18", steps=1, channels_last=MODELS["resnet18"].channels_last)
    small = Way("resnet8", steps=20, channels_last=MODELS["resnet8"].channels_last, dynamics=True)
    rounds = 2
    if quick:
        large, small = (replace(way, model="resnet8", steps=1, batch=4) for way in (large, small))
        rounds = 1
    narrow = replace(large, batch=4)  # bf16 is very slow where the processor does not compute in it
    # name, plain way, ours, target
    pairs = [
        (f"training, {large.model}: DataLoader loop", replace(large, loop="loader"), large, 1.0),
        (f"training, {large.model}: loop on a ready batch", replace(large, loop="ready"), large, None),
        (
            f"training, {large.model}: ours with memory given back, kept",
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


def main() -> None:
    run(measure, __doc__)


if __name__ == "__main__":
    main()
