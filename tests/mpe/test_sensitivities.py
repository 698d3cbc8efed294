"""The public API with a user's model and loader."""

import numpy as np
import pytest
import torch
from mpe_problems import batches, examples, network
from support import write_blobs
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from mpe.config import STRUCTURES
from mpe.estimates import Estimates, Sensitivities, estimate, loo_losses, refuse_shuffling, sensitivities, sensitivity
from mpe.posterior import Predictions, laplace_posterior, optimizer_posterior, predict
from src.artifacts.io import label_hash
from src.artifacts.store import read_record
from src.datasets import load_dataset
from src.errors import MeasurementError, UserError
from src.jacobians import output_variances
from src.metrics.proxy import Proxy
from src.optimizers import IBLR


class Own(nn.Module):
    """A model that is not part of this project, with dropout and a residual connection."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(72, 6)
        self.norm = nn.LayerNorm(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        h = self.stem(x.flatten(1)).relu()
        return self.head(h + self.drop(self.norm(h)))


def own_network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Own().double()


def loader(n=9, size=4, **options):
    return DataLoader(TensorDataset(*examples(n)), batch_size=size, **options)


def by_hand(net, given, posterior, class_cov):
    with output_variances(net, posterior, full=class_cov != "diag") as engine:
        predictions = predict(engine, given)
    found = estimate(predictions, class_cov)
    return sensitivity(found).numpy(), loo_losses(predictions, found).numpy()


@pytest.mark.parametrize("class_cov", ["diag", "full", "woodbury"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_laplace_on_a_users_network(structure, class_cov):
    net, given = own_network().train(), loader()
    found = sensitivities(net, given, structure, delta=60.0, class_cov=class_cov)
    assert net.training
    scores, losses = by_hand(net, given, laplace_posterior(net, given, 60.0, structure=structure), class_cov)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-12)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-12)
    assert found.loo_nll == pytest.approx(losses.mean(), rel=1e-12)
    unclamped = loo_losses(found.predictions, found.estimates, clamp=False).mean().item()
    assert found.unclamped_loo_nll == pytest.approx(unclamped, rel=1e-12)
    assert found.predictions.nll < found.loo_nll <= unclamped * (1 + 1e-12)  # equal if nothing is clamped
    order = np.argsort(-scores)
    assert found.most_sensitive(3).tolist() == order[:3].tolist()
    assert found.least_sensitive(3).tolist() == order[:-4:-1].tolist()


def trained(net, kind):
    optimizer = IBLR(net.parameters(), 0.1, 9, 3.0) if kind == "iblr" else torch.optim.AdamW(net.parameters())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for images, labels in loader():
            optimizer.zero_grad()
            if kind == "iblr":
                with optimizer.sampled_params():
                    nn.functional.cross_entropy(net(images), labels).backward()
            else:
                nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
    return optimizer


def test_posterior_of_the_optimizer():
    net = own_network()
    optimizer = trained(net, "iblr")
    found = sensitivities(net, loader(), optimizer)
    posterior = optimizer_posterior(optimizer, net)
    np.testing.assert_allclose(found.scores, by_hand(net, loader(), posterior, "diag")[0], rtol=1e-12)
    np.testing.assert_allclose(found.scores, sensitivities(net, loader(), posterior).scores, rtol=1e-12)
    optimizer = trained(net, "adam")
    posterior = optimizer_posterior(optimizer, net, num_examples=9, delta=3.0)
    expected = by_hand(net, loader(), posterior, "diag")[0]
    for options in ({}, {"num_examples": 9}):  # by default, N is the size of the loader's data set
        found = sensitivities(net, loader(), optimizer, delta=3.0, **options)
        np.testing.assert_allclose(found.scores, expected, rtol=1e-12)
    other = sensitivities(net, loader(), optimizer, delta=3.0, num_examples=90)
    assert (other.scores < 0.99 * expected).all()


def test_batch_size_changes_nothing():
    net = own_network()
    first, second = (sensitivities(net, loader(size=size), "kfac", delta=3.0) for size in (9, 2))
    np.testing.assert_allclose(first.scores, second.scores, rtol=1e-10)


def test_shuffling_needs_indices():
    net, (images, labels) = own_network(), examples(9)
    with pytest.raises(ValueError, match="shuffle=False"):
        sensitivities(net, loader(shuffle=True), "diag", delta=3.0)
    with_indices = TensorDataset(images, labels, torch.arange(9) + 10)
    shuffled = DataLoader(with_indices, batch_size=4, shuffle=True)
    found = sensitivities(net, shuffled, "diag", delta=3.0)
    plain = sensitivities(net, loader(), "diag", delta=3.0)
    np.testing.assert_allclose(found.scores, plain.scores[found.indices - 10], rtol=1e-10)
    assert found.most_sensitive(9).tolist() == (plain.most_sensitive(9) + 10).tolist()


class Backwards(SequentialSampler):
    def __iter__(self):
        return reversed(range(len(self)))


class InPairs(BatchSampler):
    def __iter__(self):
        return iter([[8, 7], [0, 1]])


class Stream(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return (self.dataset[i] for i in (3, 0, 1, 2))


ORDERS = {  # arguments of a DataLoader, and whether it reads the data set in order
    "plain": (lambda data: {"batch_size": 4}, True),
    "drop_last": (lambda data: {"batch_size": 4, "drop_last": True}, True),
    "sequential batches": (lambda data: {"batch_sampler": BatchSampler(SequentialSampler(data), 4, False)}, True),
    "batches as samples": (
        lambda data: {"batch_size": None, "sampler": BatchSampler(SequentialSampler(data), 4, False)},
        True,
    ),
    "two workers": (lambda data: {"batch_size": 4, "num_workers": 2}, True),
    "workers as they come": (lambda data: {"batch_size": 4, "num_workers": 2, "in_order": False}, False),
    "shuffle": (lambda data: {"batch_size": 4, "shuffle": True}, False),
    "random batches": (lambda data: {"batch_sampler": BatchSampler(RandomSampler(data), 4, False)}, False),
    "random batches as samples": (
        lambda data: {"batch_size": None, "sampler": BatchSampler(RandomSampler(data), 4, False)},
        False,
    ),
    "subset": (lambda data: {"batch_size": 4, "sampler": SubsetRandomSampler(range(9))}, False),
    "distributed": (lambda data: {"batch_size": 4, "sampler": DistributedSampler(data, 2, 0, shuffle=True)}, False),
    "distributed in order": (
        lambda data: {"batch_size": 4, "sampler": DistributedSampler(data, 2, 1, shuffle=False)},
        False,
    ),
    "list": (lambda data: {"batch_size": 4, "sampler": [3, 1, 2]}, False),
    "own sampler": (lambda data: {"batch_size": 4, "sampler": Backwards(data)}, False),
    "own batch sampler": (lambda data: {"batch_sampler": InPairs(SequentialSampler(data), 2, False)}, False),
    "stream": (lambda data: {"batch_size": 4}, False),
}


@pytest.mark.parametrize("order", ORDERS)
def test_without_indices_only_loaders_in_order_are_taken(order):
    options, in_order = ORDERS[order]
    images, labels = examples(9)
    thirds = {"none": [], "float": [torch.rand(9)], "integer": [torch.arange(9)]}
    for third, columns in thirds.items():
        if third != "none" and ("workers" in order):
            continue  # starting processes is slow
        data = TensorDataset(images, labels, *columns)
        given = DataLoader(Stream(data) if order == "stream" else data, **options(data))
        before = torch.get_rng_state()
        if in_order or third == "integer":
            refuse_shuffling(given)
        else:
            with pytest.raises(ValueError, match="shuffle=False"):
                refuse_shuffling(given)
        assert torch.equal(torch.get_rng_state(), before)


def test_looking_for_indices_changes_no_order():
    data = TensorDataset(*examples(9), torch.arange(9))

    def build():
        draws = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        yield DataLoader(data, batch_size=4, shuffle=True, generator=draws[0])
        yield DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data, generator=draws[1]), 4, False))

    for looked_at, other in zip(build(), build(), strict=True):
        refuse_shuffling(looked_at)
        orders = [torch.cat([batch[2] for batch in given]) for given in (looked_at, other)]
        assert torch.equal(*orders)


def test_sensitivities_refuse_before_any_pass():
    data = TensorDataset(*examples(9), torch.rand(9))
    given = DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False))
    with pytest.raises(ValueError, match="shuffle=False"):
        sensitivities(None, given, "diag", delta=3.0)


@pytest.mark.parametrize("indices", [False, True])
def test_something_around_a_shuffling_loader(indices):
    data = TensorDataset(*examples(9), *([torch.arange(9)] if indices else []))

    class Around:
        def __init__(self, sampler):
            self.inside, self.sampler = DataLoader(data, batch_size=4, sampler=sampler), sampler

        def __iter__(self):
            return iter(self.inside)

    refuse_shuffling(Around(SequentialSampler(data)))
    if indices:
        refuse_shuffling(Around(RandomSampler(data)))
        return
    refuse_shuffling(batches(*examples(9)))  # the order of a list is unknown
    with pytest.raises(ValueError, match="shuffle=False"):
        refuse_shuffling(Around(RandomSampler(data)))


def test_permuting_examples_permutes_scores():
    net, (images, labels) = network(), examples(9)
    order = torch.tensor([4, 1, 8, 0, 2, 7, 5, 3, 6])
    first = sensitivities(net, batches(images, labels), "diag", delta=3.0)
    second = sensitivities(net, batches(images[order], labels[order]), "diag", delta=3.0)
    np.testing.assert_allclose(first.scores[order], second.scores, rtol=1e-10)
    np.testing.assert_allclose(first.losses[order], second.losses, rtol=1e-10)


def test_planted_wrong_labels_are_among_the_most_sensitive():
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    images = 2.5 * torch.eye(3, 5)[labels] + 0.5 * torch.randn(120, 5, generator=draw)
    wrong = torch.tensor([7, 30, 61, 95])
    labels[wrong] = (labels[wrong] + 1) % 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in net.parameters())
        (nn.functional.cross_entropy(net(images), labels) + 1.0 / 240 * penalty).backward()
        optimizer.step()
    for posterior in ("kfac", "diag", optimizer):
        for class_cov in ("diag", "full"):
            found = sensitivities(
                net, batches(images, labels, 50), posterior, delta=1.0, num_examples=120, class_cov=class_cov
            )
            assert found.most_sensitive(1)[0] in wrong
            assert set(wrong.tolist()) <= set(found.most_sensitive(8).tolist())  # of 120


# -------------------------------------------------------------------------------------- ranking and score files


def made(scores, indices, labels=None):
    """Sensitivities with the given scores."""
    n = len(scores)
    labels = torch.zeros(n, dtype=torch.int64) if labels is None else torch.as_tensor(labels)
    zeros = torch.zeros(n, 2, dtype=torch.float64)
    change = torch.tensor(scores, dtype=torch.float64).unsqueeze(1) * torch.tensor([0.5, -0.5])
    predictions = Predictions(torch.as_tensor(indices), labels, zeros, zeros)
    return Sensitivities(predictions, Estimates(zeros, change, torch.zeros(n, dtype=torch.bool)), {"delta": 3.0})


def test_ties_by_original_index():
    found = made([1.0, 2.0, 1.0, 2.0, 0.5], [9, 8, 3, 4, 1])
    assert found.most_sensitive(5).tolist() == [4, 8, 3, 9, 1]
    assert found.least_sensitive(5).tolist() == [1, 3, 9, 4, 8]
    assert found.most_sensitive(2).tolist() == [4, 8]
    assert found.most_sensitive(0).tolist() == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(MeasurementError, match=r"of 2 of 4 examples are not finite \(indices 3, 8\)"):
        made([bad, 2.0, bad, 1.0], [8, 9, 3, 4])
    net, (images, labels) = own_network(), examples(9)
    images[[2, 7]] = bad
    with pytest.raises(MeasurementError, match=r"2 of 9 examples are not finite \(indices 2, 7\)"):
        sensitivities(net, [(images, labels)], IBLR(net.parameters(), 0.1, 9, 3.0))
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    huge = Predictions(
        torch.arange(2), torch.arange(2), zeros, zeros + torch.tensor([[1.7e308], [1.0]], dtype=torch.float64)
    )
    for form in ("diag", "full"):  # finite variances whose product with an error is not
        variances = torch.diag_embed(huge.variances) if form == "full" else huge.variances
        found = Predictions(huge.indices, huge.labels, zeros, variances)
        with pytest.raises(MeasurementError, match=r"1 of 2 examples are not finite \(indices 0\)"):
            estimate(found, form, errors=zeros + 2.0)


def test_score_file_is_read_by_proxy(tmp_path):
    net, (images, labels) = network(), examples()
    found = sensitivities(net, batches(images, labels), "kfac", delta=3.0)
    paths = found.write_scores(tmp_path, "toy", settings={"epochs": 5})
    assert [path.name for path in paths] == ["mpe_toy.pkl", "mpe_toy.json", "mpe_toy.csv"]
    proxy = Proxy(mode="mpe", dataset="toy", normalize=False, folder=tmp_path, n=7, label_hash=label_hash(labels))
    np.testing.assert_array_equal(proxy.scores, found.scores)
    assert proxy.get_sorted_indices().tolist() == found.least_sensitive(7).tolist()
    expected = {"mode": "mpe", "dataset": "toy", "posterior": "kfac", "class_cov": "diag", "delta": 3.0, "epochs": 5}
    assert expected.items() <= proxy.record.items()
    assert proxy.record["label_hash"] == label_hash(labels)


def test_score_files_of_any_name_of_a_data_set(tmp_path):
    found = made([0.5, 0.25], [1, 0])
    data = write_blobs(tmp_path / "photos.npz", n=6)
    name = load_dataset(f"npz:{data}", tmp_path)[0].entry.name
    for text, stored in (("CIFAR10", "cifar10"), (f"npz:{data}", name), (name, name)):
        paths = found.write_scores(tmp_path / "scores", text)
        assert paths[0] == tmp_path / "scores" / "mpe" / f"mpe_{stored}.pkl"
        assert read_record(paths[0])["dataset"] == stored
        assert Proxy("mpe", text, folder=tmp_path / "scores").path == paths[0]
    for wrong in ("a/b", "..", "../toy", "", "folder:/nowhere"):
        with pytest.raises(UserError):
            found.write_scores(tmp_path / "other", wrong)
    assert not (tmp_path / "other").exists()


def test_score_file_of_a_subset(tmp_path):
    made([0.5, 0.25], [4, 1], labels=[1, 0]).write_scores(tmp_path, "toy", total=6)
    proxy = Proxy(mode="mpe", dataset="toy", normalize=False, folder=tmp_path, n=6)
    np.testing.assert_array_equal(proxy.scores, [np.nan, 0.25, np.nan, np.nan, 0.5, np.nan])
    assert "label_hash" not in proxy.record  # the other labels are unknown
    with pytest.raises(ValueError, match="there are 4 examples"):
        made([0.5, 0.25], [4, 1]).write_scores(tmp_path, "toy", total=4)


def test_score_file_hashes_labels_in_order(tmp_path):
    made([0.1, 0.2, 0.3], [2, 0, 1], labels=[1, 0, 0]).write_scores(tmp_path, "toy")
    record = read_record(tmp_path / "mpe" / "mpe_toy.pkl")
    assert record["label_hash"] == label_hash([0, 0, 1])


@pytest.mark.parametrize(
    ("posterior", "options", "says"),
    [
        ("kfac", {}, "needs delta"),
        ("kron", {"delta": 1.0}, "'kfac', 'diag'"),
        ("kfac", {"delta": 1.0, "class_cov": "half"}, "diag, full, woodbury"),
        (torch.optim.SGD, {}, "SGD does not learn variances"),
        (torch.optim.Adam, {}, "num_examples and delta"),
    ],
)
def test_refusals(posterior, options, says):
    net = network()
    posterior = posterior if isinstance(posterior, str) else posterior(net.parameters())
    with pytest.raises(ValueError, match=says):
        sensitivities(net, batches(*examples()), posterior, **options)


def test_iterators_are_refused():
    with pytest.raises(ValueError, match="not an iterator"):
        sensitivities(network(), iter(batches(*examples())), "diag", delta=1.0)
