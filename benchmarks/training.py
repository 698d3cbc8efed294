"""Reading images, training on them and scoring them.

python -m benchmarks.training [batches scoring steps optimizers ensemble] [--quick]
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.common import PlainImages, Row, fast_batches, in_fresh_process, in_turn, random_images, run
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
    """Time one pass in order, and compare the images.

    Raises:
        RuntimeError: The images differ in any bit.
    """
    count, repeats = (256, 1) if quick else (10_000, 3)
    images = random_images("mnist", count)
    normalization = images.entry.normalizations["mpe"]
    pixels = images.fetch(torch.arange(count))
    batches = Batches(images, 256, normalization=normalization)
    loader = torch.utils.data.DataLoader(PlainImages(images, augmented=False, normalization="mpe"), 256)

    def fast() -> Iterator[tuple[Tensor, Tensor]]:
        return fast_batches(pixels, images.labels, 256, normalization, augmented=False)

    for theirs, alternative, own in zip(loader, fast(), batches, strict=True):
        if not (torch.equal(theirs[0], own.images) and torch.equal(alternative[0], own.images)):
            raise RuntimeError("two implementations prepare an image differently")
    ways = (
        lambda: [batch[0].shape for batch in loader],
        lambda: [batch[0].shape for batch in fast()],
        lambda: [batch.images.shape for batch in batches],
    )
    times = [1e6 / count * taken for taken in in_turn(ways, repeats)]
    return Row("batches of MNIST images, only normalized", *times, "us per image", 0.65)


def batches(quick: bool = False) -> list[Row]:
    """Batches of images.

    CIFAR-sized random images in batches of 128, random crop with padding 4, horizontal flip, normalized; and
    MNIST-sized ones in batches of 256, in order and only normalized, where all results must be bit-identical.
    Authors: a DataLoader over PIL transforms. Strongest alternative: an airbench-like loader. No large
    speedup over it is possible: this project also draws random numbers per example and epoch, so that results do not
    depend on workers or interruptions.

    Raises:
        RuntimeError: Two implementations disagree.
    """
    count, repeats = (256, 1) if quick else (5_000, 3)
    images = random_images("cifar10", count)
    entry, pixels = images.entry, images.fetch(torch.arange(count))
    normalization = entry.normalizations["samis"]
    batches = Batches(
        images,
        128,
        normalization=normalization,
        order="shuffled",
        augmentation=entry.training_augmentation(True),
        seed=1,
    )
    loader = torch.utils.data.DataLoader(PlainImages(images, augmented=True), 128, shuffle=True)
    ways = (
        lambda: [batch[0].shape for batch in loader],
        lambda: [batch[0].shape for batch in fast_batches(pixels, images.labels, 128, normalization, augmented=True)],
        lambda: [batch.images.shape for batch in batches.epoch(1)],
    )
    times = [50_000 / count * taken for taken in in_turn(ways, repeats)]
    return [
        Row("batches of CIFAR-10 images, crop and flip", *times, "s per 50,000 images", 0.9),
        prepared_images(quick),
    ]


# model, data set, number of images
SCORING = (("mlp", "mnist", 2_000), ("lenet", "mnist", 2_000), ("resnet18", "cifar10", 128))


def one_by_one(sgd: nn.Module, sam: nn.Module, loader: torch.utils.data.DataLoader) -> np.ndarray:
    """The papers' code: SAMIS-L and SAMIS-P ``(n, 2)`` from batches of one."""
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


@torch.inference_mode()
def in_whole_batches(sgd: nn.Module, sam: nn.Module, images: Tensor, labels: Tensor, size: int) -> np.ndarray:
    """The strongest alternative: the same scores from a loop over batches of prepared tensors."""
    sgd.eval()
    sam.eval()
    scores = []
    for image, label in zip(images.split(size), labels.split(size), strict=True):
        first, second = sgd(image).log_softmax(dim=1), sam(image).log_softmax(dim=1)
        loss = (first - second).gather(1, label[:, None])[:, 0].abs()
        scores.append(torch.stack([loss, (first.exp() - second.exp()).abs().sum(dim=1)], dim=1))
    return torch.cat(scores).numpy()


