"""Exact and near duplicates in a data set, within the training set and across training and test set.

Three tests find them: equal pixels; a perceptual hash (the signs of the lowest frequencies), confirmed by the
correlation of the pixels; and, given a trained model, the cosine of its centered features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.cli import check_options, number, option
from src.errors import ArgumentError
from src.lazy import torch
from src.models import model_name, model_option

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from src.context import RunContext
    from src.datasets import ImageSet

FREQUENCIES = 8  # per axis; the hash has their square, 64 bits
_HASHED, _COMPARED = 32, 16  # images are reduced to these sizes for the hash and for the correlation
_READ, _SEARCHED = 512, 1024  # examples read, and compared with all others, at once
_CONFIRMED = 2**15  # pairs whose pixels are compared at once
_PER_ROW, SHOWN = 8, 24  # pairs in the figure
COLUMNS = (
    "index", "file", "class", "duplicate of", "in", "its file", "its class", "found by", "similarity"
)  # fmt: skip
TESTS = EXACT, PIXELS, FEATURES = "equal pixels", "similar pixels", "similar features"


@dataclass(frozen=True)
class DuplicateConfig:
    """What counts as a near duplicate.

    Attributes:
        hash_distance: Largest number of different bits of two perceptual hashes, of 64.
        pixel_similarity: Smallest correlation of the pixels of two images that the hash proposes.
        feature_similarity: Smallest cosine of the features of two images, minus the mean feature.
        checkpoint: The model whose features are compared; None to compare pixels only.
        model: The model's name; None for the one that the checkpoint names.
        overwrite: Whether to replace a table that was made with different settings.

    Raises:
        ArgumentError: A value is out of range, or the model does not exist.
    """

    hash_distance: int = option(
        8, "largest number of different bits of the 64-bit perceptual hashes", number(int, 0, 64)
    )
    pixel_similarity: float = option(
        0.95, "smallest correlation of the pixels of near duplicates", number(float, 0, 1)
    )
    feature_similarity: float = option(
        0.97,
        "smallest cosine of the features of near duplicates, after subtracting the mean feature",
        number(float, 0, 1),
        acts=(lambda args: args.checkpoint is not None, "without --checkpoint"),
    )
    checkpoint: Path | None = option(
        None,
        "compare the features of this model as well: a checkpoint, or any state dict of --model (default: none)",
        Path,
        metavar="FILE",
    )
    model: str | None = model_option(None, " (default: the model that --checkpoint names)")
    overwrite: bool = option(False, "replace duplicates that were found with different settings")

    def __post_init__(self) -> None:
        check_options(self)
        if self.model is not None:
            object.__setattr__(self, "model", model_name(self.model))


@dataclass
class Fingerprints:
    """What duplicates are recognized by, for n images.

    Attributes:
        exact: A digest of each image's pixels.
        bits: Perceptual hashes as ``±1/8``, float32 ``(n, 64)``: the inner product of two is ``1 - distance / 32``.
        pixels: Reduced images without mean and with norm 1, float32 ``(n, d)``; 0 for constant images.
        features: Centered features with norm 1, float32 ``(n, p)``; None without a model.
    """

    exact: Sequence[bytes]
    bits: Tensor
    pixels: Tensor
    features: Tensor | None = None


def _reduced(images: Tensor, size: int) -> Tensor:
    """Scale images ``(b, c, h, w)`` down to at most ``size`` pixels per side."""
    size = min(size, images.shape[-1])
    return torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)


def perceptual_hash(images: Tensor) -> Tensor:
    """Return which of the 64 lowest frequencies of the gray images exceed their median (Zauner 2010, "pHash").

    Args:
        images: ``(b, c, h, w)``, of any real dtype.

    Returns:
        ``±1/8``, float32 ``(b, 64)``, so that each row has norm 1.
    """
    gray = _reduced(images.float().mean(dim=1, keepdim=True), _HASHED)[:, 0]
    size = gray.shape[-1]
    positions = (torch.arange(size, device=gray.device) + 0.5) / size
    cosines = torch.cos(torch.pi * torch.arange(FREQUENCIES, device=gray.device)[:, None] * positions)  # (8, size)
    spectrum = (cosines @ gray @ cosines.T).flatten(1)
    median = spectrum[:, 1:].median(dim=1, keepdim=True).values  # without the mean gray, which is always large
    return torch.where(spectrum > median, 1.0, -1.0) / FREQUENCIES


def fingerprints(parts: Iterable[ImageSet]) -> Fingerprints:
    """Compute the digests, hashes and reduced pixels of all images of several sets, in order."""
    exact: list[bytes] = []
    bits, pixels = [], []
    for part in parts:
        starts = (torch.arange(k, min(k + _READ, len(part))) for k in range(0, len(part), _READ))
        for images in part.stream((positions, None) for positions in starts):
            exact += [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images.cpu().numpy()]
            bits.append(perceptual_hash(images).cpu())
            small = _reduced(images.float(), _COMPARED).flatten(1)
            small -= small.mean(dim=1, keepdim=True)
            norms = torch.linalg.vector_norm(small, dim=1, keepdim=True)
            pixels.append(torch.where(norms > 1e-3, small / norms, 0.0).cpu())
    return Fingerprints(exact, torch.cat(bits), torch.cat(pixels))


def centered_features(context: RunContext, checkpoint: Path, model: str | None, parts: Sequence[ImageSet]) -> Tensor:
    """Return a model's features of all images of several sets, minus their mean, with norm 1, float32 ``(n, p)``.

    A trained model maps all images of a class to nearby features, which share most of their mean; without it, cosines
    distinguish duplicates from other images of the class much better.

    Raises:
        ArgumentError: The last layer of the model is not linear.
        FileError: See ``RunContext.load_file``.
    """
    from src.models.base import FeatureReader, two_images

    network, state = context.load_file(checkpoint, model)
    tried = two_images(context.entry.channels, context.entry.image_size)
    try:
        read = FeatureReader(network, tried.to(context.device, context.precision.dtype))
    except ValueError as error:
        raise ArgumentError("checkpoint", f" {checkpoint}: its model has no features to compare: {error}") from error
    found = []
    with torch.inference_mode():
        for part in parts:
            for batch in context.batches(part, _READ, normalization=state["normalisation"]):
                found.append(read(batch.images)[0].flatten(1).float().cpu())
    features = torch.cat(found)
    features -= features.mean(dim=0)
    return torch.nn.functional.normalize(features)


def _near(
    prints: Fingerprints, config: DuplicateConfig, start: int, stop: int, kept: Tensor
) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Compare a block of examples with all earlier ones that are kept.

    Returns:
        For each test, in order of priority, its name and the near duplicates that it finds: positions, earlier
        positions, and similarities, ordered by both positions.
    """

    def above(vectors: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
        products = vectors[start:stop] @ vectors[:stop].T
        rows, earlier = torch.nonzero(products >= least, as_tuple=True)
        compared = (earlier < rows + start) & kept[earlier]
        rows, earlier = rows[compared], earlier[compared]
        return rows + start, earlier, products[rows, earlier]

    # Inner products of hashes are exact multiples of 1/32, up to rounding.
    later, earlier, _ = above(prints.bits, 1 - config.hash_distance / 32 - 1e-4)
    parts = zip(later.split(_CONFIRMED), earlier.split(_CONFIRMED), strict=True)
    similarity = torch.cat([(prints.pixels[p] * prints.pixels[q]).sum(dim=1) for p, q in parts])
    alike = similarity >= config.pixel_similarity
    found = [(PIXELS, later[alike], earlier[alike], similarity[alike])]
    if prints.features is not None:
        found.append((FEATURES, *above(prints.features, config.feature_similarity)))
    return found


def find_duplicates(prints: Fingerprints, config: DuplicateConfig) -> dict[int, tuple[int, str, float]]:
    """Find every example that duplicates an earlier one which is not a duplicate itself.

    Comparing only with examples that are kept prevents chains, in which each image resembles the next but not the
    last. Equal pixels count before similar pixels, and these before similar features; then the most similar counts,
    and of equally similar ones the first.

    Time: ``64 n^2`` multiplications, and ``p n^2`` more with features. Memory: the products of 1,024 examples.

    Args:
        prints: The fingerprints of n examples, those to keep first.
        config: What counts as a near duplicate.

    Returns:
        For the position of each duplicate: the position of the example that is kept, the test, and the similarity.
    """
    n = len(prints.exact)
    found: dict[int, tuple[int, str, float]] = {}
    kept = torch.ones(n, dtype=torch.bool)
    equal: dict[int, int] = {}
    first: dict[bytes, int] = {}
    for position, digest in enumerate(prints.exact):
        if (original := first.setdefault(digest, position)) != position:
            equal[position] = original
            kept[position] = False
    for start in range(0, n, _SEARCHED):
        near = _near(prints, config, start, min(start + _SEARCHED, n), kept)
        # One example after the other, because a duplicate is no longer compared with.
        for position in torch.cat([later for _, later, _, _ in near]).unique().tolist():
            if not kept[position]:
                continue
            for test, later, earlier, similarity in near:
                low, high = torch.searchsorted(later, torch.tensor([position, position + 1])).tolist()
                left = kept[earlier[low:high]]
                if left.any():
                    best = int(similarity[low:high][left].argmax())  # the first of the most similar
                    value = min(float(similarity[low:high][left][best]), 1.0)
                    found[position] = (int(earlier[low:high][left][best]), test, value)
                    kept[position] = False
                    break
    for position, original in equal.items():  # of the example that its equal is a near duplicate of, if there is one
        found[position] = found.get(original, (original, EXACT, 1.0))
    return found


# ------------------------------------------------------------------------------------------------ tables and figures


def duplicate_rows(found: dict[int, tuple[int, str, float]], train: ImageSet, test: ImageSet) -> list[dict[str, Any]]:
    """Describe the duplicates among test and training examples (in this order) as rows of a table.

    Returns:
        One row per duplicate, in the order of the examples, with ``part`` (``"train"`` or ``"test"``) besides the
        columns of ``COLUMNS``.
    """

    def place(position: int) -> tuple[str, int, str, str]:
        part, k = (test, position) if position < len(test) else (train, position - len(test))
        index = int(part.indices[k])
        file = "" if part.files is None else part.files[index]
        return part.part, index, file, part.class_names[int(part.labels[k])]

    rows = []
    for position, (kept, test_name, similarity) in sorted(found.items()):
        here, there = place(position), place(kept)
        values = (*here[1:], there[1], *there[:1], *there[2:], test_name, f"{similarity:.4f}")
        rows.append({"part": here[0], **dict(zip(COLUMNS, values, strict=True))})
    return rows


def pairs_figure(rows: Sequence[Mapping[str, Any]], parts: Sequence[ImageSet], title: str) -> Figure:
    """Plot duplicates, each above the example that it duplicates.

    Args:
        rows: Rows of ``duplicate_rows``.
        parts: The sets that contain the examples.
        title: The title of the figure.
    """
    from src.metrics.plots import image_grid

    sets = {part.part: (part, {index: k for k, index in enumerate(part.indices.tolist())}) for part in parts}

    def image(part: str, index: int) -> np.ndarray:
        images, positions = sets[part]
        return images.fetch(torch.tensor([positions[index]]))[0].cpu().numpy()

    columns = (("part", "index"), ("in", "duplicate of"))
    images, captions, labels = [], [], []
    for start in range(0, len(rows), _PER_ROW):
        line = rows[start : start + _PER_ROW]
        for (part, index), label in zip(columns, ("duplicate", "kept"), strict=True):
            images.append(np.stack([image(row[part], row[index]) for row in line]))
            captions.append(
                [f"{row[part]} {row[index]}\n" + (row["similarity"] if label == "kept" else "") for row in line]
            )
            labels.append(label)
    return image_grid(
        images, captions, labels, title, "Below each image: its index; below each pair: the similarity."
    )
