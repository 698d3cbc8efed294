"""Small models: LeNet-5, the DeepOBS convolutional network ("3c3d"), perceptrons, and softmax regression.

The SAMIS experiments use mlp; the Memory-Perturbation Equation experiments use the others.

Sources: LeCun et al. 1998, "Gradient-based learning applied to document recognition"; Schneider et al. 2019,
"DeepOBS: a deep learning optimizer benchmark suite"; Glorot and Bengio 2010, "Understanding the difficulty of
training deep feedforward neural networks".
"""

from collections.abc import Callable, Sequence

from torch import nn

from src.models.base import Network, center_pad, same_conv, same_max_pool


def lenet(num_classes: int, in_channels: int, image_size: int) -> Network:
    """LeNet-5 with PyTorch's default initialization; feature maps of 28, 14, 10, 5, and 1 pixels.

    Images smaller than 28 pixels are zero-padded to 28. For 32 pixels, the first convolution has no padding. For any
    other size, the activations of the third convolution are averaged over positions. The number of channels changes
    only the first layer.
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
        nn.AdaptiveAvgPool2d(1),  # no effect for 28 and 32 pixels
        nn.Flatten(),
        nn.Linear(120, 84),
        nn.Tanh(),
    )
    return Network(body, nn.Linear(84, num_classes))


def cnn_deepobs(num_classes: int, in_channels: int, image_size: int) -> Network:
    """Convolutions with 64, 96, and 128 channels, linear layers with 512 and 256 units, and the head.

    Feature maps have 28, 14, 12, 6, and 3 pixels. ReLU follows every layer except the last, and 3x3 max-pooling with
    stride 2 follows every convolution. Images of 25 to 32 pixels give 3x3 maps. Smaller images are zero-padded to 25
    pixels, and the maps of larger images are averaged to 3x3, so the number of parameters does not depend on the
    image size. The number of channels changes only the first layer.
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
        nn.AdaptiveAvgPool2d(3),  # no effect up to 32 pixels
        nn.Flatten(),
        nn.Linear(128 * 3 * 3, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
    )
    network = Network(body, nn.Linear(256, num_classes))
    for module in network.modules():  # Xavier normal and Xavier uniform weights, zero biases
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return network


def build_perceptron(
    num_inputs: int, widths: Sequence[int], num_classes: int, activation: Callable[[], nn.Module]
) -> Network:
    """Flatten, then a linear layer and an activation per width, then the head; PyTorch's default initialization."""
    body = nn.Sequential(nn.Flatten())
    for width in widths:
        body.append(nn.Linear(num_inputs, width))
        body.append(activation())
        num_inputs = width
    return Network(body, nn.Linear(num_inputs, num_classes))


def logistic(num_classes: int, in_channels: int, image_size: int) -> Network:
    """Softmax regression: one linear layer."""
    return build_perceptron(in_channels * image_size**2, (), num_classes, nn.Tanh)


def mlp(num_classes: int, in_channels: int, image_size: int) -> Network:
    """Perceptron with two hidden layers of 128 units and ReLU."""
    return build_perceptron(in_channels * image_size**2, (128, 128), num_classes, nn.ReLU)


def small_mlp(num_classes: int, in_channels: int, image_size: int) -> Network:
    """Perceptron with hidden layers of 32 and 16 units and tanh."""
    return build_perceptron(in_channels * image_size**2, (32, 16), num_classes, nn.Tanh)


def large_mlp(num_classes: int, in_channels: int, image_size: int) -> Network:
    """Perceptron with hidden layers of 500 and 300 units and tanh."""
    return build_perceptron(in_channels * image_size**2, (500, 300), num_classes, nn.Tanh)
