"""When two records are of the same settings."""

from dataclasses import asdict

import pytest

from src.artifacts import DEFAULTS, differences, without_idle
from src.training import TrainingConfig


def test_defaults_are_those_of_training():
    training = asdict(TrainingConfig(epochs=1))
    for name in DEFAULTS.keys() & training.keys():
        assert DEFAULTS[name] == training[name], name


@pytest.mark.parametrize(
    ("older", "newer", "differing"),
    [
        ({}, {"nesterov": False}, []),
        ({}, {"nesterov": True}, ["nesterov (False there, True here)"]),
        ({}, {"initialization": "default"}, ["initialization (older version there, default here)"]),
        ({"initialization": "default"}, {"initialization": "default"}, []),
        ({}, {"decoding": "exif"}, ["decoding (None there, exif here)"]),
        ({}, {"images": "ab"}, []),
        ({"images": "cd"}, {"images": "ab"}, ["images (cd there, ab here)"]),
        ({"selection_images": "cd"}, {"selection_images": "ab"}, ["selection_images (cd there, ab here)"]),
        ({"optimizer": "sgd", "rho": 0.3, "hess_init": 0.2}, {"optimizer": "sgd"}, []),
        ({"optimizer": "sam", "rho": 0.3}, {"optimizer": "sam"}, ["rho (0.3 there, 0.05 here)"]),
        ({"optimizer": "adam", "delta": 60}, {"optimizer": "adam"}, ["delta (60 there, None here)"]),
        ({"lr_sched": "const", "lr_min": 0.1}, {"lr_sched": "const"}, []),
        ({"lr_sched": "step", "lr_min": 0.1}, {"lr_sched": "step"}, ["lr_min (0.1 there, 0.0 here)"]),
        ({"cutout_holes": 0, "cutout_length": 8}, {"cutout_holes": 0, "cutout_length": None}, []),
        ({"training_rho": 0.1}, {}, ["training_rho (0.1 there, 0.05 here)"]),
        ({"training_hess_init": 0.3, "training_delta": None}, {}, []),
        ({"lr_sched": "const", "training_lr_min": 0.3}, {"lr_sched": "const"}, []),
        ({"training_epochs": 3}, {}, []),
        ({"training_epochs": 3}, {"training_epochs": 4}, ["training_epochs (3 there, 4 here)"]),
        ({"settings": {"momentum": 0.9}}, {"settings": {}}, []),
        ({"optim_var": True, "var_version": "diag", "laplace_backend": "fast"}, {"optim_var": True}, []),
        ({"var_version": "diag"}, {"var_version": "kfac"}, ["var_version (diag there, kfac here)"]),
        ({"selection_dual_beta": False, "selection_dual_c": 3.0}, {"selection_dual_beta": False}, []),
        ({"trace_probes": 0, "trace_tolerance": 0.1}, {"trace_probes": 0}, []),
        ({"training": {"lr": 1}}, {}, []),
        ({"settings": {"a": 1}}, {"settings": {"a": 2}}, ["a (1 there, 2 here)"]),
    ],
)
def test_what_a_record_lacks_counts_as_its_default(older, newer, differing):
    assert differences(older, newer) == differing
    assert len(differences(newer, older)) == len(differing)


def test_settings_without_an_effect_are_not_recorded():
    given = {"optimizer": "sgd", "rho": 0.3, "adaptive": True, "hess_init": 0.2, "lr_sched": "const", "lr_min": 0.1}
    assert without_idle(given) == {"optimizer": "sgd", "lr_sched": "const"}
    assert without_idle({**given, "optimizer": "sam", "lr_sched": "exp"}).keys() == given.keys() - {"hess_init"}
