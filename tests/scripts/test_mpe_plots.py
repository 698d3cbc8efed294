"""The scripts that draw the experiments' results, on files as the experiments and their older versions write them."""

import pickle
import re
import shutil
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
from refusals import FILE, FLAG, RunsCode, check
from support import ROOT, call

from src.artifacts.io import read_pickle, write_pickle

OLD = Namespace(name_exp="old", model="lenet", delta=60)
E, N, C = 6, 250, 4
VALUES = np.linspace(0.9, 0.4, E)


def old_files():
    """Results in the format of the paper's scripts: lists of NumPy scalars; ``args`` is a Namespace or missing."""
    nlls = [np.float32(value) for value in VALUES]
    return {
        "iter": {
            "estimated_nll": list(VALUES[[0, 1, 4]]),
            "test_accs": [0.5] * E,
            "test_nlls": nlls,
            "epochs": np.array([1, 2, 5]),
            "args": OLD,
        },
        "cv": {
            "estimated_nll": list(VALUES),
            "deltas": np.logspace(0, 3, E),
            "test_accs": [0.9] * E,
            "test_nlls": nlls,
            "args": OLD,
        },
        "scores": {"sensitivities": np.linspace(0, 1, N)},
        "retrain": {"indices_retrain": np.array([7, 200, 100]), "softmax_deviations": np.array([0.1, 0.7, 0.5])},
        "evolving": {
            "sensitivity": np.random.default_rng(0).random((3, N)),
            "iterations_list": np.array([11, 1001, 5001]),
            "test_acc": 0.9,
            "test_nll": np.float32(0.3),
            "args": OLD,
        },
        "leaveclassout": {
            "org_acc": 0.9,
            "est_nll": np.linspace(0.1, 0.5, C),
            "perturb_nll": np.linspace(1, 2, C),
            "perturb_acc": np.full(C, 0.7),
        },
    }


SCRIPTS = {
    "plot_loo_iterations.py": ("iter", "old_iter"),
    "plot_loo_l2reg.py": ("cv", "old_cv"),
    "plot_validation_sensitivities.py": ("retrain", "old_validation"),
    "plot_evolving_sensitivities.py": ("evolving", "old_evolving"),
    "plot_loco.py": ("leaveclassout", "fmnist_leaveclassout"),
}


@pytest.fixture
def place(tmp_path):
    for kind, content in old_files().items():
        (tmp_path / f"old_{kind}.pkl").write_bytes(pickle.dumps(content, pickle.HIGHEST_PROTOCOL))
    return tmp_path


def flags(place, script, *more, name="old"):
    which = "--names_exp" if script == "plot_loco.py" else "--name_exp"
    return [which, name, "--pickles_folder", place, "--plots_folder", place / "plots", *more]


def draw(place, script, *more):
    result = call(f"examples/{script}", *flags(place, script, *more))
    assert result.status == 0, result.err
    return sorted(path.name for path in (place / "plots").iterdir()), result


def refused(place, script, status, *says, more=(), name="old"):
    line = check(call(f"examples/{script}", *flags(place, script, *more, name=name)), script, status, *says)
    assert not (place / "plots").exists()
    return line


def change(place, kind, name="old", **changes):
    """A copy of a file with some values replaced; None removes a value."""
    content = {**old_files()[kind], **changes}
    write_pickle(place / f"{name}_{kind}.pkl", {key: value for key, value in content.items() if value is not None})


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_draws_old_files(place, script, monkeypatch):
    path = [entry for entry in sys.path if entry != str(ROOT)]
    monkeypatch.setattr(sys, "path", path)
    monkeypatch.chdir(place)
    names, result = draw(place, script)
    stem = SCRIPTS[script][1]
    assert names == [f"{stem}.pdf", f"{stem}.png"]
    assert str(place / "plots" / f"{stem}.pdf") in result.out.splitlines()
    assert path[0] == str(ROOT)  # located relative to the script, not the working directory


