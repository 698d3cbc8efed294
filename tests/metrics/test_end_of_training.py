"""Files that a run with --measure_proxies writes, in the published formats."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import write_blobs

from src.artifacts.io import read_pickle
from src.datasets import Batches, Normalization, load_dataset
from src.metrics import dynamics
from src.metrics.dynamics import HISTORY_FILES, NOT_VISITED, RECORD_FILE, SEED_FILES, write_end_of_training_scores
from src.models import build_model

CHOSEN = [3, 8, 20, 41]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train, _ = load_dataset("digits", folder)
    model = build_model("mlp", 10, 1, 8, seed=0)
    correct = np.full((3, train.total), np.nan, np.float32)
    correct[:, CHOSEN] = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 1]]).T
    batches = Batches(
        train.subset(torch.tensor(CHOSEN)), 3, normalization=Normalization((0.3,), (0.4,)), device="cpu"
    )
    paths = write_end_of_training_scores(folder, model, batches, {"correct": correct})
    return folder, paths, correct, model


def test_every_file_of_the_format_is_there(written):
    folder, paths, _, _ = written
    assert {path.name for path in paths} == {*SEED_FILES.values(), RECORD_FILE, *HISTORY_FILES}
    assert all(path.parent == folder for path in paths)
    for name in SEED_FILES.values():
        content = pickle.loads((folder / name).read_bytes())
        assert list(content) == CHOSEN
        assert all(type(key) is int and type(value) is float for key, value in content.items())


def test_digests_are_recorded_in_the_order_of_earlier_versions(written):
    names = [SEED_FILES[mode] for mode in ("forg", "etl", "flat", "eps", "end_loss", "end_margin")]
    record = json.loads((written[0] / RECORD_FILE).read_text())
    assert list(record) == [*names, "training_accuracy"]
    assert record["training_accuracy"] == 0.75  # of the four examples of the subset


def test_values_are_raw_counts_and_measured_flatness(written):
    folder, _, _, _ = written
    scores = {mode: list(read_pickle(folder / name).values()) for mode, name in SEED_FILES.items()}
    assert scores["forg"] == [0, 1, 1, 0]
    np.testing.assert_array_equal(scores["etl"], [1, 3, np.nan, 3])
    for mode in ("flat", "eps", "end_loss", "end_margin"):
        assert np.isfinite(scores[mode]).all()
        assert len(set(scores[mode])) == 4


def test_end_loss_and_margin_against_one_image_at_a_time(written, tmp_path):
    folder, _, _, model = written
    train, _ = load_dataset("digits", tmp_path)
    for i in CHOSEN:
        image = (train.fetch(torch.tensor([i])).double() / 255 - 0.3) / 0.4
        with torch.no_grad():
            logits = model.double()(image)[0]
        model.float()
        label = int(train.labels[i])
        others = [float(z) for c, z in enumerate(logits) if c != label]
        loss, margin = (read_pickle(folder / SEED_FILES[name])[i] for name in ("end_loss", "end_margin"))
        assert loss == pytest.approx(float(logits.exp().sum().log() - logits[label]), rel=1e-4)
        assert margin == pytest.approx(float(logits[label]) - max(others), rel=1e-4, abs=1e-5)


def test_end_scores_average_the_mirror_image_where_training_flips(tmp_path):
    train, _ = load_dataset(f"npz:{write_blobs(tmp_path / 'blobs.npz')}", tmp_path)
    entry = train.entry
    assert entry.augmentation.flip
    model = build_model("mlp", entry.num_classes, entry.channels, entry.image_size, seed=0).double().eval()
    batches = Batches(train, 7, normalization=entry.normalizations["samis"], dtype=torch.float64)
    found = dynamics.end_outputs(model, batches)
    losses, margins = np.zeros((2, train.total)), np.zeros((2, train.total))
    for batch in batches:
        for view, images in enumerate((batch.images, torch.flip(batch.images, (3,)))):
            for index, label, z in zip(batch.indices, batch.labels, model(images).detach(), strict=True):
                losses[view, index] = z.exp().sum().log() - z[label]
                margins[view, index] = z[label] - max(v for c, v in enumerate(z) if c != label)
    assert np.abs(losses[0] - losses[1]).max() > 1e-3
    np.testing.assert_allclose(found["end_loss"], losses.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(found["end_margin"], margins.mean(axis=0), rtol=1e-9)


def test_only_the_requested_scores_are_measured(written, tmp_path):
    _, _, correct, model = written
    write_end_of_training_scores(tmp_path, model, None, {"correct": correct}, end_scores=())
    record = json.loads((tmp_path / RECORD_FILE).read_text())
    assert list(record) == [SEED_FILES["forg"], SEED_FILES["etl"], "training_accuracy"]


def test_histories_are_bytes_with_a_mark_for_not_visited(written):
    folder, _, correct, _ = written
    for name in HISTORY_FILES:
        history = read_pickle(folder / name)
        assert history.dtype == np.uint8
        assert history.shape == correct.shape
        np.testing.assert_array_equal(history[:, CHOSEN], correct[:, CHOSEN])
        assert (np.delete(history, CHOSEN, axis=1) == NOT_VISITED).all()


def test_scores_that_are_not_finite_are_named(written, tmp_path, monkeypatch, caplog):
    _, _, correct, model = written
    values = np.zeros(correct.shape[1])
    values[[8, 41]] = np.nan, np.inf
    found = dict.fromkeys(dynamics.EndConfig().end_scores, np.zeros_like(values)) | {"flat": values}
    measured = tuple(replace(s, compute=lambda *_, name=s.name, **__: found[name]) for s in dynamics.END_SCORES)
    monkeypatch.setattr(dynamics, "END_SCORES", measured)
    correct = np.where(np.isnan(correct), np.nan, 1)  # an accuracy that needs no warning
    write_end_of_training_scores(tmp_path, model, None, {"correct": correct})
    assert "input curvature is not finite for 2 examples (indices 8, 41)" in caplog.text
    assert len(caplog.records) == 1
