"""Per-example squared gradient norms compared with the per-example loop; invariants; refusals."""

import pytest
import torch
from jacobian_networks import NETWORKS, images_and_labels, logits, loop_norms, losses, network
from torch import nn

from src.jacobians import SquaredNorms
from src.jacobians.capture import trainable
from src.jacobians.layer_rules import LAYER_RULES, outer_gradients, outer_squares, prefers_pairs

EXACT = {"rtol": 1e-10, "atol": 1e-13}


def square(name, w):
    return w.square()


def odd(name, w):
    """Weights that depend on the name and on each entry's index."""
    return (torch.arange(w.numel(), dtype=w.dtype).view_as(w) + len(name)).cos()


FAMILIES = (square, None, odd)


def norms(net, images, labels, quantities=losses, weightings=FAMILIES, memory_mb=256.0):
    with SquaredNorms(net, memory_mb) as squared:
        return squared(images.clone(), labels, quantities, weightings)[0], squared.routes


@pytest.mark.parametrize("quantities", [losses, logits])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_per_example_loop(name, quantities):
    net = network(name)
    images, labels = images_and_labels()  # six examples, and six tokens: the batch axis must not be guessed
    expected = loop_norms(net, images, labels, quantities, FAMILIES)
    found, routes = norms(net, images, labels, quantities)
    assert set(routes) == {n for n, _ in net.named_parameters()}
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("name", NETWORKS)
def test_plain_norms_equal_the_loop(name):
    net = network(name)
    images, labels = images_and_labels()
    found, _ = norms(net, images, labels, logits, (None,))
    torch.testing.assert_close(found, loop_norms(net, images, labels, logits, (None,)), **EXACT)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("memory_mb", [1e-6, 0.004])
