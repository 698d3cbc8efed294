"""An ensemble's members end with the same weights as models trained separately with torch's optimizers."""

import copy

import pytest
import torch
from torch import nn

from src.models import build_model
from src.training.ensemble import Ensemble, vectorised_is_faster, why_not_vectorised
from src.training.stacked import StackedBatch, StackedNetwork, StackedPerceptron, perceptron_layers

MEMBERS, EXAMPLES, CLASSES, SIZE = 3, 5, 4, 6
L2 = (0.1, 0.0, 0.03)
TOLERANCE = {"rtol": 0.0, "atol": 1e-12}


class Convolution(nn.Module):
    """A model with a convolution, pooling, a bare parameter and a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, images):
        return self.head((self.scale * torch.tanh(nn.functional.avg_pool2d(self.conv(images), 2))).flatten(1))


def network(kind, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "conv":
            model = Convolution()
        elif kind == "relu":
            model = nn.Sequential(
                nn.Flatten(), nn.Linear(SIZE**2, 7), nn.ReLU(), nn.Linear(7, 6, bias=False), nn.Linear(6, 5),
                nn.Sigmoid(), nn.Identity(), nn.Linear(5, CLASSES),
            )  # fmt: skip
        elif kind == "linear":
            model = nn.Sequential(nn.Flatten(), nn.Linear(SIZE**2, CLASSES))
        else:
            model = build_model(kind, CLASSES, 1, SIZE, seed)
    return model.double()


def batches(steps=4, *, shared=False, padded=False, seed=1):
    """Images, labels, weights. If padded, member 2 has fewer examples and member 3 has none in the last steps."""
    draw = torch.Generator().manual_seed(seed)
    lead = () if shared else (MEMBERS,)
    found = []
    for step in range(steps):
        images = torch.randn(*lead, EXAMPLES, 1, SIZE, SIZE, generator=draw, dtype=torch.float64)
        labels = torch.randint(CLASSES, (*lead, EXAMPLES), generator=draw)
        weights = None
        if padded:
            weights = torch.rand(MEMBERS, EXAMPLES, generator=draw, dtype=torch.float64) + 0.5
            weights[1, 3:] = 0.0
            weights[2] *= step < 2
        found.append((images, labels, weights))
    return found


def by_torch(model, member, data, optimizer, rates):
    """Train one member separately with torch.optim. Steps without examples are skipped."""
    model = copy.deepcopy(model)
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    more = {"momentum": 0.9} if optimizer == "sgd" else {}
    steps = kinds[optimizer](model.parameters(), lr=0.0, weight_decay=L2[member], **more)
    losses = []
    for (images, labels, weights), lr in zip(data, rates, strict=True):
        if labels.ndim == 2:
            images, labels = images[member], labels[member]
        weight = torch.ones(EXAMPLES, dtype=torch.float64) if weights is None else weights[member]
        chosen = weight > 0
        if not chosen.any():
            losses.append(0.0)
            continue
        steps.param_groups[0]["lr"] = lr
        steps.zero_grad()
        each = nn.functional.cross_entropy(model(images[chosen]), labels[chosen], reduction="none")
        loss = (each * weight[chosen]).sum() / weight[chosen].sum()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    return model.state_dict(), losses


def advance(ensemble, data, rates):
    found = []
    for (images, labels, weights), lr in zip(data, rates, strict=True):
        active = None if weights is None else (weights > 0).any(1)
        found.append(ensemble.step(images, labels, weights, lr, active))
    return torch.stack(found)


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize(("shared", "padded"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["small_mlp", "relu", "linear", "conv"])
def test_members_are_those_of_torch(kind, shared, padded, optimizer, vectorised):
    model, data, rates = network(kind), batches(shared=shared, padded=padded), (0.1, 0.07, 0.05, 0.02)
    ensemble = Ensemble(
        model, MEMBERS, l2=torch.tensor(L2, dtype=torch.float64), optimizer=optimizer, vectorised=vectorised
    )
    losses = advance(ensemble, data, rates)
    probe = data[0][0][0] if not shared else data[0][0]
    logits = ensemble.logits(probe)
    own = ensemble.member_logits(probe.expand(MEMBERS, *probe.shape) * torch.arange(1, 4).view(-1, 1, 1, 1, 1))
    for member in range(MEMBERS):
        expected, expected_losses = by_torch(model, member, data, optimizer, rates)
        found = ensemble.member(member)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **TOLERANCE)
        torch.testing.assert_close(losses[:, member], torch.tensor(expected_losses, dtype=torch.float64), **TOLERANCE)
        alone = copy.deepcopy(model)
        alone.load_state_dict(expected)
        torch.testing.assert_close(logits[member], alone(probe), **TOLERANCE)
        torch.testing.assert_close(own[member], alone(probe * (member + 1)), **TOLERANCE)
    start = network(kind).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_kinds_cover_both_ways_of_stacking():
    assert len(perceptron_layers(network("small_mlp"))) == 3
    assert len(perceptron_layers(network("relu"))) == 4
    assert perceptron_layers(network("conv")) is None


def test_one_l2_weight_for_all_and_momentum_zero():
    model, data = network("small_mlp"), batches(3)
    found = Ensemble(model, MEMBERS, l2=0.2, momentum=0.0)
    other = Ensemble(
        model, MEMBERS, l2=torch.full((MEMBERS,), 0.2, dtype=torch.float64), momentum=0.0, vectorised=False
    )
    for ensemble in (found, other):
        advance(ensemble, data, (0.1, 0.1, 0.1))
    for member in range(MEMBERS):
        for name, value in other.member(member).items():
            torch.testing.assert_close(found.member(member)[name], value, **TOLERANCE)


def test_members_start_from_given_weights():
    model, start = network("small_mlp"), network("small_mlp", seed=5).state_dict()
    for vectorised in (True, False):
        ensemble = Ensemble(model, 2, initial=start, vectorised=vectorised)
        assert all(torch.equal(ensemble.member(1)[name], value) for name, value in start.items())
    assert not torch.equal(model.state_dict()["head.weight"], start["head.weight"])


def test_shared_weights_and_hooks_do_not_pass_for_a_plain_perceptron():
    first, second = nn.Linear(SIZE**2, SIZE**2), nn.Linear(SIZE**2, SIZE**2)
    second.weight = first.weight
    model = nn.Sequential(nn.Flatten(), first, nn.Tanh(), second, nn.Linear(SIZE**2, CLASSES)).double()
    assert perceptron_layers(model) is None
    data, rates = batches(2), (0.1, 0.1)
    ensemble = Ensemble(model, MEMBERS, l2=torch.tensor(L2, dtype=torch.float64))
    advance(ensemble, data, rates)
    for name, value in by_torch(model, 2, data, "sgd", rates)[0].items():
        torch.testing.assert_close(ensemble.member(2)[name], value, **TOLERANCE)
    plain = network("linear")
    plain[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert perceptron_layers(plain) is None
    for odd in (
        nn.Sequential(nn.Linear(4, 4)),  # images are not flattened
        nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Tanh()),  # no logits
        nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), nn.Tanh(), nn.Linear(4, 4)),
        nn.Sequential(nn.Flatten(2), nn.Linear(4, 4)),
    ):
        assert perceptron_layers(odd) is None


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_restored_ensemble_goes_on_bit_for_bit(optimizer, vectorised, tmp_path):
    model, data, rates = network("small_mlp"), batches(6), (0.1,) * 6
    whole = Ensemble(model, MEMBERS, l2=0.1, optimizer=optimizer, vectorised=vectorised)
    advance(whole, data[:3], rates[:3])
    torch.save(whole.state(), tmp_path / "state.pt")
    advance(whole, data[3:], rates[3:])
    again = Ensemble(model, MEMBERS, l2=0.1, optimizer=optimizer, vectorised=vectorised)
    again.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    advance(again, data[3:], rates[3:])
    for member in range(MEMBERS):
        assert all(torch.equal(value, whole.member(member)[name]) for name, value in again.member(member).items())


def test_a_state_of_another_ensemble_is_refused():
    model = network("small_mlp")
    state = Ensemble(model, 2).state()
    for other in (Ensemble(model, 3), Ensemble(model, 2, vectorised=False), Ensemble(network("linear"), 2)):
        with pytest.raises(ValueError, match="state"):
            other.restore(state)
    with pytest.raises(ValueError, match="does not fit"):
        Ensemble(model, 2, optimizer="adam").restore(state)


class WithBatchNorm(nn.Module):
    def __init__(self, drop=0.0):
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(SIZE**2), nn.Dropout(drop), nn.Linear(SIZE**2, CLASSES)

    def forward(self, images):
        return self.head(self.drop(self.norm(images.flatten(1))))


def test_what_needs_members_one_after_another():
    dropout = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(SIZE**2, CLASSES))
    twice = nn.Linear(SIZE**2, SIZE**2)
    for model, word in (
        (WithBatchNorm(), "norm keeps running statistics"),
        (dropout, "1 draws random numbers"),
        (nn.Sequential(nn.Flatten(), twice, nn.Tanh(), twice), "3 is a module that occurs twice"),
    ):
        assert word in why_not_vectorised(model)
        assert not vectorised_is_faster(model, "cuda", 32)
        with pytest.raises(ValueError, match=word):
            Ensemble(model, 2)
    assert why_not_vectorised(nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(4, 4))) is None


def test_padding_does_not_enter_batchnorm():
    model, data, rates = WithBatchNorm().double(), batches(padded=True), (0.1,) * 4
    ensemble = Ensemble(model, MEMBERS, l2=torch.tensor(L2, dtype=torch.float64), vectorised=False)
    advance(ensemble, data, rates)
    for member in range(MEMBERS):
        expected, _ = by_torch(model, member, data, "sgd", rates)
        for name, value in expected.items():
            torch.testing.assert_close(ensemble.member(member)[name], value, **TOLERANCE)
    probe = data[0][0][0]
    shorter = ensemble.logits(probe[:2])  # eval mode: batches of any size agree up to rounding
    torch.testing.assert_close(ensemble.logits(probe)[:, :2], shorter, **TOLERANCE)


def test_members_without_examples_stand_still():
    for optimizer in ("sgd", "adam"):
        ensemble = Ensemble(network("small_mlp"), MEMBERS, l2=0.1, optimizer=optimizer)
        images, labels, _ = batches(1)[0]
        ensemble.step(images, labels, None, 0.1)
        before = [ensemble.member(member) for member in range(MEMBERS)]
        losses = ensemble.step(images, labels, None, 0.1, torch.tensor([True, False, False]))
        assert (losses != 0).tolist() == [True, False, False]
        assert not ensemble.step(images, labels, None, 0.1, torch.zeros(MEMBERS, dtype=torch.bool)).any()
        for member in range(MEMBERS):
            same = [torch.equal(value, before[member][name]) for name, value in ensemble.member(member).items()]
            assert all(same) == (member > 0)


def test_a_loss_that_is_not_finite_stays_with_its_member():
    ensemble = Ensemble(network("small_mlp"), MEMBERS)
    images, labels, _ = batches(1)[0]
    images[1, 0] = torch.inf
    assert ensemble.step(images, labels, None, 0.1).isfinite().tolist() == [True, False, True]
    assert ensemble.finite().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("name", "batch_size", "faster"),
    [("small_mlp", 32, True), ("small_mlp", 1024, True), ("large_mlp", 32, True), ("large_mlp", 256, True),
     ("large_mlp", 512, False), ("lenet", 32, False)],
)  # fmt: skip
def test_the_rule_of_what_is_faster(name, batch_size, faster):
    model = build_model(name, 10, 1, 28, seed=0)
    assert vectorised_is_faster(model, "cpu", batch_size) == faster
    assert vectorised_is_faster(model, torch.device("cuda"), batch_size)


@pytest.mark.parametrize(
    "change",
    [{"count": 0}, {"optimizer": "sam"}, {"l2": torch.ones(2)}, {"l2": -1.0}, {"l2": torch.nan}],
)
def test_bad_arguments_are_refused(change):
    with pytest.raises(ValueError, match=r"."):
        Ensemble(**{"model": network("linear"), "count": MEMBERS, **change})


def test_bad_batches_and_frozen_parameters_are_refused():
    model = network("linear")
    ensemble = Ensemble(model, MEMBERS)
    images, labels, _ = batches(1)[0]
    for wrong in ((images[:2], labels, None), (images, labels[:, :2], None), (images, labels, torch.ones(3, 2))):
        with pytest.raises(ValueError, match=r"images|weights"):
            ensemble.step(*wrong, 0.1)
    with pytest.raises(ValueError, match="2 members"):
        ensemble.member_logits(images[:2])
    model[1].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"1\.bias does not require gradients"):
        Ensemble(model, 2)


@pytest.mark.parametrize("kind", ["small_mlp", "conv"])
def test_gradients_replace_what_is_not_finite(kind):
    model = network(kind)
    layers = perceptron_layers(model)
    engine = StackedNetwork(model) if layers is None else StackedPerceptron(layers)
    parameters = {name: value.detach()[None].clone() for name, value in model.named_parameters()}
    images, labels, _ = batches(1, shared=True)[0]
    into = {name: torch.full_like(value, torch.nan) for name, value in parameters.items()}
    engine.accumulate(parameters, StackedBatch(images, labels[None], 1.0 / EXAMPLES, True), into, 0.0)
    nn.functional.cross_entropy(model(images), labels).backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(into[name][0], value.grad, **TOLERANCE)
