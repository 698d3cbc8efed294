"""Scores that assume a model has learned its examples: warnings where it has not; never-learned examples in etl."""

import json
import re

import numpy as np
import pytest
from refusals import FILE, refuse
from support import TRAIN, folders, succeed, write_blobs

from src.artifacts.store import record_path
from src.datasets import load_dataset
from src.metrics import SCORES, Proxy
from src.metrics.score import LEARNED
from src.training import read_dynamics

EPOCHS, SEEDS = 4, (1, 2)
ASSUMING = [name for name, score in SCORES.items() if score.assumes_learned]


class Runs:
    """Two seeds of one setting, averaged."""

    def __init__(self, base, rate):
        data = write_blobs(base / "blobs.npz", n=60)
        self.name = load_dataset(f"npz:{data}", base)[0].entry.name
        self.base, self.dataset = base, f"--dataset=npz:{data}"
        self.trained = [
            succeed("train_full.py", self.dataset, "--model=small_mlp", f"--epochs={EPOCHS}", "--batch_size=16",
                    f"--learning_rate={rate}", "--lr_sched=const", "--optimizer=sgd", f"--seed={seed}",
                    "--measure_proxies", "--save_epochs=last", *folders(base, *TRAIN))
            for seed in SEEDS
        ]  # fmt: skip
        self.averaged = succeed(*self.average())
        run = base / "metrics" / f"standard_small_mlp_over_{self.name}_with_sgd_sched_const"
        self.folders = [run / f"seed_{seed}" for seed in SEEDS]
        self.correct = [read_dynamics(folder / "dynamics.npz")["correct"] for folder in self.folders]
        self.accuracies = [float(correct[-1].mean()) for correct in self.correct]

    def average(self, *flags):
        return ("average_scores.py", self.dataset, "--model=small_mlp", "--optimizer=sgd", "--seeds", *SEEDS, *flags,
                *folders(self.base, "datasets", "metrics"))  # fmt: skip


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("weak"), 0.0003)


@pytest.fixture(scope="module")
def strong(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("strong"), 0.1)


def warnings(result):
    return [line for line in result.err.splitlines() if "training accuracy of the last epoch" in line]


def test_the_scores_that_assume_learned_examples():
    assert {"forg", "dual", "dyn_unc", "tdds", "eps", "samis_loss", "samis_prob"} <= set(ASSUMING)
    assert not {"aum", "csl", "el2n", "etl", "mean_loss", "mem"} & set(ASSUMING)
    unsure, learned = np.full((12, 1), 0.1), np.linspace(0.1, 0.99, 12)[:, None]  # never learned, and learned slowly
    for name in ("dual", "dyn_unc"):
        low, high = (SCORES[name].from_dynamics({"probability": values}) for values in (unsure, learned))
        assert low < high, "a score that assumes learned examples is low for one that is never learned"
    never, late = np.zeros((4, 1)), np.array([[0.0], [1], [0], [1]])
    assert SCORES["forg"].from_dynamics({"correct": never}) < SCORES["forg"].from_dynamics({"correct": late})


def test_one_line_where_such_scores_are_written(weak, strong):
    assert max(weak.accuracies) < LEARNED < min(strong.accuracies)
    for result, accuracy in zip(weak.trained, weak.accuracies, strict=True):
        (line,) = warnings(result)
        assert f"{100 * accuracy:.1f} %" in line
        assert all(f" {name}," in line or f" {name} " in line for name in ASSUMING if SCORES[name].source != "pair")
    (line,) = warnings(weak.averaged)
    assert f"{100 * min(weak.accuracies):.1f} %" in line
    assert not any(warnings(result) for result in (*strong.trained, strong.averaged))
    assert warnings(succeed(*weak.average("--modes", "aum", "csl"))) == []


def test_samis_warns_if_the_models_it_compares_have_not_learned(weak, tmp_path):
    pair = (weak.dataset, "--model=small_mlp", f"--epochs={EPOCHS}")
    metrics = f"--metrics_folder={tmp_path}"
    succeed("train_full.py", *pair, "--batch_size=16", "--learning_rate=0.0003", "--lr_sched=const",
            "--optimizer=sam", "--seed=1", "--save_epochs=last", *folders(weak.base, *TRAIN))  # fmt: skip
    scored = succeed("compute_sam_sgd.py", *pair, "--seed=1", *folders(weak.base, "datasets", "models"), metrics)
    accuracy = float(re.search(r"SGD loss [\d.]+ accuracy ([\d.]+) %", scored.err + scored.out)[1])
    averaged = succeed("average_scores.py", weak.dataset, "--model=small_mlp", "--seeds", 1, metrics)
    (line,) = warnings(averaged)
    assert f"{accuracy:.1f} %" in line
    assert "samis_loss, samis_prob can" in line


