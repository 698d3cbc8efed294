"""Interrupted retraining is bit-identical and repeats no work; damaged and foreign files are refused."""

import json
import logging
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from small_retraining import CLASSES, REMOVED, SETTINGS, SIZE, run
from torch import nn

from mpe.retraining import RetrainSettings
from src.artifacts.io import read_npz, write_npz
from src.errors import FileError
from src.models import build_model
from src.optimizers import rate


class StoppedError(Exception):
    pass


@contextmanager
def stopped(monkeypatch, at):
    """Expect a run to stop at its ``at``-th epoch, counted over all chunks."""
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
    """Make a run fail if it trains at all."""
    with monkeypatch.context() as patch:
        patch.setattr("mpe.retraining.rate", None)
        yield


class Noisy(nn.Module):
    """A model with dropout and BatchNorm, which can only be trained sequentially."""

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
    torch.manual_seed(1000 + at)  # earlier random draws of the process must not matter
    with stopped(monkeypatch, at):
        run(settings, folder=tmp_path, **more)
    torch.manual_seed(2000 + at)
    calls = []
    resumed = run(
        settings,
        folder=tmp_path,
        resume=True,
        after_chunk=lambda rows: calls.append(len(rows["number"])),
        **more,
    )
    assert np.array_equal(whole["logits"], resumed["logits"])
    assert calls == [2, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "claim.lock", "networks_0_2.npz", "networks_2_4.npz", "settings.json",
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
    found = run(folder=tmp_path, resume=True, chunk=3, after_chunk=lambda rows: seen.append(len(rows["number"])))
    np.testing.assert_allclose(found["logits"], whole["logits"], rtol=0, atol=1e-12)
    assert seen == [2, 5]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other ensemble", "no ensemble", "settings"])
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
        if damage == "other ensemble":
            del state["ensemble"]["moments"]
        elif damage == "settings":
            state["settings"] = "text"
        else:
            state["ensemble"] = "text"
        torch.save(state, newest)
    with caplog.at_level(logging.WARNING):
        found = run(folder=tmp_path, resume=True)
    assert np.array_equal(whole["logits"], found["logits"])
    lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 1
    assert str(newest) in lines[0]
    assert "using the previous state" in lines[0]


def test_a_damaged_chunk_is_retrained(tmp_path, caplog):
    whole = run(folder=tmp_path)
    path = tmp_path / "networks_2_4.npz"
    path.write_bytes(path.read_bytes()[:50])
    with caplog.at_level(logging.WARNING):
        found = run(folder=tmp_path, resume=True)
    assert np.array_equal(whole["logits"], found["logits"])
    assert any(str(path) in record.message for record in caplog.records if record.levelname == "WARNING")


@pytest.mark.parametrize("damage", [lambda a: a[0], lambda a: a[:1], lambda a: a[..., None], lambda a: a.astype(str)])
def test_a_chunk_of_other_arrays_is_retrained(tmp_path, caplog, damage):
    whole = run(folder=tmp_path)
    path = tmp_path / "networks_2_4.npz"
    write_npz(path, **{name: damage(values) for name, values in read_npz(path).items()})
    with caplog.at_level(logging.WARNING):
        found = run(folder=tmp_path, resume=True)
    assert np.array_equal(whole["logits"], found["logits"])
    assert any(str(path) in record.message for record in caplog.records if record.levelname == "WARNING")


def test_a_chunk_under_the_name_of_another_is_retrained(tmp_path, caplog):
    whole = run(folder=tmp_path)
    path = tmp_path / "networks_2_4.npz"
    path.write_bytes((tmp_path / "networks_0_2.npz").read_bytes())
    with caplog.at_level(logging.WARNING):
        found = run(folder=tmp_path, resume=True)
    assert np.array_equal(whole["logits"], found["logits"])
    assert any("networks_2_4.npz: its content does not match its name" in record.message for record in caplog.records)


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
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.glob("*.[!l]*"))
    change = {"settings": SETTINGS, "key": {"dataset": "mine"}, **change}
    with pytest.raises(FileError, match=rf"{tmp_path}/settings.json: was made with different settings: .*{word}"):
        run(folder=tmp_path, resume=resume, **change)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.glob("*.[!l]*")) == before
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


class EachMeasured:
    """Measures one model at a time, and fails at the ``stop``-th."""

    def __init__(self, stop=None):
        self.stop, self.seen = stop, []

    def __call__(self, weights, number):
        if len(self.seen) == self.stop:
            raise StoppedError
        self.seen.append(number)
        return {"number": number, "norm": sum(float(value.double().square().sum()) for value in weights.values())}


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_networks_are_measured_once_each_and_kept_as_they_come(tmp_path, monkeypatch, vectorised, stop):
    """Chunks of three and two models; the run stops inside a chunk, at its end, or inside the last one."""
    each = EachMeasured()
    more = {"measure": None, "chunk": 3, "vectorised": vectorised}
    whole = run(measure_each=each, **more)
    assert each.seen == whole["number"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(StoppedError):
        run(measure_each=EachMeasured(stop), folder=tmp_path, **more)
    assert len(list(tmp_path.glob("networks_*.npz"))) == stop
    rest, calls = EachMeasured(), []
    with untrained(monkeypatch) if stop == 4 else nullcontext():
        resumed = run(
            measure_each=rest,
            folder=tmp_path,
            resume=True,
            after_chunk=lambda rows: calls.append(rows["number"].tolist()),
            **more,
        )
    assert rest.seen == list(range(stop, 5))
    assert np.array_equal(whole["norm"], resumed["norm"])
    assert calls == [list(range(done)) for done in range(stop, 6)]
    assert not list(tmp_path.glob("state*"))


def test_a_chunk_whose_state_is_damaged_is_trained_again_and_measured_on(tmp_path):
    more = {"measure": None, "chunk": 5}
    whole = run(measure_each=EachMeasured(), **more)
    with pytest.raises(StoppedError):
        run(measure_each=EachMeasured(2), folder=tmp_path, **more)
    for state in tmp_path.glob("state*"):
        state.write_bytes(state.read_bytes()[:200])
    rest = EachMeasured()
    resumed = run(measure_each=rest, folder=tmp_path, resume=True, **more)
    assert rest.seen == [2, 3, 4]
    assert np.array_equal(whole["norm"], resumed["norm"])
