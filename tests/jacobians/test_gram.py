"""Gram matrices of Jacobians compared with ``J J^T``; both forms of each layer, blocks, bands, refusals."""

import pytest
import torch
from full_jacobians import full_jacobians, loop_jacobians
from jacobian_networks import NETWORKS, images_and_labels, logits, network
from torch import nn

from src.jacobians import gram, gram_matrix
from src.models import build_model

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def explicit(jacobians):
    psi = torch.cat([j.reshape(j.shape[0] * j.shape[1], -1) for j in jacobians.values()], dim=1)
    return psi @ psi.T


def plan_of(net, images, memory_mb):
    return gram.make_plan(net, images, logits, torch.zeros(len(images)), memory_mb)


def keep_all_as(form, monkeypatch):
    """Make every layer that supports both forms use rows, or factors."""
    monkeypatch.setattr(gram, "prefers_factors", lambda shape, *_: form == "factors" and shape.factors is not None)


def images_like(count, *shape):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_explicit_product(name, monkeypatch):
    net = network(name)
    images, _ = images_and_labels()
    expected = explicit(loop_jacobians(net, images))
    for form in ("cheaper", "rows", "factors"):
        if form != "cheaper":
            keep_all_as(form, monkeypatch)
        for memory_mb, count in ((2048.0, 6), (0.02, 6), (1e-6, 3)):  # all at once; several bands; two by two (slow)
            found = gram_matrix(net, images[:count].clone(), logits, memory_mb=memory_mb)
            assert found.dtype == torch.float64
            some = expected[: len(found), : len(found)]
            torch.testing.assert_close(found, some, **EXACT, msg=lambda text, form=form: f"{form}: {text}")
            assert len(found) == len(expected) * count // 6
            assert (found == found.T).all()


@pytest.mark.parametrize(
    ("name", "classes", "channels", "size"),
    [
        ("mlp", 4, 1, 8),
        ("lenet", 3, 1, 28),
        ("resnet8", 3, 3, 8),
        ("resnet20_frn", 2, 3, 8),
        ("mobile_small", 2, 3, 32),
    ],
)
def test_the_projects_networks(name, classes, channels, size, monkeypatch):
    net = build_model(name, classes, channels, size, seed=0).double()
    images = images_like(3, channels, size, size)
    expected = explicit(full_jacobians(net.eval(), images))
    net.train()
    for form in ("rows", "factors"):
        with monkeypatch.context() as patch:
            keep_all_as(form, patch)
            found = gram_matrix(net, images, logits, memory_mb=8.0)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
    assert net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_a_small_vision_transformer():
    from torchvision.models import VisionTransformer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = VisionTransformer(
            image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=3
        )
    net = net.double().eval()
    with torch.no_grad():
        for p in net.parameters():  # torchvision's head is initialized to zero
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype) / 10)
    images = images_like(5, 3, 8, 8)
    torch.testing.assert_close(gram_matrix(net, images, logits), explicit(full_jacobians(net, images)), **EXACT)


def test_plans_keep_to_the_memory():
    net = build_model("resnet8", 10, 3, 32, seed=0)
    images = torch.zeros(20, 3, 32, 32)
    roomy, tight = plan_of(net, images, 2048.0), plan_of(net, images, 4.0)
    assert len(roomy.bands) == 1
    assert len(tight.bands) > 3
    for plan in (roomy, tight):
        assert sorted(name for band in plan.bands for name in band.names) == sorted(dict(net.named_parameters()))
        for band in plan.bands:
            shapes = [plan.shapes[name] for name in band.names]
            numbers = sum(s.kept(10, s.key in plan.factors) for s in shapes)
            if band.blocks == 1:
                assert numbers * len(images) <= plan.limit
            elif band.blocks < len(images):
                assert numbers * -(-len(images) // band.blocks) * 2 <= plan.limit


def test_layers_are_kept_in_the_cheaper_form():
    """resnet18 with 100 classes: few positions make factors cheap, few channels make rows cheap."""
    with torch.device("meta"):
        shapes = {
            "early": gram.Shape("early", 64 * 576, (64, 576, 1024, 65536)),
            "late": gram.Shape("late", 512 * 4608, (512, 4608, 16, 8192)),
            "head": gram.Shape("head", 100 * 512, (100, 512, 1, 512)),
        }
    for n in (4, 50):
        chosen = {key for key, shape in shapes.items() if gram.prefers_factors(shape, 100, n, 0.0)}
        assert chosen == {"late", "head"}


class Gated(nn.Module):
    """A layer that runs only on some examples, so that a trial on others does not cover it."""

    def __init__(self):
        super().__init__()
        self.gated = nn.Linear(8, 5)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        open_gate = (x[:, :1] > 0).to(x)
        return self.head(x) + open_gate * self.gated(x).cumsum(1)[:, :2]


@pytest.mark.parametrize("memory_mb", [2048.0, 1e-6])
def test_a_layer_that_the_trial_did_not_settle(memory_mb):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Gated().double()
    images = images_like(7, 8)
    images[:, 0] = torch.tensor([-1, -1, -1, 1, -1, 1, 1])
    expected = explicit(loop_jacobians(net, images))
    torch.testing.assert_close(gram_matrix(net, images, logits, memory_mb=memory_mb), expected, **EXACT)


def test_frozen_and_unused_parameters_do_not_count():
    net = network("twice")
    net.spare = nn.Linear(3, 3).double()
    net.enter.bias.requires_grad_(False)
    images, _ = images_and_labels()
    expected = explicit({k: j for k, j in full_jacobians(net, images).items() if not k.startswith("spare")})
    for memory_mb in (2048.0, 1e-6):
        torch.testing.assert_close(gram_matrix(net, images, logits, memory_mb=memory_mb), expected, **EXACT)
    assert not net.enter.bias.requires_grad
    assert net.spare.weight.requires_grad


def test_other_quantities():
    """Kernels of the loss, of one logit and of the sum of logits are blocks or sums of the kernel of all logits."""
    net = network("convolutions")
    images, labels = images_and_labels()
    n, q = len(images), 3
    whole = gram_matrix(net, images, logits).view(n, q, n, q)
    summed = gram_matrix(net, images, lambda outputs, _: outputs.sum(1))
    torch.testing.assert_close(summed, whole.sum((1, 3)), **EXACT)
    own = gram_matrix(net, images, lambda outputs, y: outputs.gather(1, y[:, None])[:, 0], labels)
    at = torch.arange(n)
    torch.testing.assert_close(own, whole[at, labels][:, at, labels], **EXACT)


def test_inputs_of_whole_numbers():
    """With token inputs, the matrix has the parameters' dtype, not the inputs'."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    tokens = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 0, 3]])
    expected = explicit(loop_jacobians(net, tokens))
    for memory_mb in (2048.0, 1e-6):
        torch.testing.assert_close(gram_matrix(net, tokens, logits, memory_mb=memory_mb), expected, **EXACT)


def test_permuting_examples_permutes_the_matrix():
    net = network("batchnorm")
    images, _ = images_and_labels()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    found = gram_matrix(net, images, logits).view(6, 3, 6, 3)
    torch.testing.assert_close(gram_matrix(net, images[order], logits).view(6, 3, 6, 3), found[order][:, :, order])


def test_what_is_refused():
    net = network("mlp")
    images, _ = images_and_labels()
    with pytest.raises(ValueError, match="no examples"):
        gram_matrix(net, images[:0], logits)
    for p in net.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="but the model has none"):
        gram_matrix(net, images, logits)
