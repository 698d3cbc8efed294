"""Tiny models, one per way of using parameters, and the per-example reference loop."""

import torch
import torch.nn.functional as F
from torch import nn


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 7), nn.Tanh(), nn.Linear(7, 3))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 6, (3, 2), padding=(2, 1), dilation=(2, 1), groups=2, bias=False),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, padding="same", dilation=(1, 2), groups=6),
        nn.Tanh(),
        nn.Conv2d(6, 4, (1, 2), padding="same"),
        nn.Conv2d(4, 4, 2, padding="valid", stride=(1, 2)),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d((2, 1)),
        nn.Conv2d(4, 5, (2, 1)),  # one position
        nn.Flatten(),
        nn.Linear(5, 3),
    )


def padded(mode):
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode=mode),
        nn.Tanh(),
        nn.Conv2d(3, 2, 4, padding="same", padding_mode=mode),
        nn.Flatten(),
        nn.Linear(2 * 8 * 6, 3),
    )


def batchnorm():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(2),
        nn.BatchNorm1d(4),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 5),
        nn.BatchNorm1d(5, affine=True),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


def layernorm():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.LayerNorm([3, 4, 4]), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3))


class Tokens(nn.Module):
    """Image rows as tokens with learned positions, an encoder layer, and mean pooling."""

    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(12, 8)
        self.position = nn.Parameter(torch.randn(6, 8) / 4)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 10, batch_first=batch_first)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        tokens = x.transpose(1, 2).flatten(2)  # (b, 6, 12)
        tokens = self.embed(tokens) + self.position
        if self.batch_first:
            return self.head(self.encoder(tokens).mean(1))
        return self.head(self.encoder(tokens.transpose(0, 1)).mean(0))


class Attention(nn.Module):
    """Self-attention and a linear head."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        tokens = x.transpose(1, 2).flatten(2)
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


class Twice(nn.Module):
    """One linear layer and one convolution, each called twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.enter = nn.Linear(72, 6)
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.conv(torch.tanh(self.conv(x)))
        x = torch.tanh(self.enter(x.flatten(1)))
        return self.head(self.shared(torch.tanh(self.shared(x))))


class Tied(nn.Module):
    """Two linear modules share a weight and have separate biases."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(72, 6)
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.enter(x.flatten(1)))
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


class Autoencoding(nn.Module):
    """A weight used by its module, and once more, transposed, without the hooks."""

    def __init__(self):
        super().__init__()
        self.code = nn.Linear(72, 5)
        self.head = nn.Linear(72, 3)

    def forward(self, x):
        code = torch.tanh(self.code(x.flatten(1)))
        return self.head(torch.tanh(F.linear(code, self.code.weight.T)))


class Embedded(nn.Module):
    """An embedding whose table is also the weight of a linear module."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.out = nn.Linear(4, 9, bias=False)
        self.out.weight = self.table.weight
        self.head = nn.Linear(9, 3)

    def forward(self, x):
        words = (x.flatten(1)[:, :5] * 3).long().abs() % 9
        return self.head(torch.tanh(self.out(self.table(words))).mean(1))


class InPlace(nn.Module):
    """In-place operations on a convolution's output, on a view of a linear output, and on the images."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.first = nn.Linear(4, 4)
        self.head = nn.Linear(48, 3)

    def forward(self, x):
        x = self.conv(x.mul_(1.5)).mul_(2.0).relu_()
        x = self.first(x)  # (b, 3, 4, 4): a view of a matrix product
        x[:, 0].tanh_()
        return self.head(x.flatten(1))


class Custom(nn.Module):
    """Custom parameters in addition to known modules, and one unused parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(2, 1, 1) + 0.5)
        self.unused = nn.Parameter(torch.ones(3))
        self.conv = nn.Conv2d(2, 3, 3)
        self.transposed = nn.ConvTranspose2d(3, 2, 2)
        self.norm = nn.GroupNorm(1, 2)
        self.head = nn.Linear(2 * 5 * 5, 3)

    def forward(self, x):
        x = self.norm(self.transposed(torch.tanh(self.conv(x * self.scale))))
        return self.head(x.flatten(1))


