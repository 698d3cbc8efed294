from dataclasses import replace
from urllib.error import URLError

import pytest
import torch
from scipy.ndimage import zoom
from torch import nn
from torchvision.models import VisionTransformer

from src.errors import FileError
from src.models import MODELS, build_model
from src.models.vit import ViT, load_pretrained, resize_positions

SIZES = {"layers": 2, "heads": 2, "width": 8, "mlp_width": 12}


def reduced(num_classes=10, channels=3, size=32):
    torch.manual_seed(0)
    return ViT(num_classes, channels, size, **SIZES)


def published(num_classes=1000, size=64):
    """A torchvision model with reduced sizes and a nonzero head."""
    torch.manual_seed(1)
    network = VisionTransformer(size, 16, 2, 2, 8, 12, num_classes=num_classes)
    nn.init.normal_(network.heads.head.weight)
    nn.init.normal_(network.heads.head.bias)
    return network


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(published().state_dict(), path)
    return path


def test_logits_are_torchvisions(fill, images):
    network, x = fill(reduced()), images(3, 32)
    reference = published(10, 32).to(torch.float64).eval()
    reference.load_state_dict(
        {k.removeprefix("body."): v for k, v in network.state_dict().items() if k.startswith("body.")}
        | {f"heads.head.{k}": v for k, v in network.head.state_dict().items()}
    )
    torch.testing.assert_close(network(x), reference(x))


def test_dropout_stands_where_published():
    encoder = reduced().body.encoder
    found = {name: module.p for name, module in encoder.named_modules() if isinstance(module, nn.Dropout)}
    blocks = [f"layers.encoder_layer_{k}" for k in range(2)]
    assert found == {f"{block}.{place}": 0.1 for block in blocks for place in ("dropout", "mlp.4")}
    assert [module.dropout for module in encoder.modules() if isinstance(module, nn.MultiheadAttention)] == [0.1] * 2


def test_small_images_are_padded_around(fill, images):
    small, large = fill(reduced(size=9)), fill(reduced(size=16))
    x = images(3, 9)
    padded = torch.zeros(2, 3, 16, 16, dtype=x.dtype)
    padded[:, :, 3:12, 3:12] = x
    torch.testing.assert_close(small(x), large(padded))


def test_only_whole_patches_are_seen(fill, images):
    network, x = fill(reduced(size=28)), images(3, 28)
    changed = x.clone()
    changed[:, :, 16:] = changed[:, :, :, 16:] = 9
    assert network.body.seq_length == 2
    torch.testing.assert_close(network(x), network(changed))
    changed[:, :, 15, 15] = 9
    assert not torch.allclose(network(x), network(changed))


@pytest.mark.parametrize(("old", "new"), [(2, 3), (4, 2), (14, 4), (24, 2), (3, 7)])
def test_positions_are_resized_as_scipy_does(old, new, spread):
    positions = spread(1, 1 + old**2, 5)
    resized = resize_positions(positions, 1 + new**2)
    grid = positions[0, 1:].reshape(old, old, 5).numpy()
    expected = torch.from_numpy(zoom(grid, (new / old, new / old, 1), order=1)).reshape(1, -1, 5)
    torch.testing.assert_close(resized[:, 1:], expected)
    assert torch.equal(resized[:, :1], positions[:, :1])


def test_pretrained_file_fills_the_body_and_zeroes_the_head(weights):
    network, source = reduced(), published().state_dict()
    load_pretrained(network, weights)
    own = network.body.state_dict()
    for name, tensor in own.items():
        if name != "encoder.pos_embedding":
            assert torch.equal(tensor, source[name]), name
    expected = resize_positions(source["encoder.pos_embedding"], 5)
    assert torch.equal(own["encoder.pos_embedding"], expected)
    assert not network.head.weight.any()
    assert not network.head.bias.any()