def scoring_row(model: str, dataset: str, count: int, repeats: int) -> Row:
    """Time all implementations for one model.

    Raises:
        RuntimeError: Two implementations disagree.
    """
    images = random_images(dataset, count)
    entry, layout = images.entry, MODELS[model].channels_last
    loader = torch.utils.data.DataLoader(PlainImages(images, augmented=False), 1)
    batches = Batches(images, 512, normalization=entry.normalizations["samis"], channels_last=layout)
    ready = torch.cat([batch.images for batch in batches])
    shape = (entry.num_classes, entry.channels, entry.image_size)
    memory = torch.channels_last if layout else torch.contiguous_format
    plain_pair = [build_model(model, *shape, seed=seed) for seed in (1, 2)]
    alternative_pair, our_pair = (
        [build_model(model, *shape, seed=seed).to(memory_format=memory) for seed in (1, 2)] for _ in range(2)
    )
    found = {}
    times = in_turn(
        (
            lambda: found.update(authors=one_by_one(*plain_pair, loader)),
            lambda: found.update(strongest=in_whole_batches(*alternative_pair, ready, images.labels, 512)),
            lambda: found.update(ours=score_pair(*our_pair, batches)[1]),
        ),
        repeats,
    )
    both = np.stack([found["ours"]["samis_loss"], found["ours"]["samis_prob"]], axis=1)
    for other in (found["authors"], found["strongest"]):
        if not np.allclose(both, other, rtol=1e-3, atol=1e-4):
            raise RuntimeError(f"{model}: two implementations disagree by {np.abs(both - other).max()}")
    return Row(f"SAMIS of a pair, {model}", *(1_000 / count * t for t in times), "s per 1,000 images", 0.75)


def scoring(quick: bool = False) -> list[Row]:
    """SAMIS scores of a pair of models.

    Authors: a loop over a DataLoader of batch size one, over PIL images with ToTensor and Normalize. Strongest
    alternative: a loop over batches of 512 from a tensor that is already normalized, in the memory format of ours.
    Ours is ``score_pair`` as ``compute_sam_sgd.py`` calls it; it reads and normalizes its images, and computes losses
    and probabilities in float64. The scores of all ways are compared. No large speedup is possible, because the
    forward passes are the same.

    Raises:
        RuntimeError: Two implementations disagree.
    """
    prepare(torch.device("cpu"), PRECISIONS["fp32"], deterministic=False)
    if quick:
        return [scoring_row(model.replace("resnet18", "resnet8"), dataset, 4, 1) for model, dataset, _ in SCORING]
    return [scoring_row(*case, 3) for case in SCORING]


RATE, MOMENTUM = 0.1, 0.9


@dataclass(frozen=True)
class Way:
    """One training loop, and the number of steps timed after a first one."""

    model: str
    steps: int
    batch: int = 128
    loop: str = "ours"  # or "loader", "fast"
    channels_last: bool = False
    precision: str = "fp32"
    keep_memory: bool = True
    dynamics: bool = False


def seconds_per_step(way: Way) -> float:
    """Train with one loop and return the CPU seconds per step, including the preparation of the batch."""
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
    """The usual training loop."""
    fast = way.loop == "fast"
    if fast and way.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, fused=fast)
    for images, labels in plain_batches(way):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()
        moments.append(time.process_time())


