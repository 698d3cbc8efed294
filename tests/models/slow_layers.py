"""Layers of the Memory-Perturbation Equation's convolutional networks, written out position by position."""

import torch
from torch.nn import functional as F


def windows(x, kernel, stride):
    """All windows of TensorFlow's SAME layers, cut one by one: (n, c, kernel, kernel, rows, columns)."""
    n, c, *size = x.shape
    out = [(s + stride - 1) // stride for s in size]
    before = [max((o - 1) * stride + kernel - s, 0) // 2 for o, s in zip(out, size, strict=True)]
    found = x.new_zeros(n, c, kernel, kernel, *out)
    for row in range(out[0]):
        for column in range(out[1]):
            for i in range(kernel):
                for j in range(kernel):
                    y, z = row * stride - before[0] + i, column * stride - before[1] + j
                    if 0 <= y < size[0] and 0 <= z < size[1]:
                        found[:, :, i, j, row, column] = x[:, :, y, z]
    return found


def slow_conv(x, weight, bias, stride=1):
    cut = windows(x, weight.shape[-1], stride)
    return torch.einsum("ncijrs,ocij->nors", cut, weight) + bias[:, None, None]


def slow_valid_conv(x, weight, bias):
    kernel = weight.shape[-1]
    side = x.shape[-1] - kernel + 1
    columns = F.unfold(x, kernel)  # (n, c * kernel^2, positions)
    return (weight.flatten(1) @ columns + bias[:, None]).unflatten(2, (side, side))


def slow_pool(x):
    return windows(x, 3, 2).amax((2, 3))


def slow_norm(x, tau, beta, gamma):
    out = torch.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            scaled = x[n, c] / ((x[n, c] ** 2).sum() / x[n, c].numel() + 1e-6) ** 0.5
            out[n, c] = (gamma[0, c] * scaled + beta[0, c]).clamp(min=tau[0, c].item())
    return out
