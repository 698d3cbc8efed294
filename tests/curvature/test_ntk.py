"""Kernels and velocities of groups: identities, ranges, groups, memory forecasts, and velocity files."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Forked
from torch.func import functional_call, jacrev

from src.artifacts.io import read_pickle
from src.curvature.config import NTK_CLASS_NAMES
from src.curvature.ntk import (
    NTK_CLASSES,
    add_groups,
    check_groups,
    forecast,
    lower_indices,
    ntk_kernel,
    relative_error,
    stored_groups,
    velocity,
)
from src.errors import ArgumentError, FileError
from src.models import build_model


def explicit_psi(net, images):
    """(m C, P): one row per example and class, class by class within an example."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    rows = []
    for image in images.split(1):
        jacobian = jacrev(lambda values, image=image: functional_call(net, values, (image,))[0])(parameters)
        rows.append(torch.cat([j.reshape(j.shape[0], -1) for j in jacobian.values()], dim=1))
    return torch.cat(rows)


def problem(name="lenet", m=5, size=28, channels=1, classes=4, seed=0):
    net = build_model(name, classes, channels, size, seed).double().eval()
    draw = torch.Generator().manual_seed(seed + 1)
    images = torch.randn(m, channels, size, size, generator=draw, dtype=torch.float64)
    return net, images, torch.arange(m) % classes


def test_rows_go_example_by_example_and_class_by_class():
    net, images, labels = problem()
    psi = explicit_psi(net, images)
    found = ntk_kernel(net, images, labels)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (psi @ psi.T).numpy(), rtol=1e-5, atol=1e-5)
    blocks = psi.view(5, 4, -1)
    summed, own = blocks.sum(1), blocks[torch.arange(5), labels]
    for classes, rows in (("sum_logits", summed), ("true_label", own)):
        np.testing.assert_allclose(ntk_kernel(net, images, labels, classes), (rows @ rows.T).numpy(), rtol=1e-5)


def test_kernels_are_positive_semidefinite_and_their_velocities_in_range():
    kernels = [ntk_kernel(*problem(seed=seed)).astype(np.float64) for seed in range(3)]
    for first in kernels:
        assert np.linalg.eigvalsh(first).min() > -1e-4 * np.linalg.norm(first, 2)
        for second in kernels:
            exact = 1 - (first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second)
            assert velocity(first, second) == pytest.approx(max(exact, 0), abs=1e-12)
            assert 0 <= velocity(first, second) <= 1


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 6), rank=st.integers(1, 6), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_velocity_of_any_kernels(n, rank, scale, seed):
    rng = np.random.default_rng(seed)
    a, b = (rows @ rows.T for rows in rng.normal(size=(2, n, rank)))
    assert velocity(a, a) == pytest.approx(0, abs=1e-12)
    assert velocity(a, scale * a) == pytest.approx(0, abs=1e-12)
    assert 0 <= velocity(a, b) <= 1
    assert velocity(a, b) == pytest.approx(velocity(b, a), abs=1e-12)
    assert velocity(scale * a, b) == pytest.approx(velocity(a, b), abs=1e-9)


def test_orthogonal_kernels_have_velocity_one():
    assert velocity(np.diag([1.0, 0.0]), np.diag([0.0, 1.0])) == 1.0


def test_velocities_that_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        velocity(np.eye(2), np.eye(3))
    for bad in (np.zeros((2, 2)), np.full((2, 2), np.nan), np.diag([np.inf, 1.0])):
        with pytest.raises(ValueError, match="zero or not finite"):
            velocity(np.eye(2), bad)


def test_every_choice_of_classes_has_its_quantities():
    assert tuple(NTK_CLASSES) == NTK_CLASS_NAMES


