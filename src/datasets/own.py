"""What the user's own data of all kinds share: conversion of images, the catalog entry, and drawn test examples."""

import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from src.datasets.batches import ImageSet
from src.datasets.files import FileNames
from src.datasets.registry import Augmentation, DataConfig, DatasetEntry, Normalization
from src.datasets.splits import rounded_share
from src.errors import ArgumentError, FileError

GRAY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as Pillow's "L"
TEST_FRACTION = 0.2  # drawn for testing from data without a test part, unless --test_fraction is given

log = logging.getLogger(__name__)


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """Convert uint8 ``(n, c, h, w)`` to gray (1) or color (3)."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    gray = images.new_empty(len(images), 1, *images.shape[2:])
    weights = torch.tensor(GRAY).view(3, 1, 1)
    for start in range(0, len(images), 1024):  # in blocks, because floats take four times the memory
        block = slice(start, start + 1024)
        gray[block] = (images[block].float() * weights).sum(1, keepdim=True).round_().clamp_(0, 255).to(torch.uint8)
    return gray


def resize(images: Tensor, size: int) -> Tensor:
    """Scale uint8 ``(n, c, h, w)`` to a shorter side of ``size`` (bilinear, antialiased), and crop the center.

    Returns:
        uint8 ``(n, c, size, size)``.
    """
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    scale = size / min(height, width)
    tall, wide = max(size, round(height * scale)), max(size, round(width * scale))
    top, left = (tall - size) // 2, (wide - size) // 2
    scaled = images.new_empty(len(images), images.shape[1], size, size)
    for start in range(0, len(images), 1024):
        block = images[start : start + 1024].float()
        block = F.interpolate(block, (tall, wide), mode="bilinear", antialias=True, align_corners=False)
        block = block[:, :, top : top + size, left : left + size].round_().clamp_(0, 255)
        scaled[start : start + 1024] = block.to(torch.uint8)
    return scaled


def normalization_of(images: Tensor, rows: Tensor | None = None) -> Normalization:
    """Compute the exact per-channel mean and standard deviation from histograms.

    Args:
        images: uint8 ``(n, c, h, w)``.
        rows: The images to use; None for all.
    """
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256)
        # in blocks, because bincount needs eight bytes per pixel
        blocks = images[:, channel].split(512) if rows is None else (images[k, channel] for k in rows.split(512))
        for block in blocks:
            counts += np.bincount(block.reshape(-1).numpy(), minlength=256)
        mean = (counts * values).sum() / counts.sum()
        deviation = np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum())
        means.append(float(mean))
        deviations.append(float(deviation) or 1.0)  # a constant channel
    return Normalization(tuple(means), tuple(deviations))


def own_name(stem: str, digest: str) -> str:
    """Return the name of own data: the file or folder name, made safe for paths, and 8 digits of the digest."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', stem)}-{digest[:8]}"


def draw_test(where: str | Path, parts: Sequence[np.ndarray], config: DataConfig) -> np.ndarray | None:
    """Draw test examples from data without a test part: the same fraction of each class.

    Each class keeps at least one training example. The draw depends on the labels, the fraction and the seed only.

    Args:
        where: The data, for messages.
        parts: The labels of each part ``(n,)``; of only one part if there is no test part.
        config: Its ``test_fraction`` and ``test_seed``.

    Returns:
        The indices of the drawn examples, int64 ``(m,)``, ascending; None if there is a test part.

    Raises:
        ArgumentError: A flag is given, but there is a test part.
        FileError: No example was drawn, because the classes are too small.
    """
    if len(parts) > 1:
        for name, default in (("test_fraction", None), ("test_seed", 0)):
            if getattr(config, name) != default:
                raise ArgumentError(name, f"{getattr(config, name)}: {where} has a test part; remove the flag")
        return None
    labels = parts[0]
    fraction = TEST_FRACTION if config.test_fraction is None else config.test_fraction
    generator = np.random.RandomState(config.test_seed)
    drawn = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(rounded_share(len(members), fraction), len(members) - 1)
        drawn.append(generator.permutation(members)[:count])
    chosen = np.sort(np.concatenate(drawn)).astype(np.int64)
    if not len(chosen):
        raise FileError(
            f"{where}: has no test part, and --test_fraction {fraction:g} of each class is less than one image; "
            "give a larger fraction, or add test images"
        )
    log.info(
        "%s: no test part; drew %d of %d images for testing, which get no score (--test_fraction %g, --test_seed %d)",
        where, len(chosen), len(labels), fraction, config.test_seed,
    )  # fmt: skip
    return chosen