def plain_batches(way: Way) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches from a DataLoader over PIL transforms or from an airbench-like loader."""
    images = random_images("cifar10", (way.steps + 1) * way.batch)
    if way.loop == "loader":
        for batch in torch.utils.data.DataLoader(PlainImages(images, augmented=True), way.batch, shuffle=True):
            yield batch[0], batch[1]
        return
    pixels, normalization = images.fetch(torch.arange(len(images))), images.entry.normalizations["samis"]
    yield from fast_batches(
        pixels, images.labels, way.batch, normalization, augmented=True, channels_last=way.channels_last
    )


def our_epoch(way: Way, model: nn.Module, moments: list[float]) -> None:
    """One epoch of the Trainer, set up as the scripts set it up."""
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
    """Training steps: SGD with momentum on random CIFAR-sized images with crop and flip, batches of 128.

    Authors: a loop over a DataLoader over PIL transforms. Strongest alternative: the same loop over an airbench-like
    loader, with fused SGD and the memory format of ours. Neither records per-example dynamics. This project's time is
    that of the Trainer as the scripts run it. Three rows change one of its settings at a time: freed memory returned
    to the system, memory format, bfloat16. No large speedup is possible, because the forward and backward passes are
    the same. Each implementation runs in its own process, because the allocator's setting cannot be undone; the
    processes alternate.
    """
    large = Way("resnet18", steps=1, channels_last=MODELS["resnet18"].channels_last)
    small = Way("resnet8", steps=20, channels_last=MODELS["resnet8"].channels_last, dynamics=True)
    rounds = 2
    if quick:
        large, small = (replace(way, model="resnet8", steps=1, batch=4) for way in (large, small))
        rounds = 1
    narrow = replace(large, batch=4)  # bf16 is very slow on processors without bfloat16 arithmetic
    # name, authors, strongest alternative, ours, target
    rows = [
        (f"training step, {large.model}", replace(large, loop="loader"), replace(large, loop="fast"), large, 0.9),
        (
            f"training step, {small.model}, with dynamics in ours only",
            replace(small, loop="loader"),
            replace(small, loop="fast"),
            small,
            0.9,
        ),
        (
            f"training step, {large.model}: freed memory returned / kept",
            None,
            replace(large, keep_memory=False),
            large,
            None,
        ),
        (
            f"training step, {large.model}: contiguous / channels-last memory",
            None,
            replace(large, channels_last=False),
            replace(large, channels_last=True),
            None,
        ),
        (f"training step, {large.model}: fp32 / bf16", None, narrow, replace(narrow, precision="bf16"), None),
    ]
    ways = list(dict.fromkeys(way for _, *compared, _ in rows for way in compared if way is not None))
    once = seconds_per_step if quick else partial(in_fresh_process, seconds_per_step)
    times = [[once(way) for way in ways] for _ in range(rounds)]
    best = dict(zip(ways, map(min, zip(*times, strict=True)), strict=True))
    return [
        Row(name, best.get(authors), best[strongest], best[ours], f"s, batch {ours.batch}", target, authors is None)
        for name, authors, strongest, ours, target in rows
    ]


LR, L2 = 1e-3, 1e-3


@dataclass(frozen=True)
class EnsembleCase:
    """One row.

    Attributes:
        name: The model.
        members: Number of copies.
        batch: Examples per step.
        steps: Steps of each copy.
        target: Required ratio to the strongest alternative.
        channels: Channels of the images.
        size: Side of the images.
    """

    name: str
    members: int
    batch: int
    steps: int
    target: float | None = None
    channels: int = 1
    size: int = 28


ENSEMBLES = (
    EnsembleCase("small_mlp", 32, 32, 20, 1.6),
    EnsembleCase("small_mlp", 32, 256, 5, 1.1),
    EnsembleCase("small_mlp", 32, 1024, 3),
    EnsembleCase("mlp", 32, 256, 2),
    EnsembleCase("large_mlp", 32, 32, 2),
    EnsembleCase("large_mlp", 32, 256, 1),
    EnsembleCase("large_mlp", 16, 512, 1),
    EnsembleCase("lenet", 8, 32, 1),
    EnsembleCase("lenet", 8, 256, 1),
    EnsembleCase("cnn_deepobs", 2, 32, 1, channels=3, size=32),
)
QUICK = (EnsembleCase("small_mlp", 3, 4, 2, size=8), EnsembleCase("lenet", 2, 3, 1))


def one_after_another(
    models: list[nn.Module], images: Tensor, labels: Tensor, orders: MemberSchedules, batch: int, *, fused: bool
) -> Callable[[], None]:
    """An epoch of each model in turn, with torch's default SGD (the papers' code) or the fused one."""
    settings = {"lr": LR, "momentum": MOMENTUM, "weight_decay": L2, "fused": fused}
    optimizers = [torch.optim.SGD(model.parameters(), **settings) for model in models]

    def epoch() -> None:
        for model, optimizer, order in zip(models, optimizers, orders.table, strict=True):
            for index in order.split(batch):
                optimizer.zero_grad()
                chosen, targets = images.index_select(0, index), labels.index_select(0, index)
                nn.functional.cross_entropy(model(chosen), targets).backward()
                optimizer.step()

    return epoch


def vmapped(
    base: nn.Module, members: int, images: Tensor, labels: Tensor, orders: MemberSchedules, batch: int
) -> Callable[[], None]:
    """An epoch of all models at once: ``vmap(grad)`` over stacked parameters, as in torch's tutorial on ensembles."""
    parameters = {
        name: p.detach().expand(members, *p.shape).clone(memory_format=torch.contiguous_format)
        for name, p in base.named_parameters()
    }
    velocities = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def loss(values: dict[str, Tensor], chosen: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(base, values, (chosen,)), targets)

    gradients = vmap(grad(loss))

    def epoch() -> None:
        for index in orders.table.split(batch, dim=1):
            found = gradients(parameters, images[index], labels[index])
            for name, p in parameters.items():
                velocities[name].mul_(MOMENTUM).add_(found[name]).add_(p, alpha=L2)
                p.sub_(velocities[name], alpha=LR)

    epoch.parameters = parameters
    return epoch


