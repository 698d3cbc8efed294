"""A part of a data set whose images lie in memory, as one tensor."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from src.datasets.catalogue import DatasetEntry


class Content:
    """What identifies the images of a data set, computed when it is first asked for.

    Args:
        train: The whole training part, as loaded.
        test: The whole test part.
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
    """The training or the test part of a data set, or a subset of it.

    Subsets share the storage; ``indices`` say where their examples stand in the whole part.

    Attributes:
        entry: The catalogue entry.
        part: ``"train"`` or ``"test"``.
        labels: int64 ``(n,)``.
        indices: int64 ``(n,)``, the original position of each example in the whole part.
        total: Length of the whole part.
        class_names: One name per class.
        decoding: Which rules of ``decoding.as_seen`` changed pixels of this data set, such as ``"exif,alpha"``; None
            for none.
        content: What identifies the images of both parts; None where the parts were not loaded together.
    """

    content: Content | None = None

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
        """Where labels and indices lie, and the images too if they are in memory."""
        return self.labels.device

    @property
    def digest(self) -> str | None:
        """16 hex digits that identify the whole data set's images and test labels; None where they are not known."""
        return None if self.content is None else self.content.digest

    def add_content(self, digest: "hashlib._Hash") -> None:
        """Add the images of this whole part to a digest."""
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
        from src.datasets.augment import resized_crop

        for positions, draws in batches:
            images = self.fetch(positions)
            yield images if draws is None else resized_crop(images, draws)

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