class Branching(nn.Module):
    """Data-dependent control flow, which `vmap` does not support."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(72, 3)

    def forward(self, x):
        rows = [row * self.gain if row.sum().item() > 0 else row * self.gain**2 for row in x]
        return self.head(torch.stack(rows).flatten(1))


class Bare(nn.Module):
    """Only a bare parameter: no module to capture."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(72, 3) / 8)

    def forward(self, x):
        return x.flatten(1) @ self.weight


class Shifted(nn.Module):
    """A parameter added to the outputs: its gradients are the same for all examples."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(72, 3)
        self.shift = nn.Parameter(torch.randn(3))
        self.gain = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return self.head(x.flatten(1)) + self.shift + self.gain.square()


class Folded(nn.Module):
    """A linear module with inputs (positions, batch, features), and one with both axes merged."""

    def __init__(self):
        super().__init__()
        self.across = nn.Linear(12, 5)
        self.merged = nn.Linear(5, 4)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        tokens = torch.tanh(self.across(x.permute(2, 0, 1, 3).flatten(2)))  # (6, b, 5)
        merged = self.merged(tokens.transpose(0, 1).flatten(0, 1))  # (b*6, 4)
        return self.head(torch.tanh(merged.view(len(x), -1)))


def weight_normed():
    net = mlp()
    net[1] = nn.utils.parametrizations.weight_norm(net[1])
    return net


class Padding(nn.Conv2d):
    """A convolution that does more than its base class."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 0, 2, 1)))


def subclassed():
    return nn.Sequential(Padding(2, 3, 3), nn.Flatten(), nn.Linear(3 * 7 * 5, 3))


NETWORKS = {
    "mlp": mlp,
    "convolutions": convolutions,
    "reflect": lambda: padded("reflect"),
    "circular": lambda: padded("circular"),
    "replicate": lambda: padded("replicate"),
    "batchnorm": batchnorm,
    "layernorm": layernorm,
    "encoder": lambda: Tokens(batch_first=True),
    "encoder, tokens first": lambda: Tokens(batch_first=False),
    "attention": Attention,
    "twice": Twice,
    "tied": Tied,
    "autoencoding": Autoencoding,
    "embedded": Embedded,
    "in place": InPlace,
    "custom": Custom,
    "branching": Branching,
    "folded": Folded,
    "bare": Bare,
    "shifted": Shifted,
    "weight norm": weight_normed,
    "subclass": subclassed,
}


def network(name, seed=0):
    """The named model in float64 and eval mode, with BatchNorm statistics that differ from 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = NETWORKS[name]().double()
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                nn.init.normal_(module.weight)
    return net.eval()


def images_and_labels(count=6, seed=1, classes=3):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 2, 6, 6, generator=draw, dtype=torch.float64)
    return images, torch.randint(classes, (count,), generator=draw)


def losses(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="none")


def logits(outputs, labels):
    return outputs.T


def loop_gradients(net, images, labels, quantities):
    """Gradients of all trainable parameters per example and quantity: list (b) of list (q) of dict."""
    names, parameters = zip(*((n, p) for n, p in net.named_parameters() if p.requires_grad), strict=True)
    found = []
    for image, label in zip(images.clone().split(1), labels.split(1), strict=True):
        rows = quantities(net(image), label).reshape(-1)
        per_row = []
        for row in rows:
            gradients = torch.autograd.grad(row, parameters, retain_graph=True, allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
            per_row.append(dict(zip(names, filled, strict=True)))
        found.append(per_row)
    return found


def loop_norms(net, images, labels, quantities, weightings):
    """The squared norms (f, q, b), computed with the plain loop."""
    parameters = dict(net.named_parameters())
    norms = []
    for weighting in weightings:
        weights = {n: 1.0 if weighting is None else weighting(n, p.detach()) for n, p in parameters.items()}
        norms.append(
            [
                [sum((weights[n] * g.square()).sum() for n, g in row.items()) for row in example]
                for example in loop_gradients(net, images, labels, quantities)
            ]
        )
    return torch.tensor(norms, dtype=torch.float64).mT
