"""Products with Hessians and GGNs are exact and have no side effects."""

import copy
import gc
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F
from curvature_ground import NETWORKS, batch, batches, dense, images_and_labels, network, small_network
from curvlinops import GGNLinearOperator, HessianLinearOperator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from src.curvature.operators import GGN, OPERATORS, Hessian, dot
from src.errors import MeasurementError, UserError
from src.models import build_model

# "in place" changes its images; of "weight norm" torch has no tangents and wrong second derivatives
USED = [name for name in NETWORKS if name not in ("in place", "weight norm")]


def columns(operator):
    return torch.stack([operator @ unit for unit in torch.eye(operator.size, dtype=operator.dtype)])


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", USED)
def test_products_are_those_of_the_dense_matrix(name, kind):
    net, (images, labels) = network(name), images_and_labels()
    operator = OPERATORS[kind](net, batches(images, labels, 4), len(labels))  # batches of 4 and 2
    expected = dense(net, images, labels, kind)
    draw = torch.randn(3, operator.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for vector in draw:
        torch.testing.assert_close(operator @ vector, expected @ vector, rtol=0, atol=1e-12 * vector.norm().item())
    assert operator.products == 3


@pytest.mark.parametrize("kind", OPERATORS)
def test_every_entry_and_every_eigenvalue(kind):
    net, (images, labels) = small_network(), images_and_labels(11)
    operator = OPERATORS[kind](net, batches(images, labels, 4), 11)
    found, expected = columns(operator), dense(net.eval(), images, labels, kind)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.linalg.eigvalsh(found), torch.linalg.eigvalsh(expected), rtol=0, atol=1e-13)
    if kind == "ggn":
        assert torch.linalg.eigvalsh(found).min() > -1e-14


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_ragged_batches_add_up_to_the_whole_set(count, size, seed):
    net, (images, labels) = small_network(seed), images_and_labels(count, seed)
    vector = torch.randn(79 - 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for kind in OPERATORS.values():
        whole = kind(net, [batch(images, labels)], count)
        vector = vector[: whole.size]
        parts = kind(net, [*batches(images, labels, size), batch(images[:0], labels[:0])], count)
        torch.testing.assert_close(parts @ vector, whole @ vector, rtol=0, atol=1e-13)
        (a, g), (b, h) = parts.loss_and_gradient(), whole.loss_and_gradient()
        assert a == pytest.approx(b, rel=1e-13)
        torch.testing.assert_close(g, h, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("kind", "oracle"), [("hessian", HessianLinearOperator), ("ggn", GGNLinearOperator)])
@pytest.mark.parametrize("name", ["mlp", "convolutions", "batchnorm"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_against_curvlinops(name, kind, oracle):
    net, (images, labels) = network(name), images_and_labels(7)
    data = list(zip(images.split(3), labels.split(3), strict=True))
    expected = oracle(net, nn.CrossEntropyLoss(), list(net.parameters()), data)
    operator = OPERATORS[kind](net, batches(images, labels, 3), 7)
    vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(operator @ vector, expected @ vector, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["resnet8", "mobile_small", "lenet", "small_inception", "resnet20_frn", "cnn_deepobs"]
)
def test_the_projects_networks(name):
    """The fast products are used, and agree with double backpropagation; explicit formulas change nothing."""
    net = build_model(name, 4, 3, 8, seed=0).double().eval()
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 3, 1])
    operator = Hessian(net, batches(images, labels, 2), 3)
    vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = operator @ vector
    assert operator._trusted
    operator._trusted = False
    expected = operator @ vector
    assert (found - expected).norm() <= 1e-10 * found.norm()
    plain = torch.autograd.grad(F.cross_entropy(net(images), labels), operator.parameters)
    torch.testing.assert_close(operator.loss_and_gradient()[1], operator.flatten(plain), rtol=1e-10, atol=1e-12)


def test_a_wrong_derivative_is_found_out(caplog):
    """In torch 2.13, layer norm's tangent has a wrong gradient and softmax's has none; both are exact here."""
    caplog.set_level(logging.INFO)
    images, labels = images_and_labels()
    for name, says in (
        ("mlp", ""),
        ("layernorm", "gradient of a tangent is wrong"),
        ("attention", "inplace operation"),
    ):
        caplog.clear()
        operator = Hessian(network(name), batches(images, labels, 4), 6)
        operator @ torch.ones(operator.size, dtype=torch.float64)
        assert says in caplog.text
        assert bool(says) == bool(caplog.text)
    operator = Hessian(network("weight norm"), batches(images, labels, 4), 6)
    with pytest.raises(MeasurementError, match="not symmetric"):
        operator @ torch.ones(operator.size, dtype=torch.float64)


def test_loss_and_gradient():
    net, (images, labels) = small_network(), images_and_labels(9)
    loss, gradient = Hessian(net, batches(images, labels, 4), 9).loss_and_gradient()
    net.eval()
    expected = F.cross_entropy(net(images), labels)
    assert loss == pytest.approx(expected.item(), rel=1e-14)
    parts = torch.autograd.grad(expected, list(net.parameters()))
    torch.testing.assert_close(gradient, torch.cat([p.flatten() for p in parts]), rtol=0, atol=1e-15)


def test_frozen_parameters_are_left_out():
    net, (images, labels) = small_network(), images_and_labels()
    net[0].requires_grad_(False)
    for kind, operator_kind in OPERATORS.items():
        operator = operator_kind(net, batches(images, labels, 4), 6)
        assert operator.size == 18
        torch.testing.assert_close(columns(operator), dense(net.eval(), images, labels, kind), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="no parameter"):
        Hessian(net.requires_grad_(False), [], 1)
    with pytest.raises(ValueError, match="keeps no running statistics"):
        Hessian(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), [], 1)


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(kind, fails):
    net, (images, labels) = small_network(), images_and_labels()
    net.train()
    net[1].eval()  # frozen BatchNorm stays frozen
    net[5].bias.requires_grad_(False)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    if fails:
        net[5].weight.data.fill_(float("nan"))
    before = copy.deepcopy(net.state_dict())
    operator = OPERATORS[kind](net, batches(images, labels, 4), 6)
    try:
        operator.loss_and_gradient()
        operator @ torch.ones(operator.size, dtype=torch.float64)
    except MeasurementError:
        assert fails
    assert [m.training for m in net] == [True, False, True, True, True, True]
    assert [p.requires_grad for p in net.parameters()] == [True] * 5 + [False]
    assert [p.grad is None for p in net.parameters()] == [False] + [True] * 5
    assert (net[0].weight.grad == 1).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["batchnorm", "layernorm"])  # both implementations of products