def test_little_memory_changes_nothing(name, memory_mb):
    net = network(name)
    images, labels = images_and_labels()
    torch.testing.assert_close(
        norms(net, images, labels, memory_mb=memory_mb)[0], norms(net, images, labels)[0], **EXACT
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_permuting_and_rebatching_examples(name):
    net = network(name)
    images, labels = images_and_labels(7)
    whole = norms(net, images, labels)[0]
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    torch.testing.assert_close(norms(net, images[order], labels[order])[0], whole[..., order], **EXACT)
    with SquaredNorms(net) as squared:  # one engine for batches of different sizes, starting with a single example
        parts = [
            squared(x.clone(), y, losses, FAMILIES)[0]
            for x, y in zip(images.split([1, 6]), labels.split([1, 6]), strict=True)
        ]
    torch.testing.assert_close(torch.cat(parts, -1), whole, **EXACT)


@pytest.mark.parametrize(
    ("name", "route", "parameters"),
    [
        ("mlp", "captured", {"1.weight", "1.bias", "3.weight", "3.bias"}),
        ("batchnorm", "captured", {"0.weight", "1.weight", "1.bias", "4.bias", "7.weight", "9.weight"}),
        ("twice", "summed", {"conv.weight", "conv.bias", "shared.weight", "shared.bias"}),
        ("tied", "summed", {"one.weight"}),
        ("tied", "captured", {"one.bias", "two.bias", "head.weight"}),
        ("autoencoding", "fallback", {"code.weight"}),
        ("autoencoding", "captured", {"code.bias", "head.weight"}),
        ("embedded", "fallback", {"table.weight"}),
        ("in place", "captured", {"conv.weight", "conv.bias", "head.weight"}),
        ("layernorm", "captured", {"1.weight", "1.bias"}),
        ("encoder", "captured", {"embed.weight", "encoder.linear1.weight", "encoder.linear2.bias"}),
        ("encoder", "captured", {"encoder.norm1.weight", "encoder.norm2.bias"}),
        (
            "encoder",
            "fallback",
            {"position", "encoder.self_attn.in_proj_weight", "encoder.self_attn.out_proj.weight"},
        ),
        ("encoder, tokens first", "fallback", {"encoder.linear1.weight", "encoder.linear2.bias"}),
        ("folded", "fallback", {"across.weight", "merged.weight"}),
        ("weight norm", "fallback", {"1.parametrizations.weight.original0", "1.bias"}),
        ("subclass", "fallback", {"0.weight", "0.bias"}),
        ("custom", "fallback", {"scale", "unused", "transposed.weight", "norm.bias"}),
    ],
)
def test_routes(name, route, parameters):
    _, routes = norms(network(name), *images_and_labels())
    assert {p for p in parameters if routes[p] != route} == set()


def test_summed_gradients_are_the_gradient_of_the_sum():
    for name in ("convolutions", "batchnorm", "mlp"):
        net = network(name)
        images, labels = images_and_labels()
        with SquaredNorms(net) as squared:
            capture = squared._capture
            rows = losses(capture.forward(images), labels).unsqueeze(0)
            for record, g in zip(capture.records, capture.backward(rows, capture.records, True), strict=True):
                own = trainable(record.module)
                found = record.rule.gradients(record.module, record.inputs, g, list(own))
                expected = torch.autograd.grad(rows.sum(), list(own.values()), retain_graph=True)
                for local, gradient in zip(own, expected, strict=True):
                    torch.testing.assert_close(found[local].sum((0, 1)), gradient, **EXACT)


@pytest.mark.parametrize("count", [2, 3, 4])  # equal and unequal numbers of examples and quantities
def test_gradients_that_are_the_same_for_all_examples(count, caplog):
    net = network("shifted")
    images, labels = images_and_labels(count)
    found, routes = norms(net, images, labels, logits)
    assert routes["shift"] == routes["gain"] == "fallback"
    torch.testing.assert_close(found, loop_norms(net, images, labels, logits, FAMILIES), **EXACT)
    assert not caplog.records  # nor are they computed one by one


def test_frozen_parameters_do_not_count():
    net = network("batchnorm")
    images, labels = images_and_labels()
    for name in ("0.weight", "1.bias", "6.weight", "9.bias"):
        net.get_parameter(name).requires_grad_(False)
    found, routes = norms(net, images, labels)
    assert "0.weight" not in routes
    assert routes["0.bias"] == "captured"
    torch.testing.assert_close(found, loop_norms(net, images, labels, losses, FAMILIES), **EXACT)
    assert not net[0].weight.requires_grad


def test_a_call_under_no_grad_adds_nothing():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(72, 6), nn.Linear(6, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.body(x.flatten(1)).tanh()
            return self.head(x)

    torch.manual_seed(0)
    net = Frozen().double()
    images, labels = images_and_labels()
    torch.testing.assert_close(
        norms(net, images, labels)[0], loop_norms(net, images, labels, losses, FAMILIES), **EXACT
    )


def test_checkpointed_blocks():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.body, self.head, self.reentrant = nn.Linear(72, 6), nn.Linear(6, 3), reentrant

        def forward(self, x):
            x = torch.utils.checkpoint.checkpoint(self.body, x.flatten(1), use_reentrant=self.reentrant)
            return self.head(x.tanh())

    images, labels = images_and_labels()
    torch.manual_seed(0)
    net = Checkpointed(False).double()
    expected = loop_norms(net, images, labels, losses, FAMILIES)
    torch.testing.assert_close(norms(net, images, labels)[0], expected, **EXACT)


def test_mixing_examples_is_refused():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(72, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.body(x.flatten(1)).tanh()
            return self.head(x - x.mean(0) / 2)

    torch.manual_seed(0)
    net = Mixing().double()
    images, labels = images_and_labels()
    with pytest.raises(ValueError, match="depends on the other images"):
        norms(net, images, labels)


def test_inputs_overwritten_after_the_call_raise():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(72, 72), nn.Linear(72, 3)

        def forward(self, x):
            x = x.flatten(1).tanh()
            y = self.body(x)
            x.mul_(2.0)
            return self.head(x + y)

    images, labels = images_and_labels()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        norms(Overwriting().double(), images, labels)


def test_batch_statistics_are_refused():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten())
    images, labels = images_and_labels()
    with pytest.raises(ValueError, match=r"BatchNorm '1' keeps no running statistics"):
        norms(net.double(), images, labels)
    net = network("batchnorm")
    with SquaredNorms(net) as squared:
        net[4].train()
        with pytest.raises(ValueError, match=r"BatchNorm '4' is in training mode"):
            squared(images, labels, losses)


def test_refuses_a_model_without_trainable_parameters_and_bad_quantities():
    net = network("mlp")
    images, labels = images_and_labels()
    with SquaredNorms(net) as squared:
        with pytest.raises(ValueError, match="quantities must be"):
            squared(images, labels, lambda z, y: losses(z, y).mean().view(1))
        with pytest.raises(ValueError, match="quantities must be"):
            squared(images, labels, lambda z, y: losses(z, y).detach())
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="but the model has none"), SquaredNorms(net):
        pass
    assert not any(m._forward_hooks for m in net.modules())


def test_leaves_the_model_as_it_was():
    net = network("batchnorm").train()
    net[4].eval()
    modes = [m.training for m in net.modules()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    images, labels = images_and_labels()
    norms(net, images, labels)
    with pytest.raises(ZeroDivisionError), SquaredNorms(net):
        raise ZeroDivisionError
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_hooks for m in net.modules())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_works_under_no_grad_and_in_training_mode():
    net = network("convolutions").train()
    images, labels = images_and_labels()
    expected = norms(net, images, labels)[0]
    with torch.no_grad():
        torch.testing.assert_close(norms(net, images, labels)[0], expected, rtol=0, atol=0)


def test_channels_last_and_single_precision():
    net = network("batchnorm")
    images, labels = images_and_labels()
    expected = norms(net, images, labels)[0]
    single = net.float().to(memory_format=torch.channels_last)
    found = norms(single, images.float().contiguous(memory_format=torch.channels_last), labels)[0]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("o", "k", "t"), [(5, 6, 1), (8, 9, 2), (3, 2, 7)])
