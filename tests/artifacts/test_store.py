"""The policy for results: which settings are equal, and which results are reused, refused, replaced or combined."""

import errno
import json
import os
import pickle
from dataclasses import asdict

import numpy as np
import pytest

from src.artifacts.store import (
    DEFAULTS,
    acting_settings,
    check_consistent,
    check_identity,
    checked_array,
    diff_settings,
    load_result,
    parse_settings,
    read_record,
    write_recorded,
)
from src.errors import FileError
from src.training import TrainingConfig


def test_defaults_are_those_of_training():
    training = asdict(TrainingConfig(epochs=1))
    for name in DEFAULTS.keys() & training.keys():
        assert DEFAULTS[name] == training[name], name


@pytest.mark.parametrize(
    ("older", "newer", "differing"),
    [
        ({}, {"nesterov": False}, []),
        ({}, {"nesterov": True}, ["nesterov (False vs. True)"]),
        ({}, {"initialization": "default"}, ["initialization (older version vs. default)"]),
        ({"initialization": "default"}, {"initialization": "default"}, []),
        ({}, {"decoding": "exif"}, ["decoding (None vs. exif)"]),
        ({}, {"images": "ab"}, []),
        ({"images": "cd"}, {"images": "ab"}, ["images (cd vs. ab)"]),
        ({"selection_images": "cd"}, {"selection_images": "ab"}, ["selection_images (cd vs. ab)"]),
        ({"optimizer": "sgd", "rho": 0.3, "hess_init": 0.2}, {"optimizer": "sgd"}, []),
        ({"optimizer": "sam", "rho": 0.3}, {"optimizer": "sam"}, ["rho (0.3 vs. 0.05)"]),
        ({"optimizer": "adam", "delta": 60}, {"optimizer": "adam"}, ["delta (60 vs. None)"]),
        ({"lr_sched": "const", "lr_min": 0.1}, {"lr_sched": "const"}, []),
        ({"lr_sched": "step", "lr_min": 0.1}, {"lr_sched": "step"}, ["lr_min (0.1 vs. 0.0)"]),
        ({"cutout_holes": 0, "cutout_length": 8}, {"cutout_holes": 0, "cutout_length": None}, []),
        ({"training_rho": 0.1}, {}, ["training_rho (0.1 vs. 0.05)"]),
        ({"training_hess_init": 0.3, "training_delta": None}, {}, []),
        ({"lr_sched": "const", "training_lr_min": 0.3}, {"lr_sched": "const"}, []),
        ({"training_epochs": 3}, {}, []),
        ({"training_epochs": 3}, {"training_epochs": 4}, ["training_epochs (3 vs. 4)"]),
        ({"settings": {"momentum": 0.9}}, {"settings": {}}, []),
        ({"optim_var": True, "var_version": "diag", "laplace_backend": "fast"}, {"optim_var": True}, []),
        ({"var_version": "diag"}, {"var_version": "kfac"}, ["var_version (diag vs. kfac)"]),
        ({"selection_dual_beta": False, "selection_dual_c": 3.0}, {"selection_dual_beta": False}, []),
        ({"trace_probes": 0, "trace_tolerance": 0.1}, {"trace_probes": 0}, []),
        ({}, {"selection_subsample": "exact", "selection_selection_subsample": "exact"}, []),
        ({}, {"selection_subsample": 0.05}, ["selection_subsample (exact vs. 0.05)"]),
        ({"training": {"lr": 1}}, {}, []),
        ({"settings": {"a": 1}}, {"settings": {"a": 2}}, ["settings a (1 vs. 2)"]),
    ],
)
def test_what_a_record_lacks_counts_as_its_default(older, newer, differing):
    assert diff_settings(older, newer) == differing
    assert len(diff_settings(newer, older)) == len(differing)


def test_values_are_compared_as_json():
    assert diff_settings({"a": [1], "b": 2}, {"a": (1,), "b": 3}) == ["b (2 vs. 3)"]
    assert diff_settings({"a": [1], "b": 2}, {"a": (1,), "b": 3}, ignore=["b"]) == []


def test_settings_without_an_effect_are_not_recorded():
    given = {"optimizer": "sgd", "rho": 0.3, "adaptive": True, "hess_init": 0.2, "lr_sched": "const", "lr_min": 0.1}
    assert acting_settings(given) == {"optimizer": "sgd", "lr_sched": "const"}
    assert acting_settings({**given, "optimizer": "sam", "lr_sched": "exp"}).keys() == given.keys() - {"hess_init"}


SETTINGS = {"epochs": 2, "seed": 1}


@pytest.fixture
def stored(tmp_path):
    """A result with its record."""
    path = tmp_path / "a.pkl"
    write_recorded(path, [1.5], {"settings": SETTINGS, "seconds": 3.0})
    return path


