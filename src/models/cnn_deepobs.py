"""The convolutional network of DeepOBS ("3c3d"), as in the Memory-Perturbation Equation's experiments.

Source: Schneider et al. 2019, "DeepOBS: a deep learning optimizer benchmark suite".
"""

from torch import nn

from src.models.network import Network, centre_pad
from src.models.same_padding import same_conv, same_max_pool

# The smallest images whose last maps are 3x3, as those of 32x32 images are.
SMALLEST_WHOLE = 25


def cnn_deepobs(num_classes: int, in_channels: int, image_size: int) -> Network:
    """Convolutions of 64, 96 and 128 channels, linear layers of 512 and 256; maps of 28, 14, 12, 6 and 3 pixels.

    ReLU after every layer but the last, and a maximum over 3x3 windows of stride 2 after every convolution. Images
    of 25 to 32 pixels end in 3x3 maps by themselves. Smaller ones are padded with zeros to 25, and the maps of
    larger ones are averaged to 3x3, so the parameters are the same in number at every size. Other channel counts
    widen the first layer only.
    """
    body = nn.Sequential(
        centre_pad(image_size, SMALLEST_WHOLE),
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
    return _xavier(Network(body, nn.Linear(256, num_classes)))


def _xavier(network: Network) -> Network:
    """Draw anew, in order: convolutions from Xavier's normal, linear layers from Xavier's uniform; biases are 0.

    Source: Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks".
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        else:
            continue
        nn.init.zeros_(module.bias)
    return network
