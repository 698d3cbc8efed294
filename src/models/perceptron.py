"""Multi-layer perceptrons: mlp (SAMIS), small_mlp and large_mlp (Memory-Perturbation Equation)."""

from collections.abc import Callable, Sequence

from torch import nn

from src.models.network import Network


def build_perceptron(
    num_inputs: int, widths: Sequence[int], num_classes: int, activation: Callable[[], nn.Module]
) -> Network:
    """Flatten, then a linear layer and an activation for each width, then the head; PyTorch's initial weights."""
    body = nn.Sequential(nn.Flatten())
    for width in widths:
        body.append(nn.Linear(num_inputs, width))
        body.append(activation())
        num_inputs = width
    return Network(body, nn.Linear(num_inputs, num_classes))


def mlp(num_classes: int, in_channels: int, image_size: int) -> Network:
    """Perceptron of two hidden layers of 128, ReLU."""
    return build_perceptron(in_channels * image_size**2, (128, 128), num_classes, nn.ReLU)


def small_mlp(num_classes: int, in_channels: int, image_size: int) -> Network:
    """Perceptron of hidden layers 32 and 16, tanh."""
    return build_perceptron(in_channels * image_size**2, (32, 16), num_classes, nn.Tanh)


def large_mlp(num_classes: int, in_channels: int, image_size: int) -> Network:
    """Perceptron of hidden layers 500 and 300, tanh."""
    return build_perceptron(in_channels * image_size**2, (500, 300), num_classes, nn.Tanh)