@pytest.mark.parametrize("kind", OPERATORS)
def test_nothing_is_left_behind_after_50_products(name, kind):
    net, (images, labels) = network(name), images_and_labels()
    operator = OPERATORS[kind](net, batches(images, labels, 4), 6)
    vector = torch.ones(operator.size, dtype=torch.float64)
    alive = lambda: sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())  # noqa: E731
    first = operator @ vector
    gc.collect()
    gc.disable()  # a reference cycle would now leak
    try:
        before = alive()
        for _ in range(50):
            last = operator @ vector
        assert alive() == before + 1
        watched = weakref.ref(last)
        assert torch.equal(first, last), "products are deterministic"
        del last
        assert watched() is None
    finally:
        gc.enable()


def test_what_is_not_finite_is_said():
    net, (images, labels) = small_network(), images_and_labels()
    operator = Hessian(net, batches(images, labels, 4), 6)
    with pytest.raises(MeasurementError, match=r"the product with the hessian is not finite; .*learning_rate"):
        operator @ torch.full((operator.size,), float("inf"), dtype=torch.float64)
    net[0].weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"the loss is not finite; .*learning_rate"):
        operator.loss_and_gradient()


def test_confident_outputs_do_not_round_to_zero():
    """Probabilities of 1 - 1e-9 have a curvature of 1e-9, which would be lost in float32."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[20.0, 0.0], [0.0, 0.0]]))
        net[1].bias.zero_()
    data = [batch(torch.tensor([[[[1.0, 0.5]]]]), torch.tensor([0]))]
    double = [batch(data[0].images.double(), data[0].labels)]
    for kind in (Hessian, GGN):
        single, exact = kind(net, data, 1), kind(copy.deepcopy(net).double(), double, 1)
        vector = torch.tensor([1.0, 2, 3, 4, 5, -6])
        expected = exact @ vector.double()
        assert expected.norm() > 0
        torch.testing.assert_close((single @ vector).double(), expected, rtol=1e-5, atol=0)


def test_inner_products_are_summed_in_float64():
    big = torch.full((3 * 2**20 + 5,), 1.0)
    big[0] = 1e8
    assert dot(big, torch.ones_like(big)) == 1e8 + len(big) - 1
