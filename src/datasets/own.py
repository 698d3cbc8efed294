"""What own data need besides reading: a name, a size, a normalisation, and labels that make sense."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from src.datasets.catalogue import Augmentation, DatasetEntry, Normalisation
from src.errors import FileError

GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, as Pillow's "L"


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """Turn uint8 ``(n, c, h, w)`` into grey (1) or colour (3)."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    grey = images.new_empty(len(images), 1, *images.shape[2:])
    weights = torch.tensor(GREY).view(3, 1, 1)
    for start in range(0, len(images), 1024):  # a block at a time: floats take four times the room
        block = slice(start, start + 1024)
        grey[block] = (images[block].float() * weights).sum(1, keepdim=True).round_().clamp_(0, 255).to(torch.uint8)
    return grey


def resize(images: Tensor, size: int) -> Tensor:
    """Scale uint8 ``(n, c, h, w)`` so that the shorter side is ``size`` (bilinear, antialiased), and cut the centre.

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


def normalisation_of(images: Tensor) -> Normalisation:
    """Mean and deviation per channel of uint8 ``(n, c, h, w)``, exact, from its histogram."""
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256)
        for block in images[:, channel].split(512):  # counting takes eight bytes for each of a block
            counts += np.bincount(block.reshape(-1).numpy(), minlength=256)
        mean = (counts * values).sum() / counts.sum()
        deviation = np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum())
        means.append(float(mean))
        deviations.append(float(deviation) or 1.0)  # a constant channel
    return Normalisation(tuple(means), tuple(deviations))


def own_entry(stem: str, digest: str, source: str, images: Tensor, num_classes: int) -> DatasetEntry:
    """The entry of own data: named by stem and content; crop (an eighth of the size) and flip as augmentation.

    Args:
        stem: File or folder name.
        digest: Hex digest of the content; 8 digits are in the name.
        source: ``"npz"`` or ``"folder"``.
        images: The training images, uint8 ``(n, c, s, s)``.
        num_classes: Number of classes.
    """
    normalisation = normalisation_of(images)
    size = images.shape[-1]
    return DatasetEntry(
        name=f"{re.sub(r'[^A-Za-z0-9._-]+', '_', stem)}-{digest[:8]}",
        num_classes=num_classes,
        channels=images.shape[1],
        image_size=size,
        normalisations={"samis": normalisation, "mpe": normalisation},
        source=source,
        augmentation=Augmentation(crop_padding=max(1, size // 8), flip=True),
        cutout=True,
        content=digest,
    )


def content_digest(parts: Sequence[tuple[str, bytes | memoryview]]) -> str:
    """The sha256 of named byte strings, in their order."""
    digest = hashlib.sha256()
    for name, content in parts:
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def check_classes(where: str, train: np.ndarray, test: np.ndarray) -> int:
    """The number of classes, after checking that training has them all.

    Raises:
        FileError: A class has no training image, or test has a class that training lacks.
    """
    present = np.unique(train)
    foreign = np.setdiff1d(test, present)
    if len(foreign):
        raise FileError(
            f"{where}: y_test holds class {foreign[0]}, which y_train lacks; every test class needs training images"
        )
    if len(present) == 1:
        raise FileError(f"{where}: y_train holds class {present[0]} only; two classes are needed at least")
    gaps = np.flatnonzero(present != np.arange(len(present)))
    if len(gaps):
        raise FileError(
            f"{where}: y_train holds no image of class {gaps[0]}, though its labels go up to {present[-1]}; "
            "number the classes from 0 without gaps"
        )
    return int(present[-1]) + 1
