"""Averaging over seeds: the published scaling, and files that cannot be combined."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from src.artifacts.io import label_hash, read_pickle, write_npz, write_pickle
from src.artifacts.paths import dynamics_folder, samis_path, split_experiment, standard_experiment
from src.artifacts.store import check_score_target, write_scores
from src.errors import ArgumentError, FileError
from src.metrics.average import AverageConfig, SeedScores, average, find_run, read_pair_seed, read_run_seed
from src.metrics.dynamics import SEED_FILES
from src.metrics.samis import save_seed

EPOCHS, TOTAL = 4, 6
FACTS = {"epoch": EPOCHS, "label_hash": "ab", "settings": {"learning_rate": 0.1}}


def seed(number, values, facts=FACTS, scored=None):
    values = np.asarray(values, dtype=np.float64)
    scored = np.ones(len(values), bool) if scored is None else np.asarray(scored)
    return SeedScores(number, values, scored, facts, Path(f"seed_{number}.npz"))


def test_the_mean_comes_before_the_scaling():
    scores, record = average("samis_loss", [seed(1, [0, 2, 10]), seed(2, [2, 0, 4])])
    np.testing.assert_allclose(scores, [0, 0, 1])  # means 1, 1, 7
    assert (record["raw_min"], record["raw_max"]) == (1, 7)
    assert record["seeds"] == [1, 2]
    assert record["label_hash"] == "ab"
    assert record["orientation"] == "high is atypical"


def test_forgetting_and_epochs_to_learn_are_shares_of_the_epochs():
    scores, _ = average("forg", [seed(1, [0, 1, 2]), seed(2, [0, 2, 2])])
    np.testing.assert_allclose(scores, [0, 0.375, 0.5])
    scores, _ = average("etl", [seed(1, [1, 2, np.nan]), seed(2, [1, 4, 3])])
    np.testing.assert_allclose(scores, [0.25, 0.75, 1.0])  # never learned in one seed: 1


def test_the_training_accuracy_of_each_seed_is_recorded_but_no_reason_to_refuse(tmp_path):
    seeds = [replace(seed(k, [1, 2, 3]), training_accuracy=value) for k, value in ((1, 0.5), (2, None))]
    _, record = average("dual", seeds)
    assert record["training_accuracy"] == [0.5, None]
    scores, old = average("dual", [seed(k, [1, 2, 3]) for k in (1, 2)])  # as before it was recorded
    assert "training_accuracy" not in old
    write_scores(tmp_path / "dual_toy.pkl", scores, old)
    check_score_target(tmp_path / "dual_toy.pkl", record)


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({**FACTS, "epoch": 5}, r"epoch \(4 vs. 5\)"),
        ({**FACTS, "protocol": "split"}, "protocol"),
        ({**FACTS, "label_hash": "cd"}, r"label_hash \(ab vs. cd\)"),
        ({**FACTS, "settings": {"learning_rate": 0.4}}, r"learning_rate \(0.1 vs. 0.4\)"),
    ],
)
def test_seeds_of_different_kinds_are_refused(facts, named):
    with pytest.raises(FileError, match=rf"seed_2.npz: cannot be averaged with seed_1.npz.*{named}"):
        average("csl", [seed(1, [1, 2, 3]), seed(2, [1, 2, 3], facts)])


def test_other_lengths_other_examples_and_nan_are_refused():
    with pytest.raises(FileError, match=r"seed_2.npz: .* seed_1.npz: .*examples \(3 vs. 2\)"):
        average("csl", [seed(1, [1, 2, 3]), seed(2, [1, 2])])
    with pytest.raises(FileError, match="subset"):  # the setting that differs, if one is recorded
        average("csl", [seed(1, [1, 2, 3]), seed(2, [1, 2], {**FACTS, "subset": 2})])
    with pytest.raises(FileError, match="scores different examples"):
        average("csl", [seed(1, [1, 2, 3]), seed(2, [1, 2, np.nan], scored=[True, True, False])])
    with pytest.raises(FileError, match=r"seed_2.npz: the csl score of example 1 is not finite"):
        average("csl", [seed(1, [1, 2, 3]), seed(2, [1, np.nan, 3])])


def test_examples_that_no_seed_scores_stay_without_a_score():
    scored = [True, False, True]
    for mode in ("csl", "etl"):
        scores, _ = average(mode, [seed(s, [1, np.nan, 3], scored=scored) for s in (1, 2)])
        np.testing.assert_array_equal(np.isnan(scores), [False, True, False])


def write_pair(folder, number, **changes):
    rng = np.random.default_rng(number)
    columns = {
        name: rng.random(TOTAL) for name in ("samis_loss", "samis_prob", "loss_sgd", "loss_sam", "correct_sgd")
    }
    settings = {"dataset": "toy", "model": "mlp", "seed": number, "epoch": 3, "protocol": "full", "lr_sched": "const"}
    save_seed(folder, columns, {**settings, **changes}, "ab")
    return columns


def test_pair_seeds_give_samis_and_the_plain_mean_loss(tmp_path):
    columns = [write_pair(tmp_path, number) for number in (1, 2)]
    modes = ("samis_loss", "samis_prob", "mean_loss")
    seeds = [read_pair_seed(modes, tmp_path, "toy", "mlp", number) for number in (1, 2)]
    raw = {
        "samis_loss": [c["samis_loss"] for c in columns],
        "samis_prob": [c["samis_prob"] for c in columns],
        "mean_loss": [(c["loss_sgd"] + c["loss_sam"]) / 2 for c in columns],
    }
    for mode in modes:
        mean = np.mean(raw[mode], axis=0)
        scores, record = average(mode, [one[mode] for one in seeds])
        np.testing.assert_allclose(scores, (mean - mean.min()) / np.ptp(mean))
        assert record["protocol"] == "full"
        assert "seed" not in record["settings"]
        assert record["settings"]["lr_sched"] == "const"


def test_a_file_of_the_papers_code_is_read_once_and_has_no_mean_loss(tmp_path, caplog):
    path = samis_path(tmp_path, "toy", "mlp", 1, "loss")
    write_npz(path, arr_0=np.arange(6.0))
    found = read_pair_seed(("samis_loss",), tmp_path, "toy", "mlp", 1)
    assert found["samis_loss"].values.tolist() == list(range(6))
    assert len(caplog.records) == 1
    with pytest.raises(FileError, match="which mean_loss needs"):
        read_pair_seed(("samis_loss", "mean_loss"), tmp_path, "toy", "mlp", 1)
    assert len(caplog.records) == 1  # no warning about a refused file


def test_a_seed_that_is_not_scored_is_named_with_its_command(tmp_path):
    write_pair(tmp_path, 1)
    with pytest.raises(
        FileError, match=r"seed 7 has not been scored yet; run compute_sam_sgd.py .*--model mlp --seed 7"
    ):
        read_pair_seed(("samis_loss",), tmp_path, "toy", "mlp", 7)


def test_pairs_of_other_schedules_are_not_mixed(tmp_path):
    write_pair(tmp_path, 1)
    write_pair(tmp_path, 2, lr_sched="step")
    seeds = [read_pair_seed(("samis_loss",), tmp_path, "toy", "mlp", number)["samis_loss"] for number in (1, 2)]
    with pytest.raises(FileError, match="lr_sched"):
        average("samis_loss", seeds)


def write_run(folder, experiment, number, correct=None, **settings):
    rng = np.random.default_rng(number)
    names = ("loss", "probability", "margin", "correct", "el2n", "divergence")
    arrays = {name: rng.random((EPOCHS, TOTAL)).astype(np.float32) for name in names}
    arrays["correct"] = (arrays["correct"] > 0.5).astype(np.float32) if correct is None else correct
    labels = np.arange(TOTAL) % 2
    place = dynamics_folder(folder, experiment, number)
    text = json.dumps({"seed": number, "learning_rate": 0.1, **settings})
    write_npz(place / "dynamics.npz", **arrays, labels=labels, label_hash=label_hash(labels), settings=text)
    visited = np.flatnonzero(~np.isnan(arrays["correct"]).all(axis=0)).tolist()
    for mode in ("flat", "eps"):
        write_pickle(place / SEED_FILES[mode], {i: float(rng.random()) for i in visited})
    return arrays


def test_run_seeds_give_every_recorded_score(tmp_path):
    name = standard_experiment("mlp", "toy", "sgd", "const")
    arrays = write_run(tmp_path, name, 1)
    seeds = read_run_seed(("aum", "csl", "flat", "tdds"), tmp_path, name, 1)
    np.testing.assert_allclose(seeds["aum"].values, -arrays["margin"].mean(0), rtol=1e-6)  # HIGH is atypical
    assert average("aum", [seeds["aum"]])[1]["negated"] is True
    flat = read_pickle(dynamics_folder(tmp_path, name, 1) / SEED_FILES["flat"])
    np.testing.assert_array_equal(seeds["flat"].values, list(flat.values()))
    assert seeds["csl"].facts["epoch"] == EPOCHS
    assert seeds["csl"].facts["settings"] == {"learning_rate": 0.1}


def test_a_run_on_a_subset_scores_what_it_visited(tmp_path):
    correct = np.ones((EPOCHS, TOTAL), dtype=np.float32)
    correct[:, 2] = np.nan
    write_run(tmp_path, "run", 1, correct)
    for mode, one in read_run_seed(("etl", "flat"), tmp_path, "run", 1).items():
        assert np.flatnonzero(~one.scored).tolist() == [2], mode


def test_damaged_end_of_training_files_are_named(tmp_path):
    write_run(tmp_path, "run", 1)
    path = dynamics_folder(tmp_path, "run", 1) / SEED_FILES["eps"]
    for content in ({TOTAL: 1.0}, [1.0], {"a": 1.0}, {}):
        write_pickle(path, content)
        with pytest.raises(FileError, match=r"epsilon_flat_train.pkl: .*--measure_proxies"):
            read_run_seed(("eps",), tmp_path, "run", 1)
    with pytest.raises(FileError, match="no recorded dynamics for seed 9"):
        read_run_seed(("eps",), tmp_path, "run", 9)


def test_the_run_is_found_or_the_matches_are_listed(tmp_path):
    sgd, sam = (standard_experiment("mlp", "toy", o, "const") for o in ("sgd", "sam"))
    split = split_experiment("mlp", "toy", "sgd", "step", 3)
    write_run(tmp_path, sgd, 1)
    (tmp_path / standard_experiment("mlp", "toy", "adam", "const")).mkdir()  # nothing recorded
    assert find_run(tmp_path, "toy", AverageConfig("mlp")) == sgd
    for name in (sam, split):
        write_run(tmp_path, name, 1)
    with pytest.raises(ArgumentError, match=rf"3 runs in .* match.*{split}.*{sam}.*{sgd}"):
        find_run(tmp_path, "toy", AverageConfig("mlp"))
    assert find_run(tmp_path, "toy", AverageConfig("mlp", optimizer="sam")) == sam
    assert find_run(tmp_path, "toy", AverageConfig("mlp", lr_sched="step")) == split
    assert find_run(tmp_path, "toy", AverageConfig("mlp", exp=sgd)) == sgd
    for wanted in ({"dataset": "other"}, {"optimizer": "adam"}, {"exp": "nothing"}):
        with pytest.raises(FileError, match=r"no recorded dynamics for .*--measure_proxies"):
            find_run(tmp_path, wanted.pop("dataset", "toy"), AverageConfig("mlp", **wanted))


def test_results_of_other_settings_are_not_replaced(tmp_path):
    path = tmp_path / "csl_toy.pkl"
    record = average("csl", [seed(1, [1, 2, 3])])[1]
    check_score_target(path, record)  # nothing there
    write_scores(path, np.array([0, 0.5, 1]), record)
    check_score_target(path, record)  # repeat
    with pytest.raises(FileError, match=r"seeds \(\[1\] vs. \[1, 2\]\); give --overwrite"):
        check_score_target(path, {**record, "seeds": [1, 2]})
    write_scores(path, np.array([0, 0.5, 1]), {**record, "unrecorded_seeds": [1]})
    with pytest.raises(FileError, match=r"unrecorded_seeds \(\[1\] vs. None\)"):
        check_score_target(path, record)
    check_score_target(path, record, only=record)
    path.with_suffix(".json").unlink()
    with pytest.raises(FileError, match="does not record"):
        check_score_target(path, record)


def test_the_windows_are_honoured_and_recorded(tmp_path):
    from support import TRAIN, folders, succeed, write_blobs

    from src.artifacts.io import read_json, read_pickle
    from src.training import read_dynamics

    data = f"--dataset=npz:{write_blobs(tmp_path / 'blobs.npz', n=60)}"
    succeed("train_full.py", data, "--model=mlp", "--epochs=5", "--measure_proxies", "--batch_size=20",
            "--learning_rate=0.01", *folders(tmp_path, *TRAIN))  # fmt: skip
    flags = ("average_scores.py", data, "--model=mlp", "--seeds", 1, *folders(tmp_path, "datasets", "metrics"))
    succeed(*flags, "--modes", "el2n", "dyn_unc", "--el2n_epochs", 2, 3, "--window", 4)
    (path,) = (tmp_path / "metrics").glob("*/seed_1/dynamics.npz")
    run = read_dynamics(path)
    (el2n,) = (tmp_path / "metrics" / "dynamics").glob("el2n_*.pkl")
    expected = run["el2n"][1:3].mean(axis=0, dtype=np.float64)
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(list(read_pickle(el2n).values()), expected, rtol=1e-6, atol=1e-9)
    assert read_json(el2n.with_suffix(".json"))["el2n_epochs"] == [2, 3]
    (unc,) = (tmp_path / "metrics" / "dynamics").glob("dyn_unc_*.pkl")
    p = run["probability"].astype(np.float64)
    expected = (p[:4].std(axis=0, ddof=1) + p[1:].std(axis=0, ddof=1)) / 2
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(list(read_pickle(unc).values()), expected, rtol=1e-6, atol=1e-9)