def ensemble_row(case: EnsembleCase, repeats: int) -> Row:
    """Time all implementations of one case, in milliseconds per step and model, with the scripts' allocator settings.

    Raises:
        RuntimeError: Two implementations disagree.
    """
    prepare(torch.device("cpu"), PRECISIONS["fp32"], deterministic=False)
    total = case.batch * case.steps
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(total, case.channels, case.size, case.size, generator=draw)
    labels = torch.randint(10, (total,), generator=draw)
    base = build_model(case.name, 10, case.channels, case.size, seed=0)
    removed = [np.empty(0, np.int64)] * case.members
    orders = own_schedules(removed, range(case.members), total)
    plain, fused = ([copy.deepcopy(base) for _ in range(case.members)] for _ in range(2))
    ensemble = Ensemble(base, case.members, l2=L2)
    stacked = vmapped(base, case.members, images, labels, orders, case.batch)
    ways = (
        one_after_another(plain, images, labels, orders, case.batch, fused=False),
        one_after_another(fused, images, labels, orders, case.batch, fused=True),
        stacked,
        lambda: one_epoch(ensemble, images, labels, orders, case.batch, LR),
    )
    authors, *alternatives, ours = (1_000 * t / case.members / case.steps for t in in_turn(ways, repeats))
    for number in range(case.members):
        for key, value in ensemble.member(number).items():
            others = (
                plain[number].state_dict()[key],
                fused[number].state_dict()[key],
                stacked.parameters[key][number],
            )
            if not all(torch.allclose(value, other, rtol=1e-3, atol=1e-5) for other in others):
                raise RuntimeError(f"{case.name}: two implementations disagree on {key} of model {number}")
    choice = "" if vectorised_is_faster(base, "cpu", case.batch) else ": not used on a CPU"
    name = f"{case.members} {case.name} at once, batch {case.batch}{choice}"
    return Row(name, authors, min(alternatives), ours, "ms per step and model", case.target)