def content_of(digest: str, drawn: np.ndarray | None) -> str:
    """Return the hex digest of the contents and of which examples were drawn for testing."""
    if drawn is None:
        return digest
    return hashlib.sha256(f"{digest}\0".encode() + drawn.astype("<i8").tobytes()).hexdigest()


def own_sets(
    stem: str,
    digest: str,
    images: Sequence[Tensor],
    labels: Sequence[np.ndarray],
    names: Sequence[str],
    *,
    files: Sequence[FileNames | None] = (None, None),
    drawn: np.ndarray | None = None,
    normalization: Normalization | None = None,
    decoding: str | None = None,
) -> tuple[ImageSet, ImageSet]:
    """Build the training and the test set of own data, with crops (padding size // 8) and flips as augmentation.

    Args:
        stem: File or folder name.
        digest: Hex digest of the contents; the name includes 8 digits.
        images: uint8 ``(n, c, s, s)`` of each part; only of one part if test examples are drawn from it.
        labels: The labels of each part.
        names: One name per class.
        files: The files of each part, if the images come from files.
        drawn: The indices drawn for testing; None if there is a test part. The training set then has the images of
            all examples, and its ``drawn`` tells which are not for training.
        normalization: The normalization of ``images[0]``, if known; None to compute it.
        decoding: See ``ImageSet``.

    Returns:
        The training set and the test set.
    """
    used = None
    if drawn is not None:
        used = torch.from_numpy(np.setdiff1d(np.arange(len(labels[0])), drawn))
    if normalization is None or used is not None:
        normalization = normalization_of(images[0], used)
    size = images[0].shape[-1]
    entry = DatasetEntry(
        name=own_name(stem, digest),
        num_classes=len(names),
        channels=images[0].shape[1],
        image_size=size,
        normalizations={"samis": normalization, "mpe": normalization},
        load=None,
        augmentation=Augmentation(crop_padding=max(1, size // 8), flip=True),
        cutout=True,
        content=content_of(digest, drawn),
    )
    tensors = [torch.from_numpy(label) for label in labels]
    train = ImageSet(entry, "train", images[0], tensors[0], names, decoding=decoding, files=files[0])
    if drawn is None:
        test = ImageSet(entry, "test", images[1], tensors[1], names, decoding=decoding, files=files[1])
        return train, test
    rows, listed = torch.from_numpy(drawn), files[0]
    listed = None if listed is None else listed.of(drawn)
    test = ImageSet(entry, "test", images[0], tensors[0][rows], names, rows=rows, decoding=decoding, files=listed)
    train.drawn = drawn
    return train, test


def count_classes(where: str, train: np.ndarray, test: np.ndarray | None) -> int:
    """Count the classes, and check that each has training images.

    Raises:
        FileError: A class has no training images, or there is only one class.
    """
    present = np.unique(train)
    foreign = np.setdiff1d(present if test is None else test, present)
    if len(foreign):
        raise FileError(
            f"{where}: y_test has class {foreign[0]}, but y_train does not; every test class needs training images"
        )
    if len(present) == 1:
        raise FileError(f"{where}: y_train has only class {present[0]}; at least two classes are needed")
    gaps = np.flatnonzero(present != np.arange(len(present)))
    if len(gaps):
        raise FileError(
            f"{where}: y_train has no images of class {gaps[0]}, but labels up to {present[-1]}; number the classes "
            "from 0 without gaps"
        )
    return int(present[-1]) + 1


def convert_all(where: str | Path, images: list[Tensor], config: DataConfig) -> list[Tensor]:
    """Convert the images of all parts to the configured channels and size.

    Raises:
        FileError: The images are not square, and no size is configured.
    """
    height, width = images[0].shape[2:]
    if config.image_size is None and height != width:
        raise FileError(f"{where}: has {height}x{width} images; make them square, or give --image_size")
    for index, storage in enumerate(images):
        if config.channels is not None:
            storage = convert_channels(storage, config.channels)
        images[index] = storage if config.image_size is None else resize(storage, config.image_size)
    return images
