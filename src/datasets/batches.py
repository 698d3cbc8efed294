"""Sets of images in memory, and epochs of batches: ordered, augmented and normalized as full tensors."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from src import rng
from src.datasets import augment
from src.datasets.registry import Augmentation, DatasetEntry, Normalization
from src.devices import upload

ORDERS = ("shuffled", "sequential", "fixed")

# Bytes of images, as float32, that are prepared at once: on a GPU so many that launching the operations does not
# count, on a CPU so few that they stay in its cache. Intermediate results take up to twice as much again.
PREPARED, PREPARED_ON_CPU = 64 * 2**20, 2 * 2**20


class Content:
    """What identifies the images of a data set, computed when it is first asked for.

    Args:
        train: The full training set, as loaded.
        test: The full test set.
    """

    def __init__(self, train: "ImageSet", test: "ImageSet") -> None:
        self._parts: tuple[ImageSet, ...] = (train, test)
        self._digest: str | None = None

    @property
    def digest(self) -> str:
        """16 hex digits of the training images, the test images and the test labels."""
        if self._digest is None:
            digest = hashlib.sha256()
            entry, decoding = self._parts[0].entry, self._parts[0].decoding
            if entry.content is not None:  # own data: their files, whatever they are resized to
                digest.update(f"{entry.content}\0{decoding or ''}".encode())
            else:
                for part in self._parts:
                    part.add_content(digest)
                digest.update(self._parts[1].labels.cpu().numpy().astype("<i8").tobytes())
            self._digest = digest.hexdigest()[:16]
            self._parts = ()  # on a GPU, the images in main memory are not needed any more
        return self._digest


class ImageSet:
    """The training or the test set of a data set, or a subset of it.

    Subsets share the storage; ``indices`` are the positions of their examples in the full set.

    Attributes:
        entry: The catalog entry.
        part: ``"train"`` or ``"test"``.
        labels: int64 ``(n,)``.
        indices: int64 ``(n,)``, the original position of each example in the full set.
        total: Length of the full set.
        class_names: One name per class.
        decoding: Which rules of ``as_seen`` changed pixels of this data set, such as ``"exif,alpha"``; None
            for none.
        content: What identifies the images of both parts; None where the parts were not loaded together.
        streamed: Whether images are read from files batch by batch; else they are in memory.
    """

    content: Content | None = None
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
    ) -> None:
        self.entry = entry
        self.part = part
        self.labels = labels
        self.class_names = list(class_names or entry.class_names or map(str, range(entry.num_classes)))
        self.total = len(labels) if total is None else total
        self.indices = torch.arange(len(labels), device=labels.device) if indices is None else indices
        self.decoding = decoding
        self._storage = storage
        self._rows = rows  # rows of the storage; None for all of them in order

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where labels and indices are, and the images too if they are in memory."""
        return self.labels.device

    @property
    def digest(self) -> str | None:
        """16 hex digits that identify the full data set's images and test labels; None where they are not known."""
        return None if self.content is None else self.content.digest

    def add_content(self, digest: "hashlib._Hash") -> None:
        """Add the images of this full set to a digest."""
        digest.update(f"{tuple(self._storage.shape)}".encode())
        digest.update(memoryview(self._storage.contiguous().numpy()).cast("B"))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.entry.channels, self.entry.image_size, self.entry.image_size

    def fetch(self, positions: Tensor) -> Tensor:
        """Images at ``positions`` (0 to n-1, within this set), as uint8 ``(b, c, h, w)``, un-augmented."""
        positions = positions.to(self.device)
        rows = positions if self._rows is None else self._rows[positions]
        return self._storage.index_select(0, rows)

    def stream(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Iterator[Tensor]:
        """Images batch by batch, for sets that are read ahead.

        Args:
            batches: Positions ``(b,)`` of each batch, and its uniform draws for random resized crops or None.

        Yields:
            uint8 ``(b, c, h, w)``, cropped where draws are given.
        """
        for positions, draws in batches:
            images = self.fetch(positions)
            yield images if draws is None else augment.resized_crop(images, draws)

    def subset(self, positions: Tensor) -> "ImageSet":
        """The examples at ``positions``, in that order; the storage is shared, original indices are kept."""
        positions = torch.as_tensor(positions, dtype=torch.int64).to(self.device)
        return self._with(
            labels=self.labels[positions],
            indices=self.indices[positions],
            rows=positions if self._rows is None else self._rows[positions],
        )

    def to(self, device: str | torch.device) -> "ImageSet":
        """This set on a device (itself if it is there); of a subset only its own images are copied."""
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
        other.content = self.content
        return other


def empty_images(like: Tensor, count: int) -> Tensor:
    """Space for ``count`` images of the shape, type, device and memory layout of ``like``, ``(b, ...)``."""
    layout = torch.contiguous_format if like.is_contiguous() else torch.channels_last
    return torch.empty((count, *like.shape[1:]), dtype=like.dtype, device=like.device, memory_format=layout)


class _Fields(NamedTuple):
    images: Tensor
    labels: Tensor
    indices: Tensor
    weights: Tensor


class Batch(_Fields):
    """``(images, labels, indices, weights)``, and ``shares``.

    Attributes:
        images: Normalized ``(b, c, h, w)``.
        labels: int64 ``(b,)``.
        indices: int64 ``(b,)``, original positions.
        weights: ``(b,)``.
        shares: ``(b,)``, the weights over their sum in the full batch of all ranks: what each example's loss counts
            in the batch's mean loss. 0 where all weights are 0.
    """

    shares: Tensor


class Batches:
    """Cuts epochs of an image set into batches.

    All random draws of an epoch are made for all original examples at once and indexed by original position, so batch
    size, order, subsets, workers and ranks do not change what happens to an example.

    What belongs to examples (order, labels, indices, weights, shares) is gathered once per epoch, at about 50 bytes
    per visited example. Images are prepared for several batches at once, up to ``PREPARED`` bytes of them
    (``PREPARED_ON_CPU`` there), or for one larger batch: a batch itself then costs no operation but views.

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
        # Positions are needed where images are read, so the order is made there.
        self._reader = torch.device("cpu") if images.streamed else images.device
        self._original = images.indices.to(self._reader)
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
        self,
        epoch: int = 0,
        positions: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        by_size: bool = False,
    ) -> Iterator[Batch]:
        """One pass.

        Args:
            epoch: Its number: with the seed it decides order and augmentation.
            positions: Which examples to visit (positions in the set); all by default.
            weights: A weight for each example of the set, ``(n,)``; ones by default.
            by_size: Whether shares are the weights over the number of examples in the full batch.

        Yields:
            This rank's share of each batch; it may be empty, so that all ranks take as many steps.
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
        sizes = [min(size, len(visited) - start) for start in range(0, len(visited), size)]  # of full batches
        parts = [len(range(self.rank, full, self.world)) for full in sizes]  # of this rank's

        def own(rows: Tensor) -> Tensor:
            """What belongs to this rank's examples, of a row per full batch."""
            return rows[:, self.rank :: self.world].flatten()[: sum(parts)]

        rows = nn.functional.pad(visited, (0, steps * size - len(visited))).view(steps, size)
        mine, rows = own(rows), upload(rows, self.device)
        weights = upload(weights, self.device)[rows]  # (steps, size)
        weights[-1, sizes[-1] :] = 0.0
        divisors = weights.sum(1)
        divisors[-1] = weights[-1, : sizes[-1]].sum()  # zeros at the end could change its rounding
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
        """How many batches' images are prepared at once; files are read ahead one batch at a time."""
        if self.images.streamed:
            return 1
        share, (channels, height, width) = -(-self.batch_size // self.world), self.images.image_shape
        allowed = PREPARED_ON_CPU if self.device.type == "cpu" else PREPARED
        return max(1, allowed // (4 * share * channels * height * width))

    def visited(self, epoch: int) -> Tensor:
        """Positions of all examples in the order of an epoch, int64 ``(n,)`` on the CPU."""
        return self._ordered(torch.arange(len(self.images), device=self._reader), epoch).cpu()

    def _ordered(self, positions: Tensor, epoch: int) -> Tensor:
        """``positions`` in this epoch's order; sort keys are drawn for all original positions."""
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
        if self.channels_last:  # after the arithmetic, which is several times slower in that layout
            images = images.contiguous(memory_format=torch.channels_last)
        if len(indices):
            images = plan.after(images, indices)
        return images.to(self.dtype)


class _Draws:
    """The random draws of one epoch, for all original examples, on the device where they are used.

    Args:
        augmentation: What is done to images.
        images: The images.
        seed: Seed of the run.
        epoch: The epoch.
        device: Of the batches.
        reader: Where images are read, and cut to boxes on the way.
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
            self._mirrored = upload(torch.rand(total, generator=generator("flip")) < 0.5, device)
        if augmentation.cutout_holes:
            shape = (total, augmentation.cutout_holes, 2)
            self._centers = upload(torch.randint(size, shape, generator=generator("cutout")), device)

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
