"""Epochs of batches: ordered, augmented and normalized as full tensors, without per-image Python."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from src import rng
from src.datasets import augment
from src.datasets.images import ImageSet
from src.datasets.registry import Augmentation, Normalization

ORDERS = ("shuffled", "sequential", "fixed")


class _Fields(NamedTuple):
    images: Tensor
    labels: Tensor
    indices: Tensor
    weights: Tensor


class Batch(_Fields):
    """``(images, labels, indices, weights)``, and ``total_weight``.

    Attributes:
        images: Normalized ``(b, c, h, w)``.
        labels: int64 ``(b,)``.
        indices: int64 ``(b,)``, original positions.
        weights: ``(b,)``.
        total_weight: Sum of the weights of the full batch over all ranks, a scalar tensor.
    """

    _total_weight: Tensor | None = None

    @property
    def total_weight(self) -> Tensor:
        """Sum of the weights of the full batch over all ranks."""
        return self.weights.sum() if self._total_weight is None else self._total_weight


class Batches:
    """Cuts epochs of an image set into batches.

    All random draws of an epoch are made for all original examples at once and indexed by original position, so batch
    size, order, subsets, workers and ranks do not change what happens to an example.

    Args:
        images: The examples; move their storage to ``device`` before (``images.to(device)``).
        batch_size: Examples per step over all ranks.
        normalization: Per-channel mean and deviation.
        device: Where to deliver batches.
        order: ``"shuffled"`` again in each epoch, ``"fixed"`` (one permutation for all epochs) or ``"sequential"``.
        augmentation: What to do to the images; None for nothing.
        seed: Seed of order and augmentation.
        dtype: Type of images and weights (weights never below float32).
        channels_last: Lay images out with the channels last in memory.
        rank: Which share of each batch to deliver.
        world: Number of shares.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        *,
        normalization: Normalization,
        device: str | torch.device = "cpu",
        order: str = "sequential",
        augmentation: Augmentation | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order {order!r} is not one of {ORDERS}")
        if batch_size < 1 or not 0 <= rank < world:
            raise ValueError(f"batch_size {batch_size}, rank {rank}, world {world}")
        self.images = images
        self.batch_size = batch_size
        self.order = order
        self.augmentation = augmentation or Augmentation()
        self.seed = seed
        self.dtype = dtype
        self.channels_last = channels_last
        self.rank, self.world = rank, world
        self.device = torch.device(device)
        self._labels = images.labels.to(self.device)
        self._indices = images.indices.to(self.device)
        # As torchvision: statistics in the type of the images, never below float32.
        self._compute = dtype if dtype == torch.float64 else torch.float32
        shape = (len(normalization.mean), 1, 1)
        self._mean = torch.tensor(normalization.mean, dtype=self._compute, device=self.device).view(shape)
        self._std = torch.tensor(normalization.std, dtype=self._compute, device=self.device).view(shape)

    def __len__(self) -> int:
        return self.steps(len(self.images))

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def steps(self, examples: int) -> int:
        """Batches that so many examples make."""
        return -(-examples // self.batch_size)

    def epoch(
        self, epoch: int = 0, positions: Tensor | None = None, weights: Tensor | None = None
    ) -> Iterator[Batch]:
        """One pass.

        Args:
            epoch: Its number: with the seed it decides order and augmentation.
            positions: Which examples to visit (positions in the set); all by default.
            weights: A weight for each example of the set, ``(n,)``; ones by default.

        Yields:
            This rank's share of each batch; it may be empty, so that all ranks take as many steps.
        """
        count = len(self.images)
        if weights is not None and len(weights) != count:
            raise ValueError(f"{len(weights)} weights for {count} examples")
        kind = torch.float64 if self.dtype == torch.float64 else torch.float32
        weights = torch.ones(count, dtype=kind) if weights is None else torch.as_tensor(weights, dtype=kind)
        weights = weights.to(self.device)
        visited = torch.arange(count) if positions is None else torch.as_tensor(positions, dtype=torch.int64).cpu()
        visited = self._ordered(visited, epoch).to(self.device)
        batches = visited.split(self.batch_size) if len(visited) else ()
        shares = [batch[self.rank :: self.world] for batch in batches]
        plan = _Draws(self.augmentation, self.images, self.seed, epoch, self.device)
        stream = self.images.stream((share, plan.boxes(self._indices[share])) for share in shares)
        for batch, share, pixels in zip(batches, shares, stream, strict=True):
            indices = self._indices[share]
            result = Batch(self._finish(pixels, plan, indices), self._labels[share], indices, weights[share])
            result._total_weight = weights[batch].sum()
            yield result

    def visited(self, epoch: int) -> Tensor:
        """Positions of all examples in the order of an epoch, int64 ``(n,)`` on the CPU."""
        return self._ordered(torch.arange(len(self.images)), epoch)

    def _ordered(self, positions: Tensor, epoch: int) -> Tensor:
        """``positions`` in this epoch's order; sort keys are drawn for all original positions."""
        if self.order == "sequential":
            return positions
        generator = rng.generator(self.seed, 0 if self.order == "fixed" else epoch, "order")
        keys = torch.randperm(self.images.total, generator=generator)
        return positions[keys[self.images.indices.cpu()[positions]].argsort(stable=True)]

    def _finish(self, pixels: Tensor, plan: "_Draws", indices: Tensor) -> Tensor:
        """Augment, convert and normalize uint8 ``(b, c, h, w)``."""
        pixels = pixels.to(self.device, non_blocking=True)
        if len(indices):
            pixels = plan.before(pixels, indices)
        images = pixels.to(self._compute).div_(255).sub_(self._mean).div_(self._std)
        if self.channels_last:  # after the arithmetic, which is several times slower in that layout
            images = images.contiguous(memory_format=torch.channels_last)
        if len(indices):
            images = plan.after(images, indices)
        return images.to(self.dtype)


class _Draws:
    """The random draws of one epoch, for all original examples, on the device of the batches."""

    def __init__(
        self, augmentation: Augmentation, images: ImageSet, seed: int, epoch: int, device: torch.device
    ) -> None:
        self.augmentation = augmentation
        total, size = images.total, images.entry.image_size

        def generator(purpose: str) -> torch.Generator:
            return rng.generator(seed, epoch, purpose)

        if augmentation.random_resized_crop:
            self._boxes = torch.rand(total, augment.CROP_DRAWS, generator=generator("resized_crop")).to(device)
        if augmentation.crop_padding:
            span = 2 * augmentation.crop_padding + 1
            self._offsets = torch.randint(span, (total, 2), generator=generator("crop")).to(device)
        if augmentation.flip:
            self._mirrored = (torch.rand(total, generator=generator("flip")) < 0.5).to(device)
        if augmentation.cutout_holes:
            shape = (total, augmentation.cutout_holes, 2)
            self._centers = torch.randint(size, shape, generator=generator("cutout")).to(device)

    def boxes(self, indices: Tensor) -> Tensor | None:
        """Uniform draws for random resized crops, which happen while images are read."""
        return self._boxes[indices] if self.augmentation.random_resized_crop else None

    def before(self, pixels: Tensor, indices: Tensor) -> Tensor:
        """What is done to uint8 pixels: crop, flip."""
        if self.augmentation.crop_padding:
            pixels = augment.crop(pixels, self._offsets[indices], self.augmentation.crop_padding)
        if self.augmentation.flip:
            pixels = augment.flip(pixels, self._mirrored[indices])
        return pixels

    def after(self, images: Tensor, indices: Tensor) -> Tensor:
        """What is done to normalized images: cutout."""
        if self.augmentation.cutout_holes:
            images = augment.cutout(images, self._centers[indices], self.augmentation.cutout_length)
        return images
