"""Batches against a DataLoader over PIL transforms.

    python -m benchmarks.bench_batches [--quick]

CIFAR-sized random images, batch 128, random crop with padding 4 and horizontal flip, normalised; and MNIST-sized
ones, batch 256, in order and only normalised, as the sensitivity experiments read them: there both ways must give the
very same numbers.
"""

import torch

from benchmarks.common import PlainImages, Row, in_turn, random_images, run
from src.datasets import Batches

BATCH = 128
TARGET = 12.0
PREPARED_BATCH, PREPARED_TARGET = 256, 20.0


def prepare(quick: bool) -> Row:
    """Time a pass in order, and compare the images."""
    count, repeats = (256, 1) if quick else (10_000, 3)
    images = random_images("mnist", count)
    batches = Batches(images, PREPARED_BATCH, normalisation=images.entry.normalisations["mpe"])
    loader = torch.utils.data.DataLoader(PlainImages(images, augmented=False, normalisation="mpe"), PREPARED_BATCH)
    for theirs, own in zip(loader, batches, strict=True):
        if not torch.equal(theirs[0], own.images):
            raise AssertionError("the two ways prepare an image differently")
    plain, ours = in_turn(
        (lambda: [batch[0].shape for batch in loader], lambda: [batch.images.shape for batch in batches]), repeats
    )
    scale = 1e6 / count
    return Row("images prepared, MNIST", plain * scale, ours * scale, "us per image", PREPARED_TARGET)


def measure(quick: bool = False) -> list[Row]:
    """Time an epoch both ways."""
    torch.set_num_threads(1)
    count, repeats = (256, 1) if quick else (5_000, 3)
    images = random_images("cifar10", count)
    entry = images.entry
    batches = Batches(
        images,
        BATCH,
        normalisation=entry.normalisations["samis"],
        order="shuffled",
        augmentation=entry.training_augmentation(True),
        seed=1,
    )
    loader = torch.utils.data.DataLoader(PlainImages(images, augmented=True), BATCH, shuffle=True)
    plain, ours = in_turn(
        (lambda: [batch[0].shape for batch in loader], lambda: [batch.images.shape for batch in batches.epoch(1)]),
        repeats,
    )
    scale = 50_000 / count
    row = Row("epoch of batches, crop and flip", plain * scale, ours * scale, "s per 50,000 images", TARGET)
    return [row, prepare(quick)]


def main() -> None:
    run(measure, __doc__)


if __name__ == "__main__":
    main()