def test_a_result_of_the_same_settings_is_used_again(stored):
    assert load_result(stored, SETTINGS)["seconds"] == 3.0
    assert load_result(stored, SETTINGS, overwrite=True)["seconds"] == 3.0
    assert load_result(stored, {**SETTINGS, "epochs": 5}, ignore=["epochs"])["seconds"] == 3.0
    assert load_result(stored.with_name("b.pkl"), SETTINGS) is None


def _without_settings(path):
    path.with_suffix(".json").write_text("{}")


def _without_record(path):
    path.with_suffix(".json").unlink()


def _damaged(path):
    path.with_suffix(".json").write_text("{")


def _no_object(path):
    path.with_suffix(".json").write_text('{"settings": [1]}')


def _of_others(path):
    path.with_suffix(".json").write_text(json.dumps({"settings": {**SETTINGS, "epochs": 3}}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without_settings, "does not record"),
        (_without_record, "does not record"),
        (_damaged, "damaged"),
        (_no_object, "damaged"),
        (_of_others, r"epochs \(3 vs. 2\)"),
    ],
)
def test_any_other_result_is_replaced_only_on_demand(stored, change, says):
    change(stored)
    with pytest.raises(FileError, match=rf"a\..*{says}.*--overwrite"):
        load_result(stored, SETTINGS)
    assert load_result(stored, SETTINGS, overwrite=True) is None
    assert pickle.loads(stored.read_bytes()) == [1.5]  # nothing is removed before the new result exists


def test_results_that_are_combined_are_compared_each_with_each():
    files = [("a", {"seed": 1}), ("b", {"seed": 2, "images": "x"}), ("c", {"seed": 3, "images": "x"})]
    check_consistent(files, ignore=["seed"])
    with pytest.raises(FileError, match=r"^b: cannot be combined with a: seed \(1 vs. 2\)"):
        check_consistent(files)
    with pytest.raises(FileError, match=r"^d: .* b: images \(x vs. y\)"):  # a does not record its images
        check_consistent([*files, ("d", {"seed": 4, "images": "y"})], ignore=["seed"])


def test_a_copied_file_is_refused():
    check_identity("a", {"seed": 1}, seed=1, epoch=4)
    with pytest.raises(FileError, match=r"^a: .*seed \(1 vs. 2\).*copied"):
        check_identity("a", {"seed": 1}, seed=2, epoch=4)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "no array"),
        ([], "shape"),
        ([[1.0]], "shape"),
        ([1.0, 2.0, 3.0], "shape"),
        ([[1.0], [1.0, 2.0]], "dtype"),
        (["a", "b"], "dtype"),
        ([1.0, np.nan], "1 values that are not finite"),
    ],
)
def test_an_array_of_a_file_is_checked(value, says):
    content = {} if value is None else {"x": value}
    with pytest.raises(FileError, match=f"^a: .*{says}.*; recreate it"):
        checked_array("a", content, "x", length=2)


def test_an_array_of_a_file_is_returned():
    assert checked_array("a", {"x": [1, 2]}, "x", length=2).tolist() == [1, 2]
    assert np.isnan(checked_array("a", {"x": [1.0, np.nan]}, "x", finite=False)[1])
    with pytest.raises(FileError, match="dtype"):
        checked_array("a", {"x": [1, 2]}, "x", kinds="f")


@pytest.mark.parametrize("text", ["", "[]", "{", "1"])
def test_damaged_settings_are_named(text):
    with pytest.raises(FileError, match=r"^a: is damaged"):
        parse_settings("a", text)


def test_a_pickle_never_stands_beside_the_record_of_another(stored, monkeypatch):
    def names():
        found = {path.name: path.read_bytes() for path in stored.parent.iterdir() if path.suffix in (".pkl", ".json")}
        return pickle.loads(found["a.pkl"]) if "a.pkl" in found else None, json.loads(found["a.json"])["seconds"]

    seen = []

    def replace(source, target, real=os.replace):
        seen.append(names())
        real(source, target)
        seen.append(names())

    monkeypatch.setattr(os, "replace", replace)
    write_recorded(stored, [2.5], {"settings": SETTINGS, "seconds": 4.0})
    assert seen == [(None, 3.0), (None, 4.0), (None, 4.0), ([2.5], 4.0)]


@pytest.mark.parametrize("written", [0, 1])  # the disk fills up at the pickle or at the record
def test_a_full_disk_leaves_the_older_result(stored, monkeypatch, written):
    room = [True] * written

    def sync(descriptor, real=os.fsync):
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)
        room.pop()

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(FileError, match=r"a\.(pkl|json): could not be written"):
        write_recorded(stored, [2.5], {"settings": SETTINGS, "seconds": 4.0})
    assert pickle.loads(stored.read_bytes()) == [1.5]
    assert read_record(stored)["seconds"] == 3.0
