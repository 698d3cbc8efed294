"""Code shared by all models: the interface, evaluation mode, loading of stored tensors, layers, and initialization.

Stored tensors: ``copy_`` and ``load_state_dict`` silently broadcast, cast integers, and drop imaginary parts.
Therefore, a tensor read from a file must have the shape and the kind of dtype of the tensor that it replaces.

SAME padding follows TensorFlow, for models whose published results use it. Along an axis with ``size`` positions, the
output has ``ceil(size / stride)`` positions. If the windows extend beyond the axis by p positions, p // 2 zeros are
added before the axis and the rest after it. PyTorch pads both sides equally, so it cannot express an odd p.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# At this image size and above, vgg19 and inception are torchvision's ImageNet models.
IMAGENET_SIZE = 224


class Network(nn.Module):
    """A model with a body that embeds images and a final linear layer that classifies them.

    Because ``head`` is the last layer and ``features`` returns its input, the gradient of a loss with respect to the
    last layer needs no hooks: for embedding ``h`` and error ``e``, it is ``[e (x) h, e]``.

    No operation in a body is in-place, and no module is called twice in one forward pass. Hooks can therefore keep
    the output of any module.

    Attributes:
        body: Maps images ``(n, c, h, w)`` to embeddings ``(n, d)``.
        head: ``nn.Linear(d, num_classes)``.
    """

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images.

        Args:
            images: ``(n, c, h, w)``.

        Returns:
            The inputs of ``head``, ``(n, d)``.
        """
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the logits ``(n, num_classes)`` of images ``(n, c, h, w)``."""
        return self.head(self.features(images))


def two_images(channels: int, size: int) -> torch.Tensor:
    """Two different images ``(2, channels, size, size)`` with values in [-1, 1], to try a model on."""
    return torch.linspace(-1, 1, 2 * channels * size**2).view(2, channels, size, size)


class FeatureReader:
    """Computes a model's embeddings and logits in one forward pass, for a ``Network`` or any other model.

    The head of another model is the last ``nn.Linear`` whose outputs are the logits, and the embeddings are its
    inputs. This is checked on one batch: ``head(features(x)) == model(x)``.

    Args:
        model: The model.
        images: A batch ``(n, c, h, w)`` for the check, on the model's device and in its dtype.

    Attributes:
        head: The last layer.

    Raises:
        ValueError: The logits are not the outputs of a linear layer.
    """

    def __init__(self, model: nn.Module, images: torch.Tensor) -> None:
        self._model = model
        if isinstance(model, Network):
            self.head = model.head
            return
        calls: list[tuple[nn.Linear, torch.Tensor]] = []
        hooks = [
            module.register_forward_hook(lambda linear, inputs, _: calls.extend((linear, h) for h in inputs))
            for module in model.modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            with eval_mode(model), torch.no_grad():
                logits = model(images)
                heads = [
                    linear
                    for linear, h in calls
                    if h.ndim == 2 and torch.equal(F.linear(h, linear.weight, linear.bias), logits)
                ]
        finally:
            for hook in hooks:
                hook.remove()
        if not heads or sum(linear is heads[-1] for linear, _ in calls) > 1:
            raise ValueError("its logits are not the outputs of a linear layer (nn.Linear) that is called once")
        self.head = heads[-1]

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the embeddings ``(n, d)`` and logits ``(n, num_classes)`` of images ``(n, c, h, w)``."""
        if isinstance(self._model, Network):
            h = self._model.features(images)
            return h, self.head(h)
        found: list[torch.Tensor] = []
        hook = self.head.register_forward_hook(lambda linear, inputs, _: found.append(inputs[0]))
        try:
            logits = self._model(images)
        finally:
            hook.remove()
        return found[0], logits


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode and restore each module's mode on exit.

    Args:
        model: The model. Modules that are already in evaluation mode (frozen BatchNorm) stay in it on exit.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def trains_on_one(model: nn.Module, image_shape: tuple[int, int, int]) -> bool:
    """Whether a model can be trained on a single image, which BatchNorm on 1x1 feature maps cannot.

    Buffers, modes, and random states are unchanged.

    Args:
        model: The model.
        image_shape: (c, h, w).
    """
    first = next(model.parameters())
    probe = torch.zeros(1, *image_shape, dtype=first.dtype, device=first.device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with eval_mode(model), torch.no_grad(), torch.random.fork_rng():
            model.train()(probe)
    except ValueError:
        return False
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return True


def check_tensor(name: str, own: torch.Tensor, stored: Any) -> None:
    """Check that a stored value can replace a tensor. Precision may differ.

    Raises:
        ValueError: The value is not a dense tensor, or its shape or kind of dtype (real, complex, integer) differs.
    """
    if not isinstance(stored, torch.Tensor) or stored.layout != torch.strided or stored.is_meta:
        raise ValueError(f"{name} is not a dense tensor")
    if stored.shape != own.shape:
        raise ValueError(f"{name} has shape {tuple(stored.shape)}, not {tuple(own.shape)}")
    if (stored.is_floating_point(), stored.is_complex()) != (own.is_floating_point(), own.is_complex()):
        raise ValueError(f"{name} has type {stored.dtype}, not {own.dtype}")


def copy_tensor(name: str, own: torch.Tensor, stored: Any) -> None:
    """Copy a stored value into a tensor.

    Raises:
        ValueError: See ``check_tensor``.
    """
    check_tensor(name, own, stored)
    own.copy_(stored)


def load_weights(module: nn.Module, stored: Mapping[str, Any]) -> None:
    """Load a stored state dict into a module.

    Raises:
        ValueError: A stored value cannot replace the module's tensor.
        RuntimeError: A key is missing or unexpected.
    """
    for name, own in module.state_dict().items():
        if name in stored:
            check_tensor(name, own, stored[name])
    module.load_state_dict(stored)


def load_optimizer(optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    """Load a stored state dict of the same structure into an optimizer.

    Raises:
        ValueError: A stored value cannot replace the optimizer's. Other exceptions mean that the structure differs.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _check_optimizer(optimizer.state_dict(), stored, parameters)
    optimizer.load_state_dict(stored)


def _check_optimizer(own: Mapping[str, Any], stored: Mapping[str, Any], parameters: list[torch.Tensor]) -> None:
    if "param_groups" not in own:  # SAM and iBLR wrap the state of another optimizer
        for name, value in own.items():
            if isinstance(value, dict):
                _check_optimizer(value, stored[name], parameters)
            elif type(stored[name]) is not type(value):
                raise ValueError(f"{name} does not have the type of {value}")
        return
    for mine, theirs in zip(own["param_groups"], stored["param_groups"], strict=True):
        for name, value in mine.items():
            other = theirs.get(name, value)  # older versions of torch store fewer settings
            if isinstance(value, torch.Tensor):
                check_tensor(name, value, other)
            elif type(value) in (int, float):  # learning rate and weight decay change during training
                if type(other) not in (int, float):
                    raise ValueError(f"{name} is not a number")
            elif _plain(other) != _plain(value):
                raise ValueError(f"{name} is not {value}")
    for index, values in stored["state"].items():
        for name, value in values.items() if isinstance(values, dict) else ():
            if value is not None:
                check_tensor(name, torch.zeros(()) if name == "step" else parameters[index], value)


def _plain(value: Any) -> Any:
    """Convert a tuple to a list, since some states contain a list in place of a tuple."""
    return list(value) if isinstance(value, tuple) else value


def stem_padding(in_channels: int) -> int:
    """Padding of the first 3x3 convolution: 3 for one channel, which turns 28x28 into 32x32; otherwise 1."""
    return 3 if in_channels == 1 else 1


def center_pad(image_size: int, target: int) -> nn.Module:
    """A layer that zero-pads square images to ``target`` pixels, with any odd row and column at the end."""
    missing = max(target - image_size, 0)
    before, after = missing // 2, missing - missing // 2
    return nn.ZeroPad2d((before, after, before, after)) if missing else nn.Identity()


def make_out_of_place(network: nn.Module) -> nn.Module:
    """Set ``inplace`` to False in every layer that has it, so that no output is overwritten before a hook uses it."""
    for module in network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return network


def kaiming_fan_out_(network: nn.Module) -> nn.Module:
    """Initialize all convolutions with Kaiming normal weights (fan-out, ReLU) and zero biases.

    Source: He et al. 2015, "Delving deep into rectifiers"; torchvision uses it for ResNet.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


class ConvUnit(nn.Module):
    """Convolution without bias, batch normalization, ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        **options: Additional arguments of ``nn.Conv2d``.
    """

    def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **options)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, in_channels, h, w)`` to ``(n, out_channels, h', w')``."""
        return F.relu(self.bn(self.conv(x)))


class Branches(nn.ModuleList):
    """Modules applied to the same input, with their outputs concatenated over channels in order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, c, h, w)`` to the concatenated outputs ``(n, sum of channels, h', w')``."""
        return torch.cat([branch(x) for branch in self], dim=1)


def same(in_channels: int, out_channels: int, height: int, width: int | None = None) -> ConvUnit:
    """A stride-1 unit that preserves the input size; the kernel is square unless ``width`` is given."""
    kernel = (height, height if width is None else width)
    padding = (kernel[0] // 2, kernel[1] // 2)
    return ConvUnit(in_channels, out_channels, kernel_size=kernel, padding=padding)


def halve(in_channels: int, out_channels: int) -> ConvUnit:
    """A 3x3 unit with stride 2 and no padding."""
    return ConvUnit(in_channels, out_channels, kernel_size=3, stride=2)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Number of zeros to add before and after an axis for SAME padding.

    Args:
        size: Number of positions along the axis.
        kernel: Width of the layer's window.
        stride: Step between windows.

    Returns:
        The number of zeros before the first position, and the number after the last.
    """
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class SamePad(nn.Module):
    """SAME zero padding for a layer that has this kernel and stride and no padding itself.

    Args:
        kernel: Height and width of the layer's window.
        stride: The layer's stride.
    """

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pad ``(n, c, h, w)``; the next layer then has ``ceil(h / stride)`` x ``ceil(w / stride)`` outputs."""
        top, bottom = same_padding(x.shape[-2], self.kernel, self.stride)
        left, right = same_padding(x.shape[-1], self.kernel, self.stride)
        return F.pad(x, (left, right, top, bottom))


def same_conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution with bias and SAME padding: one layer if PyTorch's padding can express it, otherwise two."""
    # An odd kernel with stride 1 needs (kernel - 1) / 2 zeros on each side for every size; a 1x1 kernel needs none.
    if kernel % 2 and (stride == 1 or kernel == 1):
        return [nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)]
    return [SamePad(kernel, stride), nn.Conv2d(in_channels, out_channels, kernel, stride)]


