"""An epoch of augmented batches against a DataLoader over PIL transforms.

    python benchmarks/bench_batches.py

CIFAR-sized random images, batch 128, random crop with padding 4 and horizontal flip, normalised; one core for each.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.datasets import Batches, ImageSet, lookup

EXAMPLES, BATCH, REPEATS = 5_000, 128, 3
TARGET = 12.0


class PlainImages(torch.utils.data.Dataset):
    """The obvious way: one image at a time, as torchvision's data sets do it."""

    def __init__(self, images: ImageSet, transform: object) -> None:
        self.pixels = images.fetch(torch.arange(len(images))).permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = images.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index], index, 1.0


def seconds(run: Callable[[], object]) -> float:
    """How long ``run`` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> float:
    """Print both times and their ratio; return the ratio."""
    from torchvision import transforms

    torch.set_num_threads(1)
    entry = lookup("cifar10")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (EXAMPLES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images = ImageSet(entry, "train", pixels, torch.randint(0, 10, (EXAMPLES,), generator=generator))
    normal = entry.normalisations["samis"]
    augmentation = entry.training_augmentation(True)
    batches = Batches(images, BATCH, normalisation=normal, order="shuffled", augmentation=augmentation, seed=1)
    pipeline = transforms.Compose(
        [
            transforms.RandomCrop(32, 4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(normal.mean, normal.std),
        ]
    )
    loader = torch.utils.data.DataLoader(PlainImages(images, pipeline), BATCH, shuffle=True)
    ways = (lambda: [batch.images.shape for batch in batches.epoch(1)], lambda: [batch[0].shape for batch in loader])
    for way in ways:
        way()
    times = [[seconds(way) for way in ways] for _ in range(REPEATS)]  # in turn, so that a busy machine hits both
    ours, plain = (min(column) * 50_000 / EXAMPLES for column in zip(*times, strict=True))
    print(
        f"batches: 50,000 CIFAR-sized images in {ours:.2f} s; a DataLoader over PIL transforms {plain:.2f} s, "
        f"{plain / ours:.1f} times as long (target {TARGET:g})"
    )
    return plain / ours


if __name__ == "__main__":
    main()
