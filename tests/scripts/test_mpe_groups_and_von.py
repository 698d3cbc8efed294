"""Removing groups (script 6) and variational online Newton (script 7), as users run them."""

import numpy as np
import pytest
from mpe_runs import same
from refusals import FILE, FLAG, refuse
from support import call, folders, succeed

from src.artifacts.io import read_checkpoint, read_pickle, write_checkpoint
from src.datasets import load_dataset

GROUPS, VON = "examples/6_group_removal.py", "examples/7_von_logistic.py"
FLAGS = {
    GROUPS: (
        "--classes", "3", "5", "--model=small_mlp", "--epochs=4", "--lr=0.05", "--lrmin=0.01", "--bs=24", "--delta=1",
        "--n_groups=3", "--group_size=5", "--epochs_retrain=3", "--lr_retrain=0.05", "--lrmin_retrain=0.02",
        "--ensemble_size=2",
    ),
    VON: (
        "--subset=150", "--bs=40", "--delta=0.1", "--updates=10", "--lr=0.05", "--lrmin=0.01", "--lr_precision=0.02"
    ),
}  # fmt: skip
KIND = {GROUPS: "group", VON: "von"}
PLOT = {GROUPS: "examples/plot_group_removal.py", VON: "examples/plot_von_logistic.py"}


def flags(script, base, *more):
    own = folders(base, "datasets", "models", "log", "resume_ckpts", "pickles")
    return ("--dataset=digits", "--name_exp=t", *FLAGS[script], *own, *more)