def same_max_pool() -> list[nn.Module]:
    """3x3 max-pooling with stride 2 and SAME padding. Padding with zeros is harmless after ReLU."""
    return [SamePad(3, 2), nn.MaxPool2d(3, 2)]


class FilterResponseNorm(nn.Module):
    """Filter response normalization: divide each map by its root mean square, then scale, shift, and threshold it.

    For the map ``x`` of one example and channel: ``max(gamma * x / sqrt(mean(x^2) + eps) + beta, tau)``, with the
    mean over positions. Examples do not interact, so training and evaluation are identical. If both arguments of the
    maximum are equal, each receives half of the gradient.

    Attributes:
        tau: Threshold ``(1, channels, 1, 1)``, initially 0.
        beta: Shift ``(1, channels, 1, 1)``, initially 0.
        gamma: Scale ``(1, channels, 1, 1)``, initially 1.
        eps: 1e-6, not learned.
    """

    eps = 1e-6

    def __init__(self, channels: int) -> None:
        super().__init__()
        shape = (1, channels, 1, 1)
        self.tau = nn.Parameter(torch.zeros(shape))
        self.beta = nn.Parameter(torch.zeros(shape))
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, channels, h, w)`` to the same shape."""
        scale = self.gamma * torch.rsqrt(
            x.square().mean(dim=(-2, -1), keepdim=True) + self.eps
        )  # (n, channels, 1, 1)
        return torch.maximum(x * scale + self.beta, self.tau)