def ensemble(quick: bool = False) -> list[Row]:
    """Retraining many copies of a model.

    Authors: one model after another: gather a batch, forward, backward, torch's default SGD with momentum 0.9 and
    weight decay. Strongest alternative: the faster of the same loop with fused SGD and ``vmap(grad)`` over stacked
    parameters. Ours steps all models at once. All ways see the same batches of noise images, a separate permutation
    for each model, and must end with the same weights. Ours writes the gradients of perceptrons by hand and uses
    ``vmap`` for other models, whose convolutions become grouped convolutions and are slower on a CPU; each row states
    whether ``src.training.ensemble.vectorised_is_faster`` chooses to step all models at once. Each row runs in its
    own process, because the allocator's setting cannot be undone.

    Raises:
        RuntimeError: Two implementations disagree.
    """
    row = ensemble_row if quick else partial(in_fresh_process, ensemble_row)
    return [row(case, 1 if quick else 3) for case in (QUICK if quick else ENSEMBLES)]


def step_seconds(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> float:
    """CPU seconds of the optimizer's part of a training step."""
    sampled = getattr(optimizer, "sampled_params", nullcontext)
    begin = time.process_time()
    with sampled():
        sampling = time.process_time() - begin
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        end = time.process_time()
    optimizer.step()
    return time.process_time() - end + sampling


def optimizer_rows(name: str, size: int, batch: int, repeats: int) -> list[Row]:
    """The rows of one model; each optimizer trains a copy of it, and the minimum of each time counts."""
    prepare(torch.device("cpu"), PRECISIONS["fp32"], deterministic=False)
    base = build_model(name, 10, 1, size, seed=0)
    draw = torch.Generator().manual_seed(0)
    ready = torch.randn(batch, 1, size, size, generator=draw), torch.arange(batch) % 10
    alternatives = {
        "sgd": partial(torch.optim.SGD, lr=LR, momentum=MOMENTUM),
        "adam": partial(torch.optim.Adam, lr=LR),
        "iblr": partial(IvonOpt, lr=LR, num_examples=60_000, delta=10.0),
    }
    rows = []
    for kind, build in alternatives.items():
        config = TrainingConfig(epochs=1, learning_rate=LR, optimizer=kind)
        builders = [build, partial(build, fused=True), lambda p, config=config: build_optimizer(config, p, 60_000)]
        if kind == "iblr":  # ivon-opt is the only other implementation
            del builders[1]
        models = [copy.deepcopy(base) for _ in builders]
        pairs = [(model, make(model.parameters())) for model, make in zip(models, builders, strict=True)]
        times = [[step_seconds(*pair, ready) for pair in pairs] for _ in range(repeats + 1)][1:]
        *others, ours = (1_000 * min(column) for column in zip(*times, strict=True))
        authors = others[0] if len(others) == 2 else None
        target = 1.2 if kind == "iblr" else 0.85
        rows.append(Row(f"optimizer's part of a step, {kind}, {name}", authors, others[-1], ours, "ms", target))
    return rows


def optimizers(quick: bool = False) -> list[Row]:
    """The optimizer's part of a training step.

    SGD and Adam: torch's default (authors) and its fused variant, which ours are too. iBLR: the package ivon-opt, the
    only alternative, and our own step, both with the drawing of the noise.
    """
    if quick:
        return optimizer_rows("small_mlp", 8, 4, 1)
    cases = (("small_mlp", 28, 32), ("large_mlp", 28, 256))
    return [row for case in cases for row in in_fresh_process(optimizer_rows, *case, 30)]


BENCHMARKS = {
    "batches": batches,
    "scoring": scoring,
    "steps": steps,
    "optimizers": optimizers,
    "ensemble": ensemble,
}

if __name__ == "__main__":
    run(BENCHMARKS, __doc__)
