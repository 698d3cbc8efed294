"""Shared code of the experiments that can be tested without a run: images and incremental result files."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mpe.config import ExperimentConfig
from mpe.experiment import Experiment, Result
from mpe.posterior import laplace_posterior
from src.artifacts.io import read_pickle, write_pickle
from src.artifacts.paths import Folders
from src.datasets import DataConfig
from src.devices import ComputeConfig
from src.errors import FileError
from src.jacobians import OutputVariances


def test_prepared_images_are_held_once():
    """No batch outlives the next; concatenating parts would need twice the memory."""
    parts = [torch.randn(size, 1, 3, 3, dtype=torch.float64) for size in (4, 4, 1)]
    alive: list[weakref.ref] = []

    class Tracked:
        def __iter__(self):
            for part in parts:
                copy = part.clone()
                alive.append(weakref.ref(copy))
                yield SimpleNamespace(images=copy)
                del copy
                assert sum(held() is not None for held in alive) <= 1

    found = Experiment.prepared(SimpleNamespace(batches=lambda images, size: Tracked()), range(9))
    assert torch.equal(found, torch.cat(parts))
    assert found.dtype == torch.float64


ARGS, SETTINGS = {"delta": 1.0, "device": "cpu"}, {"delta": 1.0, "labels": "ab", "steps": [1, 2]}


def result(path, settings=SETTINGS, *, resume=False, overwrite=False):
    return Result(path, ARGS, settings, resume=resume, overwrite=overwrite)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "t_iter.pkl"


def test_what_is_written_can_be_gone_on_from(path):
    assert result(path, resume=True).stored == {}
    assert not path.exists()
    assert result(path).write(values=np.arange(3.0), count=2) == path
    found = read_pickle(path)
    assert found.keys() == {"values", "count", "args", "settings"}
    assert (found["args"], found["settings"], found["count"]) == (ARGS, SETTINGS, 2)
    np.testing.assert_array_equal(result(path, resume=True).stored["values"], np.arange(3.0))
    assert result(path).stored == {}  # a start from scratch
    assert "values" in read_pickle(path)  # which keeps the file until there is a new result
    result(path).write(count=3)
    assert read_pickle(path).keys() == {"count", "args", "settings"}


@pytest.mark.parametrize("resume", [False, True])
def test_results_of_other_settings_are_refused_or_replaced(path, resume):
    result(path).write(count=2)
    other = {**SETTINGS, "delta": 2.0}
    with pytest.raises(FileError, match=r"t_iter\.pkl: .*delta \(1\.0 vs. 2\.0\).*--overwrite"):
        result(path, other, resume=resume)
    with pytest.raises(FileError, match=r"more \(None vs. 1\)"):
        result(path, {**SETTINGS, "more": 1}, resume=resume)
    replaced = result(path, other, resume=resume, overwrite=True)
    assert replaced.stored == {}
    replaced.write(count=5)
    assert read_pickle(path)["settings"] == other


def test_overwrite_does_not_throw_away_what_is_of_the_same_settings(path):
    result(path).write(count=2)
    assert result(path, resume=True, overwrite=True).stored["count"] == 2
    assert result(path, {**SETTINGS, "steps": (1, 2)}, resume=True).stored["count"] == 2  # as in JSON


@pytest.mark.parametrize("content", [{"count": 1}, [1, 2], {"settings": "none"}])
@pytest.mark.parametrize("resume", [False, True])
def test_a_file_of_unknown_settings_is_refused_or_replaced(path, content, resume):
    write_pickle(path, content)
    with pytest.raises(FileError, match=r"t_iter\.pkl: does not record the settings.*--overwrite"):
        result(path, resume=resume)
    assert result(path, resume=resume, overwrite=True).stored == {}


def test_a_damaged_file_is_refused_or_replaced(path):
    result(path).write(count=2)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FileError, match=r"t_iter\.pkl"):
        result(path, resume=True)
    assert result(path, resume=True, overwrite=True).stored == {}


@pytest.mark.parametrize(("name", "last"), [("cnn_deepobs", True), ("lenet", True), ("resnet20_frn", False)])
def test_model_and_images_have_the_layout_that_trains_faster(name, last, tmp_path):
    flags = dict.fromkeys(("datasets_folder", "models_folder", "log_folder", "resume_ckpts_folder"), tmp_path)
    config = ExperimentConfig(model=name, epochs=1, bs=32, var_version="diag", pickles_folder=tmp_path)
    draw = np.random.default_rng(0)
    arrays = {
        key: value
        for part, count in (("train", 40), ("test", 20))
        for key, value in (
            (f"x_{part}", draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)),
            (f"y_{part}", np.arange(count) % 10),
        )
    }
    np.savez(tmp_path / "cifar10.npz", **arrays)
    data = DataConfig(dataset="cifar10")
    experiment = Experiment(config, data, ComputeConfig(device="cpu"), Folders(**flags), "iter", {})
    images = experiment.prepared(experiment.train)
    batch = next(iter(experiment.batches(experiment.train, len(images)))).images
    assert torch.equal(images, batch)
    weight = next(p for p in experiment.model.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1)
    for value in (weight, images, batch):
        assert value.is_contiguous(memory_format=torch.channels_last) is last
        assert value.is_contiguous() is not last
    before = weight.clone()
    experiment.train_base()
    assert weight.is_contiguous(memory_format=torch.channels_last) is last
    assert not torch.equal(weight, before)
    posterior = laplace_posterior(experiment.model, [batch], 1.0, structure="diag")
    with OutputVariances(experiment.model, posterior) as engine:
        variances = engine(batch)[1]
    found = experiment.laplace(1.0)
    np.testing.assert_allclose(found.variances, variances, rtol=1e-4)
    assert (
        weight.is_contiguous(memory_format=torch.channels_last) is last
    )  # its optimizer's tensors have this memory format
