"""Retraining in chunks: as plain loops would have it, and the same bits after any interruption."""

import copy
import json
import logging
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from mpe.orders import replay_generator
from mpe.retraining import RetrainSettings, retrain
from src.errors import FileError, TrainingError
from src.models import build_model
from src.optimizers import rate

N, CLASSES, SIZE = 22, 3, 5
REMOVED = [[], [4], [9], [0, 1, 2, 3, 5, 6, 7, 8], [21]]
SETTINGS = RetrainSettings(epochs=3, batch_size=4, learning_rate=0.1, lr_min=0.01, delta=2.0, seed=3)


class StoppedError(Exception):
    pass


def material(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    model = build_model("small_mlp", CLASSES, 1, SIZE, seed=0).to(dtype)
    return model, torch.randn(N, 1, SIZE, SIZE, generator=draw).to(dtype), torch.arange(N) % CLASSES


def logits_of(images):
    def measure(ensemble, numbers):
        assert len(ensemble) == len(numbers)
        return {"logits": ensemble.logits(images).numpy(), "number": np.array(numbers)}

    return measure


def run(settings=SETTINGS, *, removed=REMOVED, dtype=torch.float64, model=None, **kwargs):
    base, images, labels = material(dtype)
    kwargs = {"measure": logits_of(images), "chunk": 2, "save_seconds": 0.0, **kwargs}
    return retrain(model or base, images, labels, removed, settings, **kwargs)


def plainly(orders, settings=SETTINGS, deltas=None):
    """Each network alone: torch's SGD on the given batches; the batches of all epochs, or a function of the epoch."""
    base, images, labels = material()
    found = []
    for number, left in enumerate(REMOVED):
        model = copy.deepcopy(base)
        delta = settings.delta if deltas is None else deltas[number]
        decay = delta / (N - len(left))
        steps = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(steps, settings.epochs, settings.lr_min)
        for epoch in range(1, settings.epochs + 1):
            for batch in orders(number, epoch):
                if len(batch):
                    steps.zero_grad()
                    nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                    steps.step()
            schedule.step()
        found.append(model(images).detach())
    return torch.stack(found).numpy()


@cache
def replayed():
    """Torch's own shuffling loaders, after the draws of a script that builds nothing and reads six times."""
    found = {}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for _ in range(6):
            list(torch.utils.data.DataLoader(torch.arange(3)))
        state = torch.get_rng_state()
        for place, left in enumerate(REMOVED):
            if place <= 1:  # the control draws what the first retraining draws
                torch.set_rng_state(state)
            remaining = torch.tensor([i for i in range(N) if i not in left])
            found[place] = list(torch.utils.data.DataLoader(remaining, batch_size=4, shuffle=True))
            list(torch.utils.data.DataLoader(torch.arange(3)))  # the evaluation in between
    return found


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("chunk", [1, 2, 10])
def test_replayed_retraining_is_that_of_plain_loops(vectorised, chunk):
    settings = RetrainSettings(**{**vars(SETTINGS), "shuffle": "replay"})
    before = torch.get_rng_state()
    found = run(settings, chunk=chunk, vectorised=vectorised, replay=replay_generator(lambda: None), extra_draws=1)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_allclose(found["logits"], plainly(lambda number, epoch: replayed()[number]), rtol=0, atol=1e-12)
    assert found["number"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("vectorised", [True, False])
def test_a_given_order_of_each_epoch_and_a_delta_of_each_network(vectorised):
    deltas = [0.0, 1.0, 2.0, 3.0, 4.0]

    def permutation(epoch):
        return torch.arange(N).roll(epoch)

    def batches(number, epoch):
        order = permutation(epoch).tolist()
        return [[i for i in order[k : k + 4] if i not in REMOVED[number]] for k in range(0, N, 4)]

    found = run(vectorised=vectorised, deltas=deltas, permutation=permutation)
    np.testing.assert_allclose(found["logits"], plainly(batches, deltas=deltas), rtol=0, atol=1e-12)


def test_shuffles_differ_and_seeds_matter():
    seeded, again = run()["logits"], run(chunk=4)["logits"]
    np.testing.assert_allclose(seeded, again, rtol=0, atol=1e-12)
    shared = run(RetrainSettings(**{**vars(SETTINGS), "shuffle": "shared"}))["logits"]
    other = run(RetrainSettings(**{**vars(SETTINGS), "seed": 4}))["logits"]
    for changed in (shared, other):
        assert (np.abs(changed - seeded).max((1, 2)) > 1e-6).all()
    # alone or among others, a network is the same
    np.testing.assert_allclose(run(removed=REMOVED[2:3])["logits"][0], seeded[2], rtol=0, atol=1e-12)


def test_the_model_is_left_as_it_was():
    model = material()[0]
    before = copy.deepcopy(model.state_dict())
    run(model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


@contextmanager
def stopped(monkeypatch, at):
    """Expect a run to stop when it comes to its ``at``-th epoch, counted over all chunks."""
    count = 0

    def stop(*args):
        nonlocal count
        count += 1
        if count == at:
            raise StoppedError
        return rate(*args)

    with monkeypatch.context() as patch:
        patch.setattr("mpe.retraining.rate", stop)
        with pytest.raises(StoppedError):
            yield


@contextmanager
def untrained(monkeypatch):
    """Let a run stop with an error if it trains at all."""
    with monkeypatch.context() as patch:
        patch.setattr("mpe.retraining.rate", None)
        yield


class Noisy(nn.Module):
    """Dropout and BatchNorm: what only networks one after another can have."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(SIZE**2, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)

    def forward(self, images):
        return self.head(nn.functional.dropout(self.norm(self.first(images.flatten(1))), 0.3, self.training))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("kind", "vectorised"), [("plain", True), ("plain", False), ("noisy", False)])
@pytest.mark.parametrize("at", [2, 4, 6])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch, at, kind, vectorised, optimizer):
    settings = RetrainSettings(**{**vars(SETTINGS), "optimizer": optimizer, "learning_rate": 0.02})
    removed = [[], [4], [9], [21]]  # of 22 and 21 examples: no last batch of one
    model = None
    if kind == "noisy":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Noisy()
        settings = RetrainSettings(**{**vars(settings), "batch_size": 5, "epochs": 3})
        removed = [[], [4, 5], [9, 3], [21, 0]]
    more = {"dtype": torch.float32, "model": model, "vectorised": vectorised, "removed": removed}
    whole = run(settings, **more)
    torch.manual_seed(1000 + at)  # what the process drew before must not matter
    with stopped(monkeypatch, at):
        run(settings, folder=tmp_path, **more)
    torch.manual_seed(2000 + at)
    calls = []
    resumed = run(
        settings,
        folder=tmp_path,
        resume=True,
        after_chunk=lambda rows, n: calls.append((len(rows["number"]), n)),
        **more,
    )
    assert np.array_equal(whole["logits"], resumed["logits"])
    assert calls == [(2, 2), (4, 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "networks_0_2.npz", "networks_2_4.npz", "settings.json",
    ]  # fmt: skip


def test_a_resumed_run_does_only_what_is_missing(tmp_path, monkeypatch):
    whole = run(folder=tmp_path)
    with untrained(monkeypatch):
        again = run(folder=tmp_path, resume=True)
    assert np.array_equal(whole["logits"], again["logits"])
    (tmp_path / "networks_4_5.npz").unlink()
    with stopped(monkeypatch, 1):
        run(folder=tmp_path, resume=True)


def test_other_chunks_may_go_on(tmp_path, monkeypatch):
    whole = run(folder=tmp_path)
    (tmp_path / "networks_2_4.npz").unlink()
    (tmp_path / "networks_4_5.npz").unlink()
    seen = []
    found = run(folder=tmp_path, resume=True, chunk=3, after_chunk=lambda rows, n: seen.append(n))
    np.testing.assert_allclose(found["logits"], whole["logits"], rtol=0, atol=1e-12)
    assert seen == [2, 5]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other ensemble"])
def test_a_damaged_state_is_passed_over_with_a_warning(tmp_path, monkeypatch, caplog, damage):
    whole = run()
    with stopped(monkeypatch, 6):  # in the third epoch of the second chunk
        run(folder=tmp_path)
    newest = tmp_path / "state_2_4_epoch_2.pt"
    if damage == "truncated":
        newest.write_bytes(newest.read_bytes()[:300])
    elif damage == "foreign":
        torch.save({"epoch": 2}, newest)
    else:
        state = torch.load(newest, weights_only=True)
        del state["ensemble"]["moments"]
        torch.save(state, newest)
    with caplog.at_level(logging.WARNING):
        found = run(folder=tmp_path, resume=True)
    assert np.array_equal(whole["logits"], found["logits"])
    lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 1
    assert str(newest) in lines[0]
    assert "using the state before it" in lines[0]


def test_a_damaged_chunk_is_retrained(tmp_path, caplog):
    whole = run(folder=tmp_path)
    path = tmp_path / "networks_2_4.npz"
    path.write_bytes(path.read_bytes()[:50])
    with caplog.at_level(logging.WARNING):
        found = run(folder=tmp_path, resume=True)
    assert np.array_equal(whole["logits"], found["logits"])
    assert any(str(path) in record.message for record in caplog.records if record.levelname == "WARNING")


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"key": {"dataset": "other"}}, "dataset"),
        ({"settings": RetrainSettings(**{**vars(SETTINGS), "delta": 3.0})}, "delta"),
        ({"removed": [*REMOVED[:-1], [20]]}, "order"),
        ({"model": build_model("small_mlp", CLASSES, 1, SIZE, seed=1).double()}, "base_weights"),
    ],
)
def test_a_folder_of_other_settings_is_refused(tmp_path, change, word, resume):
    run(folder=tmp_path, key={"dataset": "mine"})
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
    change = {"settings": SETTINGS, "key": {"dataset": "mine"}, **change}
    with pytest.raises(FileError, match=rf"{tmp_path}: holds results of other settings: .*{word}"):
        run(folder=tmp_path, resume=resume, **change)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir()) == before
    replaced = run(folder=tmp_path, resume=resume, overwrite=True, **change)
    assert np.array_equal(replaced["logits"], run(**change)["logits"])
    stored = json.loads((tmp_path / "settings.json").read_text())
    assert stored["dataset"] == change["key"]["dataset"]


def test_without_resume_a_run_starts_anew(tmp_path, monkeypatch):
    run(folder=tmp_path)
    with stopped(monkeypatch, 1):
        run(folder=tmp_path)


def test_damaged_settings_are_named(tmp_path):
    run(folder=tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(FileError, match=r"settings\.json.*--overwrite"):
        run(folder=tmp_path, resume=True)
    run(folder=tmp_path, resume=True, overwrite=True)


def test_only_the_last_two_states_are_kept(tmp_path, monkeypatch):
    settings = RetrainSettings(**{**vars(SETTINGS), "epochs": 6})
    with stopped(monkeypatch, 6):
        run(settings, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.glob("state*")) == ["state_0_2_epoch_4.pt", "state_0_2_epoch_5.pt"]


def test_states_are_not_written_more_often_than_asked(tmp_path, monkeypatch):
    with stopped(monkeypatch, 3):
        run(folder=tmp_path, save_seconds=1e9)
    assert not list(tmp_path.glob("state*"))


def test_a_chunk_that_could_not_be_measured_is_not_trained_again(tmp_path, monkeypatch):
    def fail(ensemble, numbers):
        raise StoppedError

    with pytest.raises(StoppedError):
        run(folder=tmp_path, save_seconds=1e9, measure=fail, chunk=10)
    with untrained(monkeypatch):
        found = run(folder=tmp_path, resume=True, chunk=10)
    assert np.array_equal(found["logits"], run(chunk=10)["logits"])


@pytest.mark.parametrize("vectorised", [True, False])
def test_a_loss_that_is_not_finite_says_what_to_change(vectorised):
    settings = RetrainSettings(**{**vars(SETTINGS), "learning_rate": 1e200, "lr_min": 0.0})
    with pytest.raises(
        TrainingError, match=r"epoch \d of retraining network 1 of 5; a smaller --lr_retrain may.*1e\+200"
    ):
        run(settings, vectorised=vectorised)


def test_images_may_be_in_a_cut_out_layout():
    base, images, labels = material()
    wide = torch.zeros(N, 1, SIZE, SIZE + 2, dtype=torch.float64)
    wide[..., :SIZE] = images
    found = retrain(base, wide[..., :SIZE], labels, REMOVED, SETTINGS, measure=logits_of(images), chunk=2)
    assert np.array_equal(found["logits"], run()["logits"])


@pytest.mark.parametrize(
    "change",
    [
        {"chunk": 0},
        {"removed": []},
        {"removed": [range(N)]},
        {"deltas": [1.0]},
        {"permutation": lambda epoch: torch.arange(N - 1)},
        {"permutation": lambda epoch: torch.zeros(N, dtype=torch.int64)},
        {"settings": RetrainSettings(**{**vars(SETTINGS), "epochs": 0})},
        {"settings": RetrainSettings(**{**vars(SETTINGS), "shuffle": "none"})},
        {"settings": RetrainSettings(**{**vars(SETTINGS), "shuffle": "replay"})},
        {"settings": RetrainSettings(**{**vars(SETTINGS), "optimizer": "sam"})},
    ],
)
def test_bad_arguments_are_refused(change):
    with pytest.raises(ValueError, match=r"."):
        run(**change)