def test_pretrained_patches_are_for_three_channels(weights):
    network = reduced(channels=1)
    fresh = network.body.conv_proj.weight.clone()
    load_pretrained(network, weights)
    assert torch.equal(network.body.conv_proj.weight, fresh)


def test_pretrained_head_is_for_1000_classes(weights):
    network = reduced(num_classes=1000)
    load_pretrained(network, weights)
    assert torch.equal(network.head.weight, published().heads.head.weight)
    assert torch.equal(network.head.bias, published().heads.head.bias)


def test_builder_loads_a_file_and_leaves_the_generator_alone(weights, monkeypatch):
    entry = replace(MODELS["vit"], build=lambda *sizes: ViT(*sizes, **SIZES))
    monkeypatch.setitem(MODELS, "vit", entry)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    network = build_model("vit", 10, 3, 32, seed=1, pretrained=str(weights))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(network.body.conv_proj.weight, published().conv_proj.weight)
    plain = build_model("vit", 10, 3, 32, seed=1)
    assert plain.head.weight.any()


class Unreachable:
    def get_state_dict(self, **_):
        raise URLError("no route to host")


class Served:
    def get_state_dict(self, **_):
        return published().state_dict()


def test_download_is_used_on_request_alone(monkeypatch):
    weights = type("Weights", (), {"IMAGENET1K_V1": Served()})
    monkeypatch.setattr("torchvision.models.ViT_B_16_Weights", weights)
    network = reduced()
    load_pretrained(network, True)
    assert torch.equal(network.body.conv_proj.weight, published().conv_proj.weight)


def test_failed_download_is_one_line(monkeypatch):
    weights = type("Weights", (), {"IMAGENET1K_V1": Unreachable()})
    monkeypatch.setattr("torchvision.models.ViT_B_16_Weights", weights)
    with pytest.raises(FileError, match=r"^torchvision.*no route to host.*local state dict[^\n]*$"):
        load_pretrained(reduced(), True)


@pytest.mark.parametrize(
    "state",
    [
        {"weight": torch.zeros(2)},
        {**published().state_dict(), "encoder.ln.weight": torch.zeros(3)},
        {**published().state_dict(), "encoder.pos_embedding": torch.zeros(1, 4, 8)},
        {**published().state_dict(), "encoder.pos_embedding": 3},
        {**published().state_dict(), "encoder.pos_embedding": torch.tensor(3.0)},
        {**published().state_dict(), "encoder.pos_embedding": torch.zeros(8)},
        {**published().state_dict(), "encoder.pos_embedding": torch.zeros(5, 8)},
        {**published().state_dict(), "encoder.pos_embedding": torch.zeros(1, 1, 8)},
        {**published().state_dict(), "encoder.pos_embedding": torch.zeros(1, 10, 8, dtype=torch.int64)},
        {**published().state_dict(), "encoder.ln.weight": torch.zeros(8, dtype=torch.complex64)},
        {**published().state_dict(), "encoder.ln.weight": "text"},
        {**published().state_dict(), 5: torch.zeros(8)},
        {k: v for k, v in published().state_dict().items() if "mlp.0" not in k},
    ],
    ids=[
        *("foreign", "shape", "grid", "number", "no axis", "one axis", "two axes", "no grid", "whole grid"),
        *("complex", "text", "key", "missing"),
    ],
)
def test_weights_of_another_network_are_refused_in_one_line(state, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(state, path)
    with pytest.raises(FileError, match=r"[^\n]*other\.pth[^\n]*vit_b_16[^\n]*$"):
        load_pretrained(reduced(), path)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileError, match=r"absent\.pth"):
        load_pretrained(reduced(), tmp_path / "absent.pth")


def test_missing_head_is_refused_for_1000_classes(tmp_path):
    path = tmp_path / "headless.pth"
    torch.save({k: v for k, v in published().state_dict().items() if not k.startswith("heads")}, path)
    load_pretrained(reduced(), path)
    with pytest.raises(FileError, match=r"headless\.pth"):
        load_pretrained(reduced(num_classes=1000), path)