@pytest.mark.parametrize(
    ("folder", "script"), [("examples", "plot_loco.py"), (".", "examples/plot_loo_iterations.py")]
)
def test_as_a_user_runs_them(place, folder, script):
    name = script.removeprefix("examples/")
    command = [sys.executable, script, *map(str, flags(place, name))]
    done = subprocess.run(command, cwd=ROOT / folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (place / "plots" / f"{SCRIPTS[name][1]}.pdf").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_file_names_the_script_that_makes_it(place, script):
    number = list(SCRIPTS).index(script) + 1
    refused(place, script, FILE, r"nope_\w+\.pkl: file not found", rf"examples/{number}_\w+\.py",
            rf"--name_exp nope --pickles_folder {place}", r"\(existing: old\)", name="nope")  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_files_that_are_no_results(place, script):
    path = place / f"old_{SCRIPTS[script][0]}.pkl"
    write_pickle(path, [1, 2])
    refused(place, script, FILE, f"{path}: is not a dictionary")
    path.write_bytes(pickle.dumps(RunsCode(place / "proof")))
    refused(place, script, FILE, "not plain data")
    assert not (place / "proof").exists()


@pytest.mark.parametrize(
    ("script", "changes", "says"),
    [
        ("plot_loo_iterations.py", {"test_nlls": None}, "has no array 'test_nlls'"),
        ("plot_loo_iterations.py", {"epochs": np.array([1, 2, 7])}, "'epochs' ranges from 1 to 7, expected 1 to 6"),
        ("plot_loo_iterations.py", {"epochs": np.array([1, 5, 2])}, "epochs are not ascending"),
        ("plot_loo_iterations.py", {"estimated_nll": [0.5]}, "lengths differ: 3 epochs, 1 estimates"),
        (
            "plot_loo_iterations.py",
            {"estimated_nll": [0.5, np.nan, 1.0]},
            "'estimated_nll' has 1 values that are not finite",
        ),
        ("plot_loo_l2reg.py", {"deltas": np.array([0.0, *np.ones(E - 1)])}, "deltas are not all positive"),
        ("plot_loo_l2reg.py", {"deltas": "many"}, "'deltas' has dtype .* expected numbers"),
        ("plot_loo_l2reg.py", {"test_nlls": [1.0]}, "lengths differ: .*1 test_nlls"),
        ("plot_validation_sensitivities.py", {"indices_retrain": np.array([1, 2, N])}, f"example {N} was left out"),
        ("plot_validation_sensitivities.py", {"indices_retrain": np.array([1, 2.5, 3])}, "not integers"),
        (
            "plot_validation_sensitivities.py",
            {"softmax_deviations": np.zeros((3, 4))},
            r"shape \(3, 4\), expected a 1-D",
        ),
        ("plot_evolving_sensitivities.py", {"sensitivity": np.zeros(N)}, r"shape \(250,\), expected a 2-D"),
        ("plot_evolving_sensitivities.py", {"sensitivity": np.zeros((0, N))}, r"shape \(0, 250\), expected a 2-D"),
        ("plot_evolving_sensitivities.py", {"iterations_list": np.array([11])}, "3 checkpoints, but 1 steps"),
        (
            "plot_evolving_sensitivities.py",
            {"sensitivity": -np.ones((3, N))},
            "from -1 to -1, expected 0 to inf",
        ),
        ("plot_loco.py", {"org_acc": 90.0}, "'org_acc' ranges from 90 to 90, expected 0 to 1"),
        ("plot_loco.py", {"perturb_nll": np.full(C, np.nan)}, "'perturb_nll' has no values yet"),
        ("plot_loco.py", {"est_nll": np.full(C, np.inf)}, "infinite"),
    ],
)
def test_results_that_cannot_be_drawn(place, script, changes, says):
    change(place, SCRIPTS[script][0], **changes)
    refused(place, script, FILE, rf"old_{SCRIPTS[script][0]}\.pkl: ", says, "recreate it with: python examples/")


def test_other_covariances_between_classes(place):
    script = "plot_loo_iterations.py"
    refused(
        place, script, FLAG, "--class_cov full: .*has no estimated_nll_full, only diag;", more=("--class_cov", "full")
    )
    change(place, "iter", estimated_nll_full=VALUES[:3], estimated_nll_diag=VALUES[1:4], args={"class_cov": "full"})
    refused(place, script, FLAG, "no estimated_nll_woodbury, only full and diag", more=("--class_cov", "woodbury"))
    names, _ = draw(place, script, "--class_cov", "diag", "full")
    assert names == ["old_iter_diag_full.pdf", "old_iter_diag_full.png"]


def test_windows_of_the_moving_average(place):
    script = "plot_loo_l2reg.py"
    refused(
        place, script, FLAG, f"--window 7: .*old_cv.pkl has only {E} deltas; give at most {E}", more=("--window", 7)
    )
    refused(place, script, FLAG, "--window: 0 is not an integer of at least 1", more=("--window", 0))
    _, result = draw(place, script, "--window", 1)
    assert result.out.count("0.4000 at delta 1000") == 2
    names, _ = draw(place, script, "--window", E, "--test_error")
    assert "old_cv_error.png" in names


def test_deviations_from_the_control(place):
    script = "plot_validation_sensitivities.py"
    refused(place, script, FLAG, "--corrected: .*has no softmax_deviations_corrected", more=("--corrected",))
    change(place, "retrain", softmax_deviations_corrected=np.array([0.5, 0.1, 0.7]))
    change(place, "scores", sensitivities_full=np.linspace(1, 0, N))
    assert "Spearman 1.000" in draw(place, script)[1].out
    assert "Spearman -0.500" in draw(place, script, "--corrected")[1].out
    names, result = draw(place, script, "--class_cov", "full", "--corrected")
    assert "Spearman 0.500" in result.out
    assert "old_validation_full_corrected.pdf" in names


def test_files_of_two_runs_are_not_drawn_together(place):
    script = "plot_validation_sensitivities.py"
    change(place, "scores", settings={"epochs": 9, "lr": 0.1})
    draw(place, script)  # an older file that does not record its settings
    shutil.rmtree(place / "plots")
    change(place, "retrain", settings={"epochs": 5, "lr": 0.1})
    files = f"{place}/old_retrain.pkl: belongs to a different run than {place}/old_scores.pkl: "
    says = r"epochs \(9 vs. 5\); run 3_validation_sensitivities.py .*--resume and --overwrite"
    refused(place, script, FILE, files + says)
    change(place, "retrain", settings={"lr": 0.1, "epochs": 9})
    draw(place, script)


def test_estimates_of_another_experiment(place):
    script = "plot_validation_sensitivities.py"
    indices, estimates = np.array([3, 7, 1]), np.zeros(N)
    change(place, "retrain", indices_retrain=indices)
    change(place, "scores", base_weights="a1")
    deviations = read_pickle(place / "old_retrain.pkl")["softmax_deviations"]
    estimates[indices] = np.argsort(np.argsort(-deviations))
    write_pickle(place / "other_scores.pkl", {"sensitivities": estimates, "base_weights": "a1"})
    names, result = draw(place, script, "--scores_exp=other")
    assert "Spearman -1.000" in result.out
    assert f"median of estimated / true {np.median(estimates[indices] / deviations):.3g} for the 3 true" in result.out
    assert "old_validation_other.pdf" in names
    shutil.rmtree(place / "plots")
    write_pickle(place / "other_scores.pkl", {"sensitivities": estimates, "base_weights": "b2"})
    for own in ("a1", None):  # None: an older file
        change(place, "scores", base_weights=own)
        refused(place, script, FLAG, "--scores_exp other: .* same base model", more=("--scores_exp=other",))


@pytest.mark.parametrize("empty", [[], np.empty(0, np.int64)])
@pytest.mark.parametrize("more", [(), ("--corrected",)])
def test_only_the_control_is_retrained(place, empty, more):
    change(place, "retrain", indices_retrain=empty, softmax_deviations=np.empty(0))
    refused(place, "plot_validation_sensitivities.py", FILE, r"old_retrain.pkl: no model has been retrained yet; "
            "run 3_validation_sensitivities.py .*--resume", more=more)  # fmt: skip


def test_correlations_are_told_apart_for_random_and_spread_examples(place, monkeypatch):
    script = "plot_validation_sensitivities.py"
    indices, deviations = np.array([10, 60, 110, 170, 200, 230]), np.array([0.1, 0.2, 0.3, 0.9, 0.8, 0.7])
    content = {"indices_retrain": indices, "softmax_deviations": deviations}
    change(place, "retrain", **content, spread=np.arange(6) >= 3)
    figures = pdf_figures(monkeypatch)
    lines = call(f"examples/{script}", *flags(place, script)).out.splitlines()[:3]
    estimated = read_pickle(place / "old_scores.pkl")["sensitivities"][indices[:3]]
    slope = deviations[:3] @ estimated / (deviations[:3] @ deviations[:3])
    which = "(no intervals for fewer than 10)"
    assert re.match(rf"n = 6 {re.escape(which)}, Spearman 0.771, Pearson 0.\d+, slope [\d.]+$", lines[0])
    assert lines[1] == f"random examples: n = 3 {which}, Spearman 1.000, Pearson 1.000, slope {slope:.3g}"
    assert lines[2].startswith(f"spread examples: n = 3 {which}, Spearman -1.000, Pearson -")
    assert figures[0].axes[0].texts[0].get_text().replace("\n", ", ") == lines[0]
    for same in (np.zeros(6, bool), np.ones(6, bool)):
        change(place, "retrain", **content, spread=same)
        assert "examples:" not in call(f"examples/{script}", *flags(place, script)).out
    for wrong, says in ((np.full(6, 2), "'spread' ranges from 2 to 2"), (np.zeros(5), "lengths differ: .*5 spread")):
        change(place, "retrain", **content, spread=wrong)
        refused(place, script, FILE, says)


def pdf_figures(monkeypatch):
    """Collect the figures that scripts save."""
    import mpe.plots

    figures = []
    monkeypatch.setattr(mpe.plots, "save_figure", lambda figure, stem: figures.append(figure) or [stem])
    return figures


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({}, ["Step 10", "Step 1,000", "Step 5,000"]),
        ({"steps": np.array([1, 2, 3])}, ["Step 1", "Step 2", "Step 3"]),
        ({"iterations_list": None}, ["First", "Second", "Third"]),
    ],
)
def test_checkpoints_are_called_by_their_steps(place, monkeypatch, changes, labels):
    change(place, "evolving", **changes)
    figures = pdf_figures(monkeypatch)
    assert (
        call("examples/plot_evolving_sensitivities.py", *flags(place, "plot_evolving_sensitivities.py")).status == 0
    )
    assert [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()] == labels


