"""Models from the user's files, torchvision and timm: names, weights, embeddings, and what is refused."""

import importlib.util
import random
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from src.errors import ArgumentError, FileError
from src.jacobians import SquaredNorms
from src.models import FeatureReader, ModelConfig, build_model, model_flag, model_name
from src.models.base import two_images
from src.models.external import read_weights

NET = """
import random
import numpy as np
import torch
from torch import nn
from blocks import Block

FROM_THE_IMPORT = float(torch.rand(())) + np.random.rand() + random.random()

class Net(nn.Module):
    def __init__(self, num_classes, in_channels, image_size):
        super().__init__()
        self.block = Block(in_channels, 4)
        self.fc = nn.Linear(4 * image_size**2, num_classes)
        self.decoy = nn.Linear(num_classes, num_classes)
        values = [FROM_THE_IMPORT, *np.random.rand(2), random.random()]  # not only torch draws weights
        self.register_buffer("other", torch.tensor(values, dtype=torch.float32))

    def forward(self, x):
        h = self.block(x).flatten(1)
        logits = self.fc(h) + 0 * (np.random.rand() + random.random())
        self.decoy(logits)
        return logits

class Softened(Net):
    def forward(self, x):
        return super().forward(x).log_softmax(1)
"""
BLOCKS = """
import torch.nn.functional as F
from torch import nn

class Block(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, padding=1)
        self.norm = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return F.relu(self.relu(self.norm(self.conv(x))) + 0.1, inplace=True)
"""
SIZES = (5, 1, 6)  # classes, channels, pixels
needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="needs timm: pip install -r requirements-timm.txt"
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "blocks.py").write_text(BLOCKS)
    return tmp_path


