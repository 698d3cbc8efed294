"""An epoch of augmented batches against a DataLoader over PIL transforms.

    python -m benchmarks.bench_batches [--quick]

CIFAR-sized random images, batch 128, random crop with padding 4 and horizontal flip, normalised.
"""

import torch

from benchmarks.common import PlainImages, Row, in_turn, random_images, run
from src.datasets import Batches

BATCH = 128
TARGET = 12.0


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
    return [Row("epoch of batches, crop and flip", plain * scale, ours * scale, "s per 50,000 images", TARGET)]


def main() -> None:
    run(measure, __doc__)


if __name__ == "__main__":
    main()
