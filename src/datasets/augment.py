"""Batched image augmentation. Every function takes its random draws as arguments, one row per example."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Random resized crop: fraction of the area, aspect ratio, and attempts before falling back to a center crop
# (Szegedy et al. 2015, "Going deeper with convolutions", section 6).
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10
CROP_DRAWS = 2 * TRIES + 2


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Flip the images marked in ``mirrored`` horizontally.

    Args:
        images: ``(b, c, h, w)``.
        mirrored: bool ``(b,)``.

    Returns:
        ``(b, c, h, w)``.
    """
    # Copying whole images from a stack of both versions is much faster than a masked select.
    count = len(images)
    both = torch.cat([images, images.flip(-1)])
    return both.index_select(0, torch.arange(count, device=images.device) + count * mirrored.long())


def crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Pad images with zeros and crop a window of the original size from each.

    Args:
        images: ``(b, c, h, w)``.
        offsets: int64 ``(b, 2)``, top and left of each window, 0 to ``2 * padding``.
        padding: Width of the zero padding on each side.

    Returns:
        ``(b, c, h, w)``.
    """
    count, _, height, width = images.shape
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    rows = torch.arange(count, device=images.device)
    return windows[rows, :, offsets[:, 0], offsets[:, 1]]  # (b, c, 2p+1, 2p+1, h, w) -> (b, c, h, w)


def cutout(images: Tensor, centers: Tensor, length: int) -> Tensor:
    """Set squares to 0 (the mean color) in place.

    DeVries and Taylor 2017, "Improved regularization of convolutional neural networks with Cutout".

    Args:
        images: Normalized ``(b, c, h, w)``.
        centers: int64 ``(b, holes, 2)``, row and column of each center.
        length: Side of a square. It covers center - length//2 (inclusive) to center + length//2 (exclusive),
            clipped at the border. Squares may overlap.

    Returns:
        ``images``.
    """
    half = length // 2

    def inside(center: Tensor, size: int) -> Tensor:
        position = torch.arange(size, device=images.device)
        return (position >= center[..., None] - half) & (position < center[..., None] + half)  # (b, holes, size)

    rows = inside(centers[..., 0], images.shape[2])
    columns = inside(centers[..., 1], images.shape[3])
    holes = (rows[..., :, None] & columns[..., None, :]).any(dim=1)  # (b, h, w)
    return images.masked_fill_(holes[:, None], 0)


def crop_boxes(draws: Tensor, height: Tensor | int, width: Tensor | int) -> Tensor:
    """Compute the boxes of random resized crops.

    Of ten attempts with uniform area and log aspect ratio, the first that fits is used, at a uniform position. If
    none fits, the box is the largest centered one with an allowed aspect ratio.

    Args:
        draws: Uniform in [0, 1), ``(b, CROP_DRAWS)``: areas, ratios and position.
        height: Image height, a number or ``(b,)``.
        width: Image width, a number or ``(b,)``.

    Returns:
        int64 ``(b, 4)``: top, left, height, width.
    """
    draws = draws.double()
    height = torch.as_tensor(height, device=draws.device).expand(len(draws))
    width = torch.as_tensor(width, device=draws.device).expand(len(draws))
    area = (AREA[0] + (AREA[1] - AREA[0]) * draws[:, :TRIES]) * (height * width)[:, None]
    low, high = torch.tensor(RATIO, dtype=torch.float64).log().tolist()
    ratio = (low + (high - low) * draws[:, TRIES : 2 * TRIES]).exp()
    tall, wide = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
    fits = (tall > 0) & (tall <= height[:, None]) & (wide > 0) & (wide <= width[:, None])
    first = fits.int().argmax(dim=1, keepdim=True)
    some = fits.any(dim=1)
    fallback_tall = torch.minimum(height, (width / RATIO[0]).round().long())
    fallback_wide = torch.minimum(width, (height * RATIO[1]).round().long())
    tall = torch.where(some, tall.gather(1, first)[:, 0], fallback_tall)
    wide = torch.where(some, wide.gather(1, first)[:, 0], fallback_wide)
    top = torch.where(some, (draws[:, -2] * (height - tall + 1)).long(), (height - tall) // 2)
    left = torch.where(some, (draws[:, -1] * (width - wide + 1)).long(), (width - wide) // 2)
    return torch.stack([top, left, tall, wide], dim=1)


def resized_crop(images: Tensor, draws: Tensor) -> Tensor:
    """Apply random resized crops to images in memory, scaled bilinearly to the original size.

    Boxes are only enlarged, so no antialiasing is needed.

    Args:
        images: uint8 ``(b, c, h, w)``.
        draws: Uniform ``(b, CROP_DRAWS)``; see ``crop_boxes``.

    Returns:
        uint8 ``(b, c, h, w)``.
    """
    height, width = images.shape[2:]
    boxes = crop_boxes(draws, height, width).to(torch.float32)  # (b, 4)

    def coordinates(start: Tensor, extent: Tensor, size: int) -> Tensor:
        """Return the source coordinates of the output pixels, clamped to the box, in grid_sample's convention."""
        steps = (torch.arange(size, device=images.device) + 0.5) / size
        pixel = (steps * extent[:, None] - 0.5).clamp(min=0).minimum(extent[:, None] - 1) + start[:, None]
        return (2 * pixel + 1) / size - 1

    rows, columns = coordinates(boxes[:, 0], boxes[:, 2], height), coordinates(boxes[:, 1], boxes[:, 3], width)
    grid = torch.stack([columns[:, None, :].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)], dim=-1)
    scaled = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return scaled.round_().clamp_(0, 255).to(torch.uint8)
