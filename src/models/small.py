"""Small models: LeNet-5, DeepOBS's convolutional network ("3c3d"), and multi-layer perceptrons.

mlp is of the SAMIS experiments, the others of the Memory-Perturbation Equation's. Sources: LeCun et al. 1998,
"Gradient-based learning applied to document recognition"; Schneider et al. 2019, "DeepOBS: a deep learning optimizer
benchmark suite"; Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks".
"""

from collections.abc import Callable, Sequence

from torch import nn

from src.models.base import Network, center_pad, same_conv, same_max_pool


def lenet(num_classes: int, in_channels: int, image_size: int) -> Network:
    """LeNet-5 with PyTorch's initial weights; feature maps of 28, 14, 10, 5 and 1 pixels.

    Images under 28 pixels are padded with zeros to 28. At 32 the first convolution has no padding. At any other
    size the third convolution's activations are averaged over positions. Other channel counts widen the first layer
    only.
    """
    body = nn.Sequential(
        center_pad(image_size, 28),
        nn.Conv2d(in_channels, 6, 5, padding=0 if image_size == 32 else 2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 120, 5),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),  # nothing to average at 28 and 32
        nn.Flatten(),
        nn.Linear(120, 84),
        nn.Tanh(),
    )
    return Network(body, nn.Linear(84, num_classes))


def cnn_deepobs(num_classes: int, in_channels: int, image_size: int) -> Network:
    """Convolutions of 64, 96 and 128 channels, linear layers of 512 and 256; maps of 28, 14, 12, 6 and 3 pixels.

    ReLU after every layer but the last, and a maximum over 3x3 windows of stride 2 after every convolution. Images
    of 25 to 32 pixels end in 3x3 maps by themselves. Smaller ones are padded with zeros to 25, and the maps of
    larger ones are averaged to 3x3, so the parameters are the same in number at every size. Other channel counts
    widen the first layer only.
    """
    body = nn.Sequential(
        center_pad(image_size, 25),
        nn.Conv2d(in_channels, 64, 5),
        nn.ReLU(),
        *same_max_pool(),
        nn.Conv2d(64, 96, 3),
        nn.ReLU(),
        *same_max_pool(),
        *same_conv(96, 128, 3),
        nn.ReLU(),
        *same_max_pool(),
        nn.AdaptiveAvgPool2d(3),  # nothing to average up to 32
        nn.Flatten(),
        nn.Linear(128 * 3 * 3, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
    )
    network = Network(body, nn.Linear(256, num_classes))
    for module in network.modules():  # weights from Xavier's normal and uniform distributions, biases 0
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return network


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