def test_the_three_forms_agree(o, k, t):
    assert prefers_pairs(8, 9, 2)
    assert not prefers_pairs(3, 2, 7)
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(4, 2, k, t, generator=draw, dtype=torch.float64)
    g = torch.randn(3, 4, 2, o, t, generator=draw, dtype=torch.float64)
    full = torch.einsum("bnkt,qbnot->bnqok", a, g)
    torch.testing.assert_close(outer_gradients(a, g), full, **EXACT)
    weights = torch.randn(2, 2 * o, k, generator=draw, dtype=torch.float64)
    expected = torch.einsum("bnqok,fnok->fqb", full.square(), weights.view(2, 2, o, k))
    torch.testing.assert_close(outer_squares(a, g, weights), expected, **EXACT)
    torch.testing.assert_close(outer_squares(a, g, None)[0], full.square().sum((1, 3, 4)).T, **EXACT)


def test_memory_estimates_cover_the_gradient():
    net = network("convolutions")
    images, labels = images_and_labels()
    with SquaredNorms(net) as squared:
        rows = losses(squared._capture.forward(images), labels).unsqueeze(0)
        for record in squared._capture.records:
            (g,) = squared._capture.backward(rows, [record], keep_graph=True)
            estimate = LAYER_RULES[type(record.module)].bytes_per_example(record.module, record.inputs, g)
            one = g[0, 0].numel() == record.module.weight.shape[0]  # one position needs no outer product
            assert estimate >= (0 if one else 2) * record.module.weight.nbytes


@pytest.mark.parametrize("name", ["resnet8", "lenet", "mlp"])
def test_the_projects_networks_are_captured_whole(name):
    models = pytest.importorskip("src.models")
    net = models.build_model(name, 4, 1, 28, seed=0).double().eval()
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(3, 1, 28, 28, generator=draw, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1])
    found, routes = norms(net, images, labels)
    assert set(routes.values()) == {"captured"}
    torch.testing.assert_close(found, loop_norms(net, images, labels, losses, FAMILIES), rtol=1e-9, atol=1e-12)


def test_a_small_vision_transformer():
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    net = VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=3
    ).double()
    nn.init.normal_(net.heads.head.weight)  # initialized to zero, which would block gradients
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 1, 0])
    found, routes = norms(net, images, labels)  # five examples, five tokens
    assert routes["conv_proj.weight"] == routes["encoder.layers.encoder_layer_0.mlp.0.weight"] == "captured"
    assert routes["encoder.ln.weight"] == "captured"
    assert routes["encoder.pos_embedding"] == "fallback"
    torch.testing.assert_close(found, loop_norms(net.eval(), images, labels, losses, FAMILIES), **EXACT)


def test_a_head_of_zeros_stops_all_gradients_and_stays_right():
    net = network("mlp")
    images, labels = images_and_labels()
    with SquaredNorms(net) as squared:
        nn.init.zeros_(net[3].weight)
        found = squared(images, labels, losses, FAMILIES)[0]
        torch.testing.assert_close(found, loop_norms(net, images, labels, losses, FAMILIES), **EXACT)
        nn.init.normal_(net[3].weight)  # an inconclusive trial is repeated
        squared(images, labels, losses, FAMILIES)
        found = squared(images, labels, losses, FAMILIES)[0]
    assert squared.routes["1.weight"] == "captured"
    torch.testing.assert_close(found, loop_norms(net, images, labels, losses, FAMILIES), **EXACT)