@pytest.mark.parametrize(
    ("models", "more", "labels"),
    [
        (("lenet", "small_mlp"), (), ["lenet", "small_mlp"]),
        (("lenet", "lenet"), (), ["one", "two"]),
        (("lenet", None), (), ["one", "two"]),
        (("lenet", "lenet"), ("--labels", "LeNet", "LeNet, again"), ["LeNet", "LeNet, again"]),
    ],
)
def test_experiments_are_called_by_their_networks_or_names(place, monkeypatch, models, more, labels):
    for name, model in zip(("one", "two"), models, strict=True):
        change(place, "leaveclassout", name, args=model and {"model": model})
    figures = pdf_figures(monkeypatch)
    result = call("examples/plot_loco.py", "--names_exp", "one", "two", "--pickles_folder", place, *more)
    assert result.status == 0, result.err
    assert [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()] == labels


def test_classes_without_results_are_left_out(place, monkeypatch):
    change(place, "leaveclassout", perturb_acc=np.array([0.7, np.nan, 0.7, np.nan]))
    figures = pdf_figures(monkeypatch)
    result = call("examples/plot_loco.py", *flags(place, "plot_loco.py"))
    assert "2 of 4 classes have results" in result.err
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["0", "2"]
    refused(place, "plot_loco.py", FLAG, "--labels: 2 labels for 1 experiments", more=("--labels", "a", "b"))


def test_show_without_a_display_says_so_and_does_not_wait(place):
    _, result = draw(place, "plot_evolving_sensitivities.py", "--show")
    assert "--show: no display found" in result.err
