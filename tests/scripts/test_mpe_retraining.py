"""Scripts 2, 3 and 5 of the sensitivity experiments, as users run them."""

import shutil

import numpy as np
import pytest
from mpe_runs import (
    CLASSES,
    KIND,
    L2REG,
    LOCO,
    SCRIPTS,
    VALIDATION,
    N,
    draw,
    finished,
    result,
    retraining,
    run,
    same,
)

from src.datasets import load_dataset


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of each script; tests copy the files that they change."""
    return finished(tmp_path_factory.mktemp)


@pytest.fixture
def copy_of(done, tmp_path):
    return lambda script: shutil.copytree(done[script][0], tmp_path / KIND[script])


def test_the_file_of_script_2(done):
    found = done[L2REG][1]
    np.testing.assert_array_equal(found["deltas"], np.logspace(-1, 3, 5))
    assert found["deltas"].dtype == np.float64
    assert [type(value) for value in found["estimated_nll"]] == [np.float64] * 5
    assert [type(value) for value in found["test_accs"]] == [float] * 5
    assert [type(value) for value in found["test_nlls"]] == [np.float32] * 5
    assert (found["args"]["model"], found["args"]["n_exp"]) == ("small_mlp", 5)
    np.testing.assert_array_equal(found["estimated_nll"], found["estimated_nll_diag"])
    assert (np.array(found["estimated_nll"]) > found["train_nll"]).all()
    assert np.ptp(found["test_nlls"]) > 0.05


def test_the_files_of_script_3(done):
    base, found = done[VALIDATION]
    scores = result(VALIDATION, base, "scores")
    assert scores["sensitivities"].shape == (N,)
    assert scores["sensitivities"].dtype == np.float64
    assert scores["args"]["name_exp"] == found["args"]["name_exp"] == "t"
    train = load_dataset("digits", base)[0]
    assert scores["labels"].tolist() == train.labels[scores["indices"]].tolist()

    positions = np.arange(N)
    np.random.seed(1)  # the legacy generator, as in the paper's code
    np.random.shuffle(positions)
    assert found["indices_retrain"].tolist() == positions[:4].tolist()
    assert found["indices_retrain"].dtype == np.int64
    assert found["softmax_deviations"].shape == (4,)
    assert found["softmax_deviations"].dtype == np.float64
    np.testing.assert_array_equal(found["indices_original"], scores["indices"][found["indices_retrain"]])
    assert not found["spread"].any()


def test_deviations_are_from_the_network_before_and_from_the_control(done):
    found = done[VALIDATION][1]
    moved = found["base_probabilities"] + found["probability_deviations"]
    assert moved.shape == (4, CLASSES)
    np.testing.assert_allclose(moved.sum(1), 1, rtol=1e-6)
    other = found["control_probabilities"] + found["probability_deviations_corrected"]
    np.testing.assert_allclose(other, moved, rtol=1e-12)
    for suffix in ("", "_corrected"):
        wanted = np.abs(found[f"probability_deviations{suffix}"]).sum(1)
        np.testing.assert_allclose(found[f"softmax_deviations{suffix}"], wanted, rtol=1e-12)


def test_the_file_of_script_5(done):
    found = done[LOCO][1]
    for name in ("est_nll", "perturb_nll", "perturb_acc"):
        assert found[name].shape == (CLASSES,)
        assert found[name].dtype == np.float64
        assert np.isfinite(found[name]).all()
    assert type(found["org_acc"]) is float
    assert (found["perturb_nll"] > found["control_nll"]).all()  # the model does not recognize a removed class
    assert found["perturb_nll"].std() > 1e-3


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_form_of_class_covariance(script, done, tmp_path):
    found = run(script, tmp_path, "--class_cov=woodbury")
    key = {L2REG: "estimated_nll", VALIDATION: "sensitivities", LOCO: "est_nll"}[script]
    stored, base = (found, done[script][1]) if script != VALIDATION else (
        result(VALIDATION, tmp_path, "scores"), result(VALIDATION, done[VALIDATION][0], "scores")
    )  # fmt: skip
    np.testing.assert_array_equal(stored[key], stored[f"{key}_woodbury"])
    np.testing.assert_allclose(stored[f"{key}_diag"], base[key], rtol=1e-5)
    assert np.abs(np.array(stored[f"{key}_full"]) / stored[f"{key}_diag"] - 1).max() > 0.01
    same_keys = {L2REG: "test_nlls", VALIDATION: "softmax_deviations", LOCO: "perturb_nll"}[script]
    np.testing.assert_array_equal(found[same_keys], done[script][1][same_keys])


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """Results of script 3 in float64, by shuffle."""

    def once(shuffle, *more):
        base = tmp_path_factory.mktemp(shuffle)
        return run(VALIDATION, base, "--precision=fp64", f"--retrain_shuffle={shuffle}", *more)

    return {shuffle: once(shuffle) for shuffle in ("seeded", "replay", "shared")}


def test_shuffles_differ(exact):
    found = [exact[shuffle]["softmax_deviations"] for shuffle in ("seeded", "replay", "shared")]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (np.abs(found[first] / found[second] - 1) > 1e-4).all()
    base = [exact[shuffle]["base_probabilities"] for shuffle in exact]
    np.testing.assert_array_equal(base[0], base[1])
    # models that share a shuffle differ only by the removed example
    noise = {shuffle: exact[shuffle]["softmax_deviations_corrected"].mean() for shuffle in exact}
    assert noise["shared"] < 0.5 * noise["seeded"]
    assert (
        noise["shared"] < 0.5 * exact["shared"]["softmax_deviations"].mean()
    )  # the remaining difference is the effect of more training


@pytest.mark.parametrize(
    ("shuffle", "more"),
    [
        ("seeded", ("--ensemble_size=1",)),
        ("seeded", ("--ensemble_size=50",)),
        ("replay", ("--ensemble_size=3",)),
        ("shared", ("--ensemble_size=50", "--ensemble=sequential")),
        ("seeded", ("--ensemble=sequential",)),
        ("replay", ("--ensemble=sequential", "--ensemble_size=50")),
    ],
)
def test_how_networks_are_grouped_and_trained_changes_roundings_alone(tmp_path, exact, shuffle, more):
    flag = f"--retrain_shuffle={shuffle}"
    same(exact[shuffle], run(VALIDATION, tmp_path, "--precision=fp64", flag, *more), rtol=1e-8)


def test_a_network_of_convolutions_vectorised_and_in_turn(tmp_path):
    more = ("--precision=fp64", "--model=lenet", "--subset=40", "--epochs_retrain=2", "--n_retrain=2")
    found = [run(VALIDATION, tmp_path / how, *more, f"--ensemble={how}") for how in ("vectorised", "sequential")]
    same(*found, rtol=1e-8)


def test_seeded_networks_do_not_depend_on_which_others_there_are(tmp_path, exact):
    found = run(VALIDATION, tmp_path, "--precision=fp64", "--n_retrain=2", "--ensemble_size=50")
    first = exact["seeded"]["probability_deviations"][:2]
    np.testing.assert_allclose(found["probability_deviations"], first, rtol=1e-8, atol=1e-12)


def test_another_size_of_ensemble_can_go_on(copy_of, done):
    base = copy_of(VALIDATION)
    for name in ("networks_2_4.npz", "networks_4_5.npz"):
        (retraining(base) / name).unlink()
    found = run(VALIDATION, base, "--resume", "--ensemble_size=50")
    same(done[VALIDATION][1], found, rtol=1e-4)


@pytest.mark.parametrize("drawn", [2, 0])
def test_examples_spread_over_the_range_of_the_estimates(tmp_path, drawn):
    found = run(VALIDATION, tmp_path, f"--n_retrain={drawn}", "--n_spread=3")
    scores = result(VALIDATION, tmp_path, "scores")["sensitivities"]
    assert found["spread"].tolist() == [False] * drawn + [True] * 3
    random, spread = np.split(found["indices_retrain"], [drawn])
    assert len({*random, *spread}) == drawn + 3
    free = np.setdiff1d(np.arange(N), random)
    top, middle, low = scores[spread]
    assert (top, low) == (scores[free].max(), scores[free].min())
    wanted = (scores.max() + scores.min()) / 2
    assert abs(middle - wanted) == np.abs(scores[free] - wanted).min()
    assert np.isfinite(found["softmax_deviations"]).all()


def test_every_example_can_be_left_out(tmp_path):
    more = ("--subset=12", "--n_retrain=12", "--epochs_retrain=1", "--epochs=1", "--ensemble_size=50")
    found = run(VALIDATION, tmp_path, *more)
    assert sorted(found["indices_retrain"]) == list(range(12))


def test_a_class_that_the_subset_lacks_is_left_open(tmp_path):
    labels = load_dataset("digits", tmp_path)[0].labels.numpy()
    chosen = np.concatenate([np.flatnonzero(labels == c)[:8] for c in (0, 3, 7)])
    (tmp_path / "chosen.txt").write_text("\n".join(map(str, chosen)))
    found = run(LOCO, tmp_path, f"--subset={tmp_path / 'chosen.txt'}")
    there = np.isin(np.arange(CLASSES), (0, 3, 7))
    for name in ("est_nll", "perturb_nll", "perturb_acc"):
        np.testing.assert_array_equal(np.isfinite(found[name]), there)
    draw(LOCO, tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_networks_with_batch_norm_are_trained_in_turn(script, tmp_path):
    more = {L2REG: ("--n_exp=2",), VALIDATION: ("--n_retrain=1",), LOCO: ()}[script]
    labels = load_dataset("digits", tmp_path)[0].labels.numpy()
    chosen = np.concatenate([np.flatnonzero(labels == c)[:8] for c in (1, 6)])
    (tmp_path / "chosen.txt").write_text("\n".join(map(str, chosen)))
    short = (f"--subset={tmp_path / 'chosen.txt'}", "--model=resnet8", "--epochs=1", "--bs=8")
    short += () if script == L2REG else ("--epochs_retrain=1",)
    found = run(script, tmp_path, *short, *more)
    key = {L2REG: "test_nlls", VALIDATION: "softmax_deviations", LOCO: "perturb_nll"}[script]
    values = np.array(found[key])
    assert np.isfinite(values).sum() == {L2REG: 2, VALIDATION: 1, LOCO: 2}[script]
    assert np.nanmin(values) > 0


@pytest.mark.parametrize(
    ("script", "more", "name"),
    [
        (L2REG, (), "t_cv"),
        (L2REG, ("--window=2", "--test_error"), "t_cv_error"),
        (VALIDATION, (), "t_validation"),
        (VALIDATION, ("--corrected",), "t_validation_corrected"),
        (LOCO, (), "t_leaveclassout"),
    ],
)
def test_the_results_can_be_drawn(script, more, name, copy_of):
    base = copy_of(script)
    draw(script, base, *more)
    assert sorted(path.name for path in (base / "plots").iterdir()) == [f"{name}.pdf", f"{name}.png"]