def test_the_accuracy_is_in_both_records(weak):
    for mode in ("aum", "dual", "eps"):
        record = json.loads(record_path(SCORES[mode].path(weak.base / "metrics", weak.name)).read_text())
        assert record["training_accuracy"] == pytest.approx(weak.accuracies)
    for folder, accuracy in zip(weak.folders, weak.accuracies, strict=True):
        record = json.loads((folder / "end_of_training.json").read_text())
        assert record["training_accuracy"] == pytest.approx(accuracy)


def test_a_warning_where_such_scores_are_used(weak, strong, tmp_path):
    for runs, expected in ((weak, 1), (strong, 0)):
        data = (runs.dataset, f"--metrics_folder={runs.base / 'metrics'}")
        figures = (*data, f"--plots_folder={tmp_path}", "--modes", "dual", "aum")
        prune = (*data, "--model=small_mlp", "--coreset_fraction=0.5", "--overwrite",
                 *folders(tmp_path, "models", "log", "resume_ckpts"))  # fmt: skip
        for command in (
            ("plot_images.py", *figures, "--only_overview", "--n=1"),
            ("plot_proxies.py", *figures),
            ("evaluate_scores.py", *figures, "--reference=csl", "--resamples=20"),
            ("select_coreset.py", *prune, "--coreset_func=min_dual"),
        ):
            found = warnings(succeed(*command))
            assert len(found) == expected, command
            assert all(f"dual_{runs.name}.pkl: " in line and " dual can " in line for line in found)
        assert warnings(succeed("select_coreset.py", *prune, "--coreset_func=min_aum")) == []


def test_a_warning_where_pretraining_did_not_learn(weak, tmp_path):
    flags = ("select_coreset.py", weak.dataset, "--model=small_mlp", "--coreset_fraction=0.5",
             "--coreset_pretrain_epochs=4", "--coreset_pretrain_lr=0.0001",
             *folders(tmp_path, *TRAIN))  # fmt: skip
    for func, expected in (("tdds", 1), ("dual", 1), ("aum", 0), ("forget", 0)):
        found = warnings(succeed(*flags, f"--coreset_func={func}"))
        assert len(found) == expected, func
        assert all("pre-training: the training" in line and f" {func} can " in line for line in found)


def test_examples_never_learned_rank_above_those_learned_last_on_request(weak, tmp_path):
    path = SCORES["etl"].path(weak.base / "metrics", weak.name)
    before = path.read_bytes()
    learned = np.stack([np.where(c == 0, np.arange(1, EPOCHS + 1)[:, None], 0).max(axis=0) + 1 for c in weak.correct])
    never = np.stack([c[-1] == 0 for c in weak.correct])
    assert never.any(axis=0).any()
    published = np.where(never.any(axis=0), 1, (learned / EPOCHS).mean(axis=0))  # never in one seed: 1
    np.testing.assert_allclose(Proxy("etl", weak.name, False, weak.base / "metrics").scores, published)
    etl = weak.average("--modes", "etl", "--etl_never_learned=after_last")
    refuse(*etl, status=FILE, says=r"etl_never_learned \(last vs. after_last\)")
    succeed(*etl, "--overwrite")
    proxy = Proxy("etl", weak.name, False, weak.base / "metrics")
    np.testing.assert_allclose(proxy.scores, (np.where(never, EPOCHS + 1, learned) / EPOCHS).mean(axis=0))
    assert proxy.record["etl_never_learned"] == "after_last"
    succeed(*weak.average("--modes", "etl", "--overwrite"))
    assert path.read_bytes() == before
    record = json.loads(record_path(path).read_text())
    del record["etl_never_learned"]  # as in files of older versions
    record_path(path).write_text(json.dumps(record))
    succeed(*weak.average("--modes", "etl"))
    refuse(*weak.average("--modes", "aum", "--etl_never_learned=after_last"), status=2, says="without etl")
