"""LeNet-5 with tanh and average pooling, as in the Memory-Perturbation Equation's experiments.

Source: LeCun et al. 1998, "Gradient-based learning applied to document recognition".
"""

from torch import nn

from src.models.network import Network, centre_pad

NATIVE_SIZE = 28


def lenet(num_classes: int, in_channels: int, image_size: int) -> Network:
    """LeNet-5 with PyTorch's initial weights; feature maps of 28, 14, 10, 5 and 1 pixels.

    Images under 28 pixels are padded with zeros to 28. At 32 the first convolution has no padding. At any other
    size the third convolution's activations are averaged over positions. Other channel counts widen the first layer
    only.
    """
    body = nn.Sequential(
        centre_pad(image_size, NATIVE_SIZE),
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