def run(script, base, *more):
    succeed(script, *flags(script, base, *more))
    return read_pickle(base / "pickles" / f"t_{KIND[script]}.pkl")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of each script."""
    bases = {script: tmp_path_factory.mktemp(kind) for script, kind in KIND.items()}
    return {script: (base, run(script, base)) for script, base in bases.items()}


def test_the_file_of_groups(done):
    base, found = done[GROUPS]
    labels = load_dataset("digits", base)[0].labels.numpy()
    assert found["groups"].shape == (3, 5)
    assert len(np.unique(found["groups"])) == 15
    assert set(labels[found["groups"]].ravel()) == {3, 5}
    np.random.seed(1)
    drawn = np.flatnonzero((labels == 3) | (labels == 5))[np.random.permutation(np.isin(labels, (3, 5)).sum())]
    assert found["groups"].ravel().tolist() == drawn[:15].tolist()
    for name in ("softmax_deviations", "softmax_deviations_corrected", "sensitivities_full", "sensitivities_diag"):
        assert found[name].shape == (3,)
        assert (found[name] > 0).all()
    assert found["test_acc"] > 0.9
    # the estimates have the sign of the error: without it, the model is less sure of a member's label
    wrong = np.where(labels[found["groups"]] == 5, -1, 1)
    assert (wrong * found["estimated_deviations_diag"] > 0).all()


@pytest.mark.parametrize("structure", ["diag", "ggn"])
def test_other_posteriors(structure, done, tmp_path):
    found, kfac = run(GROUPS, tmp_path, f"--var_version={structure}"), done[GROUPS][1]
    np.testing.assert_array_equal(found["softmax_deviations"], kfac["softmax_deviations"])
    assert (np.abs(found["sensitivities_full"] / kfac["sensitivities_full"] - 1) > 0.01).all()


def test_the_file_of_von(done):
    found = done[VON][1]
    assert found["steps"].tolist() == [1, 2, 10]  # 0.4 and 0.8 of an update are the first one
    assert found["sensitivity"].shape == (3, 150)
    np.testing.assert_array_equal(found["sensitivity"], found["sensitivity_diag"])
    assert found["test_accs"][-1] > 0.7 > found["test_accs"][0]
    assert np.isfinite(found["test_nlls"]).all()


def test_the_forms_of_von(done, tmp_path):
    found = run(VON, tmp_path, "--class_cov=woodbury", "--checkpoints", "10", "1", "--precision=fp64")
    assert found["steps"].tolist() == [1, 10]
    np.testing.assert_array_equal(found["sensitivity"], found["sensitivity_woodbury"])
    np.testing.assert_allclose(found["sensitivity_diag"], done[VON][1]["sensitivity"][[0, 2]], rtol=0.02, atol=1e-5)
    assert np.abs(found["sensitivity_full"] / found["sensitivity_diag"] - 1).max() > 0.01


@pytest.mark.parametrize("script", KIND)
def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(script, done):
    base, found = done[script]
    again = run(script, base, "--resume")
    same(found, again)
    refuse(script, *flags(script, base, "--delta=3"), status=FILE, says=(r"delta \(.* vs\. 3\.0\)", "--overwrite"))
    assert read_pickle(base / "pickles" / f"t_{KIND[script]}.pkl")["settings"]["delta"] != 3.0


def test_groups_continue(done, tmp_path):
    """The last chunk was not finished, and the base training is complete."""
    run(GROUPS, tmp_path)
    next(tmp_path.glob("resume_ckpts/**/networks_2_4.npz")).unlink()
    same(done[GROUPS][1], run(GROUPS, tmp_path, "--resume"))


@pytest.mark.parametrize("update", [2, 7])
def test_von_continues(update, done, tmp_path, monkeypatch):
    """A run that was killed between update 7 and the end."""
    from mpe import von

    steps = iter(range(1, 100))
    whole = von.Von.step

    def killed(self, *arguments):
        if next(steps) > update:
            raise KeyboardInterrupt
        whole(self, *arguments)

    monkeypatch.setattr(von.Von, "step", killed)
    seconds = iter(range(0, 10**6, 100))  # a state after every update
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    assert call(VON, *flags(VON, tmp_path)).status == 130
    monkeypatch.undo()
    (path,) = tmp_path.glob("resume_ckpts/**/von.pt")
    state = read_checkpoint(path)
    assert state["step"] == update
    write_checkpoint(path, {**state, "settings": {**state["settings"], "delta": 7.0}})
    refuse(VON, *flags(VON, tmp_path, "--resume"), status=FILE, says=(r"von\.pt: ", r"delta \(7\.0 vs\. 0\.1\)"))
    write_checkpoint(path, state)
    result = succeed(VON, *flags(VON, tmp_path, "--resume"))
    assert f"continuing after update {update} of 10" in result.err
    assert not path.exists()
    same(done[VON][1], read_pickle(tmp_path / "pickles" / "t_von.pkl"))


@pytest.mark.parametrize(
    ("script", "more", "says"),
    [
        (GROUPS, ("--classes", "3", "3"), "--classes 3 3: give two different classes"),
        (GROUPS, ("--classes", "3", "10"), "--classes 3 10: .*none of class 10"),
        (GROUPS, ("--n_groups=60",), "--n_groups 60 and --group_size 5: .*292 training examples"),
        (VON, ("--checkpoints", "4", "11"), "--checkpoints 11: the run has 10 updates"),
        (VON, ("--lrmin=1",), "--lrmin 1: is above the initial learning rate, --lr 0.05"),
    ],
)
def test_bad_flags(script, more, says, done):
    refuse(script, *flags(script, done[script][0], *more), status=FLAG, says=says)


@pytest.mark.parametrize(
    ("script", "more", "name"),
    [
        (GROUPS, (), "t_group"),
        (GROUPS, ("--corrected", "--forms", "full", "diag", "woodbury"), "t_group_corrected"),
        (VON, ("--class_cov=diag",), "t_von_diag"),
    ],
)
def test_the_results_can_be_drawn(script, more, name, done, tmp_path):
    where = (*folders(done[script][0], "pickles"), *folders(tmp_path, "plots"))
    out = succeed(PLOT[script], "--name_exp=t", *more, *where).out
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [f"{name}.pdf", f"{name}.png"]
    assert ("Spearman" if script == GROUPS else "update 10: test accuracy") in out