def same(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_name_follows_the_source_and_what_it_imports(folder):
    text = f"{folder}/net.py:Net"
    name = model_name(text)
    assert name.startswith("net-")
    assert model_name(name) == name
    assert model_flag(name) == text
    assert ModelConfig(text).as_dict()["model"] == name
    assert model_name(f"{folder}/net.py:Softened").startswith("softened-")

    old = build_model(text, *SIZES, seed=1).eval()
    (folder / "other.py").write_text("x = 1")
    assert model_name(text) == name
    (folder / "blocks.py").write_text(BLOCKS.replace("0.1", "0.2"))
    changed = model_name(text)
    new = build_model(changed, *SIZES, seed=1).eval()
    assert same(old, new)
    assert not torch.equal(old(two_images(*SIZES[1:])), new(two_images(*SIZES[1:])))
    (folder / "net.py").write_text(NET + "\n")
    newest = model_name(text)
    assert len({name, changed, newest}) == 3
    (folder / "net.py").write_text(NET)
    with pytest.raises(FileError, match=rf"net.py: changed since it was named {newest}"):
        build_model(newest, *SIZES, seed=1)


def test_weights_depend_only_on_the_seed(folder):
    def states():
        return (*np.random.get_state()[1:3], random.getstate()[1], torch.get_rng_state())

    text, before = f"{folder}/net.py:Net", states()
    first, second = (build_model(text, *SIZES, seed=3) for _ in range(2))
    assert same(first, second)
    assert all(np.array_equal(one, two) for one, two in zip(before, states(), strict=True))
    other = build_model(text, *SIZES, seed=4)
    assert first.other[0] == other.other[0]
    assert not (first.other[1:] == other.other[1:]).any()
    (folder / "copy").mkdir()
    for file in ("net.py", "blocks.py"):
        shutil.copy(folder / file, folder / "copy")
    assert same(other, build_model(f"{folder}/copy/net.py:Net", *SIZES, seed=4))  # executed again, for another seed
    assert first.training
    assert float(first.block.norm.running_mean.abs().sum()) == 0.0  # the trial batches left no trace


def test_probabilities_instead_of_logits_are_reported(folder, caplog):
    (folder / "soft.py").write_text(
        "from torch import nn\n\n\ndef net(num_classes, in_channels, image_size):\n"
        "    pixels = in_channels * image_size**2\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, num_classes), nn.Softmax(1))\n"
    )
    build_model(f"{folder}/soft.py:net", *SIZES, seed=1)
    assert "without softmax" in caplog.text
    caplog.clear()
    build_model(f"{folder}/net.py:Net", *SIZES, seed=1)
    assert "softmax" not in caplog.text


@pytest.mark.parametrize("text", ["{}/net.py:Net", "torchvision:resnet18", "lenet"])
def test_features_are_the_inputs_of_the_head(folder, text):
    model = build_model(text.format(folder), *SIZES, seed=1).eval()
    x = two_images(*SIZES[1:])
    read = FeatureReader(model, x)
    h, logits = read(x[:1])
    with torch.no_grad():
        assert torch.equal(logits, model(x[:1]))
        assert torch.equal(F.linear(h, read.head.weight, read.head.bias), logits)
    assert read.head is {
        "torchvision:resnet18": getattr(model, "fc", None),
        "lenet": getattr(model, "head", None),
    }.get(text, getattr(model, "fc", None))
    # d loss / d bias of the head is softmax - onehot: the layer is last in the graph
    F.cross_entropy(read(x[:1])[1], torch.tensor([2])).backward()
    expected = logits.softmax(1)[0] - F.one_hot(torch.tensor(2), 5)
    torch.testing.assert_close(read.head.bias.grad, expected.detach())


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(self.layer(x.flatten(1)[:, :5]))


def test_models_without_a_linear_head_have_no_features(folder):
    x = two_images(*SIZES[1:])
    convolutional = nn.Sequential(nn.Conv2d(1, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for model in (build_model(f"{folder}/net.py:Softened", *SIZES, seed=1), CalledTwice(), convolutional):
        with pytest.raises(ValueError, match="not the outputs of a linear layer"):
            FeatureReader(model, x)


@pytest.mark.parametrize("text", ["{}/net.py:Net", "torchvision:resnet18"])
def test_squared_gradient_norms_are_those_of_autograd(folder, text):
    """In-place activations, and layers that a model calls several times, change nothing."""
    model, labels = build_model(text.format(folder), *SIZES, seed=1).double().eval(), torch.tensor([1, 4])
    x = two_images(*SIZES[1:]).double()

    def losses(outputs, labels):
        return F.cross_entropy(outputs, labels, reduction="none")

    with SquaredNorms(model) as squared_norms:
        found = squared_norms(x, labels, losses)[0][0, 0]
    for i in range(2):
        grads = torch.autograd.grad(
            losses(model(x[i : i + 1]), labels[i : i + 1]).sum(), list(model.parameters()), allow_unused=True
        )
        torch.testing.assert_close(found[i], sum(g.square().sum() for g in grads if g is not None))


BAD = {
    "def Net(num_classes, in_channels, image_size):\n    return 1 / 0": (
        FileError,
        r"net.py, line 2: ZeroDivisionError",
    ),
    "import nowhere_to_be_found": (FileError, r"net.py, line 1: ModuleNotFoundError"),
    "def Net(:": (FileError, r"net.py, line 1: .*syntax"),
    "other = 1": (ArgumentError, r"net.py:Net: the file defines no class or function of this name"),
    "from torch import nn\ndef Net(num_classes, **sizes):\n    return nn.Sequential(nn.Flatten(), "
    "nn.LazyLinear(num_classes))": (FileError, r"net.py:Net: has lazy layers"),
    "def Net(classes): pass": (
        ArgumentError,
        r"must accept the keyword arguments num_classes, in_channels, image_si",
    ),
    "def Net(**sizes): return 3": (FileError, r"net.py:Net: returned an object of type int, not a torch.nn.Module"),
    "from torch import nn\ndef Net(**sizes): return nn.Flatten()": (FileError, r"net.py:Net: has no trainable param"),
    "from torch import nn\ndef Net(**sizes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4))": (
        FileError,
        r"net.py:Net: in evaluation mode, returned a tensor \(2, 4\) .* \(2, 5\)",
    ),
    "from torch import nn\nclass Net(nn.Module):\n    def __init__(self, **sizes):\n        super().__init__()\n"
    "        self.fc = nn.Linear(36, 5)\n    def forward(self, x):\n        y = self.fc(x.flatten(1))\n"
    "        return (y, y) if self.training else y": (
        FileError,
        r"in training mode, returned an object of type tuple",
    ),
    "from torch import nn\nclass Net(nn.Module):\n    def __init__(self, **sizes):\n        super().__init__()\n"
    "        self.fc = nn.Linear(36, 5)\n    def forward(self, x):\n        return self.fc(x)": (
        FileError,
        r"net.py, line 7: RuntimeError: mat1 and mat2",
    ),
    "from torch import nn\nclass Net(nn.Module):\n    def __init__(self, **sizes):\n        super().__init__()\n"
    "        self.fc = nn.Linear(36, 5)\n    def forward(self, x):\n        return self.fc(x.flatten(1)) / 0": (
        FileError,
        r"in evaluation mode, its logits are not finite",
    ),
}


@pytest.mark.parametrize("source", BAD)
def test_bad_files_are_reported_in_one_line(tmp_path, source):
    (tmp_path / "net.py").write_text(source)
    error, message = BAD[source]
    with pytest.raises(error, match=message) as found:
        build_model(f"{tmp_path}/net.py:Net", *SIZES, seed=1)
    assert "\n" not in str(found.value)


def test_unsupported_models_are_reported(tmp_path):
    with pytest.raises(FileError, match=r"nowhere.py: cannot be read"):
        model_name(f"{tmp_path}/nowhere.py:Net")
    with pytest.raises(ArgumentError, match=r"net-01234567: the source is needed; give --model=FILE.py:NAME"):
        build_model("net-01234567", *SIZES, seed=1)
    with pytest.raises(ArgumentError, match=r"torchvision:resnet19: .*did you mean resnet1"):
        build_model("torchvision:resnet19", *SIZES, seed=1)
    with pytest.raises(ArgumentError, match=r"torchvision:alexnet: does not support 6x6x1 images"):
        build_model("torchvision:alexnet", *SIZES, seed=1)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_initial_weights_are_read_from_any_wrapping(folder, key, prefix):
    text = f"{folder}/net.py:Net"
    trained = build_model(text, *SIZES, seed=7)
    weights = {prefix + name: value for name, value in trained.state_dict().items()}
    torch.save(weights if key is None else {key: weights, "epoch": 3}, folder / "weights.pt")
    assert same(build_model(text, *SIZES, seed=1, init=folder / "weights.pt"), trained)
    config = ModelConfig(text, init=str(folder / "weights.pt"))
    assert config.as_dict()["init"] != ModelConfig(text).as_dict().get("init")


def test_initial_weights_that_do_not_fit_are_refused(folder):
    text, file = f"{folder}/net.py:Net", folder / "weights.pt"
    torch.save(build_model(text, 3, 1, 6, seed=7).state_dict(), file)
    with pytest.raises(FileError, match=r"does not fit the model net-\w+ \(fc.weight has shape"):
        build_model(text, *SIZES, seed=1, init=file)
    torch.save(build_model("torchvision:resnet18", 1000, 1, 8, seed=7).state_dict(), file)
    with pytest.raises(FileError, match=r"its head is for 1000 classes \(fc.weight\), but the data set has 5"):
        build_model("torchvision:resnet18", *SIZES, seed=1, init=file)
    with pytest.raises(FileError, match=r"does not fit the model resnet8 \(.* is missing\)"):
        build_model("resnet8", *SIZES, seed=1, init=file)
    torch.save({"weights": [1, 2]}, file)
    with pytest.raises(FileError, match="is not a state dict"):
        read_weights(file)


def test_pretrained_weights_of_torchvision(tmp_path):
    """Head and first convolution keep their random values where sizes differ; all other weights are the file's."""
    file, name = tmp_path / "weights.pt", "torchvision:resnet18"
    stored = build_model(name, 1000, 3, 32, seed=7).state_dict()
    torch.save(stored, file)
    random = build_model(name, *SIZES, seed=1).state_dict()
    loaded = build_model(name, *SIZES, seed=1, pretrained=str(file)).state_dict()
    for key in loaded:
        wanted = random if key in ("conv1.weight", "fc.weight", "fc.bias") else stored
        assert torch.equal(loaded[key], wanted[key])
    with pytest.raises(FileError, match=r"does not fit torchvision:resnet34"):
        build_model("torchvision:resnet34", *SIZES, seed=1, pretrained=str(file))


def test_pretrained_position_embeddings_are_resized(tmp_path, monkeypatch):
    from torchvision.models import VisionTransformer, _api
    from torchvision.models.vision_transformer import interpolate_embeddings

    def build(*, image_size=24, **options):
        return VisionTransformer(image_size, 8, 1, 2, 16, 16, **options)  # patches of 8x8

    build.__module__ = "torchvision.models.vision_transformer"
    monkeypatch.setitem(_api.BUILTIN_MODELS, "vit_tiny", build)
    file, stored = tmp_path / "weights.pt", build(num_classes=1000).state_dict()
    torch.save(stored, file)
    loaded = build_model("torchvision:vit_tiny", 5, 3, 40, seed=1, pretrained=str(file)).state_dict()
    expected = interpolate_embeddings(40, 8, dict(stored), "bilinear")
    for key in loaded.keys() - {"heads.head.weight", "heads.head.bias"}:
        torch.testing.assert_close(loaded[key], expected[key])


def test_no_weights_for_files(folder):
    with pytest.raises(ArgumentError, match="has no pretrained weights; use --init FILE"):
        ModelConfig(f"{folder}/net.py:Net", pretrained=True)


@needs_timm
def test_timm(tmp_path):
    assert model_name("timm:resnet18.a1_in1k") == "timm-resnet18.a1_in1k"
    model = build_model("timm:vit_tiny_patch16_224", 5, 3, 32, seed=1).eval()  # takes an image size
    x = two_images(3, 32)
    assert FeatureReader(model, x).head is model.head
    assert same(model, build_model("timm-vit_tiny_patch16_224", 5, 3, 32, seed=1))
    with pytest.raises(ArgumentError, match=r"timm:vit_tiny_patch16_224: does not support 8x8x1 images"):
        build_model("timm:vit_tiny_patch16_224", 5, 1, 8, seed=1)
    with pytest.raises(ArgumentError, match=r"timm:resnet19: timm .* has no such model; did you mean resnet1"):
        build_model("timm:resnet19", 5, 1, 8, seed=1)

    file = tmp_path / "weights.pt"
    stored = build_model("timm:resnet18", 1000, 3, 32, seed=7).state_dict()
    torch.save(stored, file)
    loaded = build_model("timm:resnet18", 5, 1, 8, seed=1, pretrained=str(file)).state_dict()
    torch.testing.assert_close(loaded["conv1.weight"], stored["conv1.weight"].sum(1, keepdim=True))
    assert all(torch.equal(loaded[key], stored[key]) for key in loaded if key.startswith("layer"))
    with pytest.raises(FileError, match=r"does not fit timm:resnet34 \(layer1.2.* is missing or unexpected\)"):
        build_model("timm:resnet34", 5, 1, 8, seed=1, pretrained=str(file))
