"""In-memory image sets, and iteration over them in batches that are augmented and normalized as full tensors."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from src import rng
from src.datasets import augment
from src.datasets.files import Examples, FileNames
from src.datasets.registry import Augmentation, DatasetEntry, Normalization
from src.devices import upload

ORDERS = ("shuffled", "sequential", "fixed")

# Bytes of float32 images prepared at once: on a GPU, enough to make kernel launch time negligible; on a CPU, few
# enough to stay in cache. Intermediate results take up to twice as much in addition.
PREPARED, PREPARED_ON_CPU = 64 * 2**20, 2**20


def own_digest(content: str, decoding: str | None) -> str:
    """Return the digest that identifies own data: that of the files, independent of resizing. See ``Content``."""
    return hashlib.sha256(f"{content}\0{decoding or ''}".encode()).hexdigest()[:16]


class Content:
    """The digest that identifies the images of a data set, computed on first use.

    Args:
        train: The full training set, as loaded.
        test: The full test set.
    """

    def __init__(self, train: "ImageSet", test: "ImageSet") -> None:
        self._parts: tuple[ImageSet, ...] = (train, test)
        self._digest: str | None = None

    @property
    def digest(self) -> str:
        """Digest of the training images, test images and test labels, 16 hex digits."""
        if self._digest is None:
            entry, decoding = self._parts[0].entry, self._parts[0].decoding
            if entry.content is not None:
                self._digest = own_digest(entry.content, decoding)
            else:
                digest = hashlib.sha256()
                for part in self._parts:
                    part.add_content(digest)
                digest.update(self._parts[1].labels.cpu().numpy().astype("<i8").tobytes())
                self._digest = digest.hexdigest()[:16]
            self._parts = ()  # if the images are on a GPU, this frees the copy in CPU memory
        return self._digest


class ImageSet:
    """The training or test set of a data set, or a subset of it.

    Subsets share storage. ``indices`` are the positions of the examples in the full set.

    Attributes:
        entry: The catalog entry.
        part: ``"train"`` or ``"test"``.
        labels: int64 ``(n,)``.
        indices: int64 ``(n,)``, the original index of each example, in the full set.
        total: Size of the full set.
        class_names: One name per class.
        decoding: The rules of ``as_seen`` that changed pixels of this data set, such as ``"exif,alpha"``; None if
            none did.
        content: Identifies the images of both parts; None if the parts were not loaded together.
        files: The file of each example of the full set, by original index; None if the images do not come from single
            files.
        drawn: The indices of the examples of the full set that were drawn for testing, int64 ``(m,)``; None if there
            are none. They are not for training.
        streamed: Whether images are read from files batch by batch instead of being in memory.
    """

    content: Content | None = None
    drawn: np.ndarray | None = None
    streamed = False

    def __init__(
        self,
        entry: DatasetEntry,
        part: str,
        storage: Tensor,
        labels: Tensor,
        class_names: Sequence[str] | None = None,
        *,
        indices: Tensor | None = None,
        total: int | None = None,
        rows: Tensor | None = None,
        decoding: str | None = None,
        files: FileNames | None = None,
    ) -> None:
        self.entry = entry
        self.part = part
        self.labels = labels
        self.class_names = list(class_names or entry.class_names or map(str, range(entry.num_classes)))
        self.total = len(labels) if total is None else total
        self.indices = torch.arange(len(labels), device=labels.device) if indices is None else indices
        self.decoding = decoding
        self.files = files
        self._storage = storage
        self._rows = rows  # rows of the storage; None for all rows in order

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Device of the labels and indices, and of the images if they are in memory."""
        return self.labels.device

    @property
    def digest(self) -> str | None:
        """Digest of the full data set's images and test labels, 16 hex digits; None if unknown."""
        return None if self.content is None else self.content.digest

    @property
    def examples(self) -> Examples:
        """The names, labels and files of this full set."""
        return Examples(
            self.entry.name, self.labels.cpu().numpy(), self.class_names, self.files, self.drawn, lambda: self.digest
        )

    def add_content(self, digest: "hashlib._Hash") -> None:
        """Add the images of this full set to a digest."""
        digest.update(f"{tuple(self._storage.shape)}".encode())
        digest.update(memoryview(self._storage.contiguous().numpy()).cast("B"))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.entry.channels, self.entry.image_size, self.entry.image_size

    def fetch(self, positions: Tensor) -> Tensor:
        """Return the images at ``positions`` (0 to n-1 in this set), uint8 ``(b, c, h, w)``, not augmented."""
        positions = positions.to(self.device)
        rows = positions if self._rows is None else self._rows[positions]
        return self._storage.index_select(0, rows)

    def stream(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Iterator[Tensor]:
        """Iterate over images batch by batch, so that streamed sets can read ahead.

        Args:
            batches: For each batch, its positions ``(b,)``, and uniform draws for random resized crops or None.

        Yields:
            uint8 ``(b, c, h, w)``, cropped if draws are given.
        """
        for positions, draws in batches:
            images = self.fetch(positions)
            yield images if draws is None else augment.resized_crop(images, draws)

    def subset(self, positions: Tensor) -> "ImageSet":
        """Return the examples at ``positions``, in that order. Storage is shared and original indices are kept."""
        positions = torch.as_tensor(positions, dtype=torch.int64).to(self.device)
        return self._with(
            labels=self.labels[positions],
            indices=self.indices[positions],
            rows=positions if self._rows is None else self._rows[positions],
        )

    def to(self, device: str | torch.device) -> "ImageSet":
        """Move this set to a device; returns itself if already there. For a subset, only its images are copied."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device == self.device:
            return self
        storage = self._storage if self._rows is None else self._storage.index_select(0, self._rows)
        return self._with(
            labels=self.labels.to(device), indices=self.indices.to(device), storage=storage.to(device), rows=None
        )

    def _with(
        self, *, labels: Tensor, indices: Tensor, rows: Tensor | None, storage: Tensor | None = None
    ) -> "ImageSet":
        other = type(self)(
            self.entry,
            self.part,
            self._storage if storage is None else storage,
            labels,
            self.class_names,
            indices=indices,
            total=self.total,
            rows=rows,
            decoding=self.decoding,
        )
        self._share(other)
        return other

    def _share(self, other: "ImageSet") -> None:
        """Give another set of the same data what describes the full set."""
        other.content, other.files, other.drawn = self.content, self.files, self.drawn


def empty_images(like: Tensor, count: int) -> Tensor:
    """Allocate ``count`` images with the shape, dtype, device and memory format of ``like``, ``(b, ...)``."""
    layout = torch.contiguous_format if like.is_contiguous() else torch.channels_last
    return torch.empty((count, *like.shape[1:]), dtype=like.dtype, device=like.device, memory_format=layout)


class _Fields(NamedTuple):
    images: Tensor
    labels: Tensor
    indices: Tensor
    weights: Tensor


class Batch(_Fields):
    """A batch: the tuple ``(images, labels, indices, weights)``, with the attribute ``shares``.

    Attributes:
        images: Normalized images ``(b, c, h, w)``.
        labels: int64 ``(b,)``.
        indices: Original indices, int64 ``(b,)``.
        weights: Sample weights ``(b,)``.
        shares: Each example's coefficient in the batch's mean loss, ``(b,)``: its weight divided by the sum of
            weights in the full batch over all ranks. 0 if all weights are 0.
    """

    shares: Tensor


class Batches:
    """Iterates over an image set in batches.

    Random numbers of an epoch are drawn for all original examples at once and indexed by original index. An example's
    augmentation therefore does not depend on batch size, order, subsets, workers or ranks.

    Per-example data (order, labels, indices, weights, shares) are gathered once per epoch, at about 50 bytes per
    visited example. Images are prepared for several batches at once, up to ``PREPARED`` bytes (``PREPARED_ON_CPU``
    on a CPU), but at least for one batch. Each batch is then just a view.

    Args:
        images: The examples. Move them to ``device`` first (``images.to(device)``).
        batch_size: Examples per step, over all ranks.
        normalization: Per-channel mean and standard deviation.
        device: Device of the batches.
        order: ``"shuffled"`` (a new permutation each epoch), ``"fixed"`` (one permutation for all epochs) or
            ``"sequential"``.
        augmentation: The augmentation; None for none.
        seed: Seed of order and augmentation.
        dtype: Dtype of images and weights; weights are at least float32.
        channels_last: Whether to use the channels-last memory format.
        rank: Which share of each batch to return.
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
        # Positions are needed on the device that images are read from, so the order is computed there.
        self._reader = torch.device("cpu") if images.streamed else images.device
        self._original = images.indices.to(self._reader)
        # As in torchvision: statistics in the dtype of the images, at least float32.
        self._compute = dtype if dtype == torch.float64 else torch.float32
        shape = (len(normalization.mean), 1, 1)
        self._mean = torch.tensor(normalization.mean, dtype=self._compute, device=self.device).view(shape)
        self._std = torch.tensor(normalization.std, dtype=self._compute, device=self.device).view(shape)

    def __len__(self) -> int:
        return self.steps(len(self.images))

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def steps(self, examples: int) -> int:
        """Return the number of batches for a number of examples."""
        return -(-examples // self.batch_size)

    def epoch(
        self,
        epoch: int = 0,
        positions: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        by_size: bool = False,
    ) -> Iterator[Batch]:
        """Iterate over one epoch.

        Args:
            epoch: The epoch. With the seed, it determines order and augmentation.
            positions: Positions in the set of the examples to visit; all by default.
            weights: Weights of all examples of the set, ``(n,)``; ones by default.
            by_size: Whether shares are weights divided by the number of examples in the full batch.

        Yields:
            This rank's share of each batch. It may be empty, so that all ranks take the same number of steps.
        """
        count, size = len(self.images), self.batch_size
        if weights is not None and len(weights) != count:
            raise ValueError(f"{len(weights)} weights for {count} examples")
        kind = torch.float64 if self.dtype == torch.float64 else torch.float32
        weights = torch.ones(count, dtype=kind) if weights is None else torch.as_tensor(weights, dtype=kind)
        visited = torch.arange(count) if positions is None else torch.as_tensor(positions, dtype=torch.int64)
        if not len(visited):
            return
        visited = self._ordered(upload(visited, self._reader), epoch)
        steps = self.steps(len(visited))
        sizes = [min(size, len(visited) - start) for start in range(0, len(visited), size)]  # sizes of full batches
        parts = [len(range(self.rank, full, self.world)) for full in sizes]  # sizes of this rank's shares

        def own(rows: Tensor) -> Tensor:
            """Return the entries of this rank's examples, given one row per full batch."""
            return rows[:, self.rank :: self.world].flatten()[: sum(parts)]

        rows = nn.functional.pad(visited, (0, steps * size - len(visited))).view(steps, size)
        mine, rows = own(rows), upload(rows, self.device)
        weights = upload(weights, self.device)[rows]  # (steps, size)
        weights[-1, sizes[-1] :] = 0.0
        divisors = weights.sum(1)
        divisors[-1] = weights[-1, : sizes[-1]].sum()  # summing the padding zeros could change the rounding
        if by_size:
            divisors = torch.full_like(divisors, size)
            divisors[-1] = sizes[-1]
        shares = weights * (1.0 / divisors.clamp_min(torch.finfo(kind).tiny))[:, None]
        indices = self._indices[own(rows)]
        fields = self._labels[own(rows)], indices, own(weights), own(shares)
        batches = zip(*(field.split(parts) for field in fields), strict=True)

        ahead = self._batches_ahead()
        chunks = [parts[first : first + ahead] for first in range(0, steps, ahead)]
        totals = [sum(chunk) for chunk in chunks]
        plan = _Draws(self.augmentation, self.images, self.seed, epoch, self.device, self._reader)
        read = zip(mine.split(totals), self._original[mine].split(totals), strict=True)
        stream = self.images.stream((chosen, plan.boxes(original)) for chosen, original in read)
        for pixels, these, chunk in zip(stream, indices.split(totals), chunks, strict=True):
            images = self._finish(pixels, plan, these)
            for part, (labels, originals, weight, share) in zip(images.split(chunk), batches, strict=False):
                batch = Batch(part, labels, originals, weight)
                batch.shares = share
                yield batch

    def _batches_ahead(self) -> int:
        """Return the number of batches to prepare at once. Streamed images are read ahead one batch at a time."""
        if self.images.streamed:
            return 1
        share, (channels, height, width) = -(-self.batch_size // self.world), self.images.image_shape
        allowed = PREPARED_ON_CPU if self.device.type == "cpu" else PREPARED
        return max(1, allowed // (4 * share * channels * height * width))

    def visited(self, epoch: int) -> Tensor:
        """Return the positions of all examples in the order of an epoch, int64 ``(n,)`` on the CPU."""
        return self._ordered(torch.arange(len(self.images), device=self._reader), epoch).cpu()

    def _ordered(self, positions: Tensor, epoch: int) -> Tensor:
        """Return ``positions`` in this epoch's order. Sort keys are drawn for all original indices."""
        if self.order == "sequential":
            return positions
        generator = rng.generator(self.seed, 0 if self.order == "fixed" else epoch, "order")
        keys = upload(torch.randperm(self.images.total, generator=generator), self._reader)
        return positions[keys[self._original[positions]].argsort(stable=True)]

    def _finish(self, pixels: Tensor, plan: "_Draws", indices: Tensor) -> Tensor:
        """Augment, convert and normalize uint8 ``(b, c, h, w)``."""
        pixels = pixels.to(self.device, non_blocking=True)
        if len(indices):
            pixels = plan.before(pixels, indices)
        images = pixels.to(self._compute).div_(255).sub_(self._mean).div_(self._std)
        if self.channels_last:  # after the arithmetic, which is several times slower in channels-last format
            images = images.contiguous(memory_format=torch.channels_last)
        if len(indices):
            images = plan.after(images, indices)
        return images.to(self.dtype)


class _Draws:
    """The random draws of one epoch for all original examples, on the devices that use them.

    Args:
        augmentation: The augmentation.
        images: The images.
        seed: The run's seed.
        epoch: The epoch.
        device: Device of the batches.
        reader: Device that images are read from and cropped to boxes on.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        images: ImageSet,
        seed: int,
        epoch: int,
        device: torch.device,
        reader: torch.device,
    ) -> None:
        self.augmentation = augmentation
        total, size = images.total, images.entry.image_size

        def generator(purpose: str) -> torch.Generator:
            return rng.generator(seed, epoch, purpose)

        if augmentation.random_resized_crop:
            draws = torch.rand(total, augment.CROP_DRAWS, generator=generator("resized_crop"))
            self._boxes = upload(draws, reader)
        if augmentation.crop_padding:
            span = 2 * augmentation.crop_padding + 1
            self._offsets = upload(torch.randint(span, (total, 2), generator=generator("crop")), device)
        if augmentation.flip:
            alternate = augmentation.alternate_flips
            drawn = torch.rand(total, generator=rng.generator(seed, 0 if alternate else epoch, "flip")) < 0.5
            self._mirrored = upload(~drawn if alternate and epoch % 2 else drawn, device)
        if augmentation.cutout_holes:
            shape = (total, augmentation.cutout_holes, 2)
            self._centers = upload(torch.randint(size, shape, generator=generator("cutout")), device)

    def boxes(self, indices: Tensor) -> Tensor | None:
        """Return the uniform draws for random resized crops, which are applied while images are read."""
        return self._boxes[indices] if self.augmentation.random_resized_crop else None

    def before(self, pixels: Tensor, indices: Tensor) -> Tensor:
        """Apply the augmentations of uint8 pixels: crop and flip."""
        if self.augmentation.crop_padding:
            pixels = augment.crop(pixels, self._offsets[indices], self.augmentation.crop_padding)
        if self.augmentation.flip:
            pixels = augment.flip(pixels, self._mirrored[indices])
        return pixels

    def after(self, images: Tensor, indices: Tensor) -> Tensor:
        """Apply the augmentation of normalized images: Cutout."""
        if self.augmentation.cutout_holes:
            images = augment.cutout(images, self._centers[indices], self.augmentation.cutout_length)
        return images