def test_groups_of_the_paper():
    assert lower_indices("cifar100", 50000, 50)[:5] == [0, 1000, 2500, 5000, 7500]
    assert lower_indices("cifar100", 50000, 50)[-1] == 49500
    assert len(lower_indices("cifar100", 50000, 50)) == 16
    assert lower_indices("cifar10", 50000, 50) == list(range(0, 50000, 2500))
    assert lower_indices("svhn", 73257, 50) == list(range(0, 73240, 3662))
    assert lower_indices("cifar100", 2000, 50) == list(range(0, 2000, 100))  # a subset
    assert lower_indices("digits", 1437, 50) == list(range(0, 1400, 71))[:20]
    assert lower_indices("digits", 10, 4) == list(range(7))
    assert lower_indices("digits", 3, 4) == []


def test_groups_that_are_not_whole():
    check_groups([0, 5], 5, 10)
    with pytest.raises(ArgumentError, match="m_samples 4"):
        check_groups([0], 4, 3)
    with pytest.raises(ArgumentError, match="lower_index 8"):
        check_groups([0, 8], 5, 10)


@pytest.mark.parametrize("projection_dim", [None, 64])
@pytest.mark.parametrize("classes", NTK_CLASSES)
def test_forecasts(classes, projection_dim):
    net, images, labels = problem(m=6)
    told = forecast(net, images, labels, 6, classes, projection_dim=projection_dim, memory_mb=64.0)
    rows = 6 * (4 if classes == "all" else 1)
    assert told.rows == len(ntk_kernel(net, images, labels, classes)) == rows
    assert told.psi_bytes == rows * sum(p.numel() for p in net.parameters()) * 8
    assert told.kernel_bytes == rows * rows * 8
    assert 0 < told.kept_bytes <= 64 * 2**20
    assert told.seconds > 0


def test_a_sketch_is_near_the_kernel():
    net, images, labels = problem()
    exact = ntk_kernel(net, images, labels)
    found = ntk_kernel(net, images, labels, projection_dim=20000)
    assert 0 < relative_error(exact, found) < 0.1
    assert relative_error(exact, exact) == 0


OLD, NEW = {"classes": "all"}, {"classes": "true_label"}


def group(velocity):
    return {"0": {"velocity": velocity}}


def test_velocities_that_are_replaced(tmp_path):
    path = tmp_path / "seed_1" / "vs.pkl"
    assert add_groups(path, OLD, group(0.1), False) == group(0.1)
    assert read_pickle(path) == {0: 0.1}
    for overwrite in (False, True):
        assert stored_groups(path, OLD, overwrite) == group(0.1)
    with pytest.raises(FileError, match="different settings: classes"):
        add_groups(path, NEW, group(0.2), False)
    assert add_groups(path, NEW, group(0.2), True) == group(0.2)
    path.unlink()  # the state after an interruption between the two files
    assert stored_groups(path, NEW, False) == group(0.2)
    with pytest.raises(FileError, match="different settings: classes"):
        stored_groups(path, OLD, False)
    add_groups(path, NEW, {}, False)
    path.with_suffix(".json").unlink()
    with pytest.raises(FileError, match=r"settings.*--overwrite"):
        stored_groups(path, NEW, False)
    for bad in (float("nan"), float("inf"), "fast", None, True, [0.5], [0.1, 0.2]):
        path.with_suffix(".json").write_text(json.dumps({"settings": NEW, "groups": group(bad)}))
        with pytest.raises(FileError, match=r"does not contain valid velocities.*--overwrite"):
            stored_groups(path, NEW, False)
        assert stored_groups(path, NEW, True) == {}


ADD = """
import sys, time
from pathlib import Path
from src.curvature.ntk import add_groups

path, first = Path(sys.argv[1]), int(sys.argv[2])
while not (path.parent / "now").exists():
    time.sleep(0.001)
for number in range(first, first + 40, 2):
    add_groups(path, {"classes": "all"}, {str(number): {"velocity": float(number)}}, False)
"""


def test_two_processes_lose_no_velocity_of_each_other(tmp_path):
    path = tmp_path / "vs.pkl"
    script = tmp_path / "add.py"
    script.write_text(ADD)
    processes = [Forked(script, path, first) for first in (0, 1)]
    (tmp_path / "now").touch()
    assert [process.result().status for process in processes] == [0, 0]
    assert read_pickle(path) == {number: float(number) for number in range(40)}
