"""Scripts 2, 3 and 5 interrupted and resumed, and refused input."""

import shutil

import numpy as np
import pytest
from mpe_runs import (
    CHUNKS,
    EPOCHS,
    KIND,
    L2REG,
    LOCO,
    SCRIPTS,
    VALIDATION,
    N,
    finished,
    flags,
    refuse,
    result,
    retraining,
    run,
    same,
)
from refusals import FILE, FLAG, assert_kept, snapshot
from support import call, succeed

import mpe.estimates
import mpe.retraining
from mpe.estimates import loo_losses
from mpe.experiment import Experiment
from mpe.retraining import RetrainingFiles, one_epoch
from src.artifacts.io import write_pickle
from src.datasets import load_dataset


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of each script; tests copy the files that they change."""
    return finished(tmp_path_factory.mktemp)


@pytest.fixture
def copy_of(done, tmp_path):
    return lambda script: shutil.copytree(done[script][0], tmp_path / KIND[script])


class Stop:
    """Interrupts the process after a number of epochs, like Ctrl-C; states are written after every epoch."""

    def __init__(self, monkeypatch, epochs):
        self.left = epochs
        monkeypatch.setattr(mpe.retraining, "one_epoch", self)
        monkeypatch.setattr(
            mpe.retraining, "RetrainingFiles", lambda folder, key, seconds: RetrainingFiles(folder, key, 0.0)
        )

    def __call__(self, *args):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return one_epoch(*args)


@pytest.mark.parametrize(
    ("script", "more", "rows"),
    [
        (L2REG, (), 2),
        (L2REG, ("--optimizer=adam", "--base_shuffle=epoch"), 2),
        (L2REG, ("--optimizer=adamw", "--ensemble=sequential"), 2),
        (VALIDATION, (), 1),
        (VALIDATION, ("--retrain_shuffle=replay", "--ensemble=sequential"), 1),
        (VALIDATION, ("--retrain_shuffle=shared", "--class_cov=full"), 1),
        (LOCO, (), 3),
        (LOCO, ("--model=lenet", "--subset=30", "--retrain_shuffle=replay"), 3),
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, script, more, rows):
    """The interruption, after the first epoch of the second of three chunks or of the model after ``rows``."""
    alone = "--ensemble=sequential" in more or "--model=lenet" in more  # chunks of one model
    chunks = rows + (script != L2REG) if alone else 1  # the control has no row
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    wanted = run(script, whole, *more)
    epochs = EPOCHS if script == L2REG else 3
    with monkeypatch.context() as patch:
        Stop(patch, chunks * epochs + 1)
        ended = call(script, *flags(script, broken, *more))
    assert ended.status == 130
    assert "run the same command again to continue (with --resume" in ended.complaint
    half = result(script, broken)  # completed results are saved
    key = {L2REG: "test_nlls", VALIDATION: "softmax_deviations", LOCO: "perturb_nll"}[script]
    np.testing.assert_array_equal(half[key][:rows], wanted[key][:rows])
    assert np.isfinite(half[key]).sum() == rows
    resumed = succeed(script, *flags(script, broken, *more, "--resume"))
    assert "models were retrained in an earlier run" in resumed.err
    assert f"continuing retraining after epoch 1 of {epochs}" in resumed.err
    same(wanted, result(script, broken))
    if script == VALIDATION:
        same(result(script, whole, "scores"), result(script, broken, "scores"))


def test_networks_measured_before_an_interruption_are_not_measured_again(tmp_path, done, monkeypatch):
    """Script 2, interrupted between the two models of its second chunk."""
    seen = []

    def measured(predictions, estimates):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(1)
        return loo_losses(predictions, estimates)

    with monkeypatch.context() as patch:
        patch.setattr(mpe, "loo_losses", measured)
        assert call(L2REG, *flags(L2REG, tmp_path)).status == 130
    half, wanted = result(L2REG, tmp_path), done[L2REG][1]
    np.testing.assert_array_equal(half["estimated_nll"], wanted["estimated_nll"][:3])
    seen.clear()
    with monkeypatch.context() as patch:
        patch.setattr(mpe, "loo_losses", measured)
        resumed = succeed(L2REG, *flags(L2REG, tmp_path, "--resume"))
    assert len(seen) == 2
    assert f"continuing retraining after epoch {EPOCHS} of {EPOCHS}" in resumed.err
    same(wanted, result(L2REG, tmp_path))


@pytest.mark.parametrize("other", [False, True], ids=["its own", "another network's"])
def test_estimates_of_before_are_kept(done, copy_of, monkeypatch, other):
    """Script 3, resumed after its estimates were written: the variances of these weights are already saved."""
    base = copy_of(VALIDATION)
    path = base / "pickles" / "t_scores.pkl"
    before = result(VALIDATION, base, "scores")
    if other:
        write_pickle(path, {**before, "base_weights": "0" * 16, "sensitivities": before["sensitivities"] + 1})
    passes = []
    laplace = Experiment.laplace

    def counted(experiment, *args, **kwargs):
        passes.append(experiment.count)
        return laplace(experiment, *args, **kwargs)

    monkeypatch.setattr(Experiment, "laplace", counted)
    written = path.stat().st_mtime_ns
    answer = succeed(VALIDATION, *flags(VALIDATION, base, "--resume"))
    assert passes == ([N] if other else [])
    assert ("reusing the estimates of an earlier run" in answer.err) is not other
    assert (path.stat().st_mtime_ns == written) is not other
    same(before, result(VALIDATION, base, "scores"))
    same(done[VALIDATION][1], result(VALIDATION, base))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_whose_last_networks_and_result_are_gone(script, done, copy_of):
    base = copy_of(script)
    chunks = sorted(path.name for path in retraining(base).glob("networks_*.npz"))
    assert len(chunks) == (5 if script == L2REG else 3)  # measured one by one, or chunk by chunk
    (retraining(base) / f"networks_{CHUNKS[script]}.npz").unlink()
    (base / "pickles" / f"t_{KIND[script]}.pkl").unlink()
    resumed = succeed(script, *flags(script, base, "--resume"))
    assert "models were retrained in an earlier run" in resumed.err
    assert "continuing retraining" not in resumed.err
    same(done[script][1], result(script, base))
    assert sorted(path.name for path in retraining(base).glob("networks_*.npz")) == chunks


@pytest.mark.parametrize("script", [VALIDATION, LOCO])
def test_a_run_interrupted_in_its_base_training(script, done, copy_of):
    base = copy_of(script)
    shutil.rmtree(retraining(base))
    shutil.rmtree(base / "pickles")
    next(base.glob(f"resume_ckpts/**/epoch={EPOCHS}.pth.tar")).unlink()
    resumed = succeed(script, *flags(script, base, "--resume"))
    assert f"continuing after epoch {EPOCHS - 1}" in resumed.err
    same(done[script][1], result(script, base))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_finished_run_is_not_trained_again(script, done, copy_of, monkeypatch):
    base = copy_of(script)
    Stop(monkeypatch, 0)
    succeed(script, *flags(script, base, "--resume"))
    same(done[script][1], result(script, base))
    assert call(script, *flags(script, base)).status == 130  # which happens without --resume


def test_networks_of_another_base_run_are_not_taken(copy_of):
    """The base run's states were removed, and it is retrained from scratch, under another name's weights."""
    base = copy_of(VALIDATION)
    settings = retraining(base) / "settings.json"
    text = settings.read_text()
    start = text.index('"base_weights": "') + len('"base_weights": "')
    settings.write_text(text[:start] + "0" * 16 + text[start + 16 :])
    refuse(FILE, VALIDATION, base, "--resume", says=("retraining/settings.json: ", "base_weights", "--overwrite"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_results_of_other_settings_are_kept_or_replaced(script, done, copy_of):
    base = copy_of(script)
    other = "--deltas_stop=2" if script == L2REG else "--lr_retrain=0.04"
    says = (
        rf"t_({KIND[script]}|scores)\.pkl",
        r"deltas_stop \(3\.0 vs. 2\.0\)|lr_retrain \(0\.05 vs. 0\.04\)",
    )
    before = snapshot(base)
    for more in ((), ("--resume",)):
        refuse(FILE, script, base, other, *more, says=(*says, "--overwrite"))
        assert_kept(before, base)
    found = run(script, base, other, "--overwrite")
    key = {L2REG: "deltas", VALIDATION: "softmax_deviations", LOCO: "perturb_nll"}[script]
    assert not np.array_equal(found[key], done[script][1][key])
    assert found["settings"] != done[script][1]["settings"]


def test_more_retrainings_can_use_the_base_run(copy_of, done):
    base = copy_of(VALIDATION)
    answer = succeed(VALIDATION, *flags(VALIDATION, base, "--n_retrain=6", "--overwrite", "--resume"))
    assert f"continuing after epoch {EPOCHS}" in answer.err
    found, before = result(VALIDATION, base), done[VALIDATION][1]
    assert len(found["softmax_deviations"]) == 6
    np.testing.assert_allclose(found["softmax_deviations"][:4], before["softmax_deviations"], rtol=1e-4)


TOGETHER = r"the sum must be 1 to 100"
CANNOT = {
    "nothing to leave out": (VALIDATION, ("--n_retrain=0",), ("--n_retrain 0", "--n_spread 0", TOGETHER)),
    "more than there are": (VALIDATION, ("--n_retrain=101",), ("--n_retrain 101", "100 training examples", TOGETHER)),
    "more in all": (VALIDATION, ("--n_retrain=60", "--n_spread=41"), ("--n_spread 41", "101 of 100", TOGETHER)),
    "a negative number": (VALIDATION, ("--n_spread=-1",), ("--n_spread", "-1 is not an integer of at least 0")),
    "a floor above the rate, 3": (
        VALIDATION,
        ("--lrmin_retrain=0.06",),
        ("--lrmin_retrain 0.06", "lr_retrain 0.05", "at most"),
    ),
    "a floor above the rate, 5": (
        LOCO,
        ("--lr_retrain=0.01",),
        ("--lrmin_retrain 0.02", "lr_retrain 0.01", "at most"),
    ),
    "a floor above the base rate": (LOCO, ("--lrmin=0.06",), ("--lrmin 0.06", "lr 0.05", "at most")),
    "an unknown shuffle": (LOCO, ("--retrain_shuffle=random",), ("--retrain_shuffle", "seeded", "replay", "shared")),
    "no networks side by side": (LOCO, ("--ensemble_size=0",), ("--ensemble_size", "at least 1")),
    "descending deltas": (L2REG, ("--deltas_stop=-2",), ("--deltas_stop -2", "--deltas_start -1", "at least")),
    "half an experiment": (L2REG, ("--n_exp=2.5",), ("--n_exp", "2.5 is not a whole number")),
    "no experiment": (L2REG, ("--n_exp=0",), ("--n_exp", "at least 1")),
    "no delta": (LOCO, ("--delta=0",), ("--delta", "above 0")),
    "an optimiser without a place here": (L2REG, ("--optimizer=iblr",), ("--optimizer", "sgd", "adam", "adamw")),
    **{
        f"an unknown network, {script}": (script, ("--model=lenet6",), ("--model", "lenet6", "lenet"))
        for script in SCRIPTS
    },
    **{
        f"batch norm vectorised, {script}": (
            script,
            ("--ensemble=vectorised", "--model=resnet8"),
            ("--ensemble vectorised", "running statistics", "model resnet8", "auto or sequential"),
        )
        for script in SCRIPTS
    },
}


@pytest.mark.parametrize("case", CANNOT)
def test_flags_that_cannot_be_followed_are_refused_before_training(case, tmp_path):
    script, more, says = CANNOT[case]
    refuse(FLAG, script, tmp_path, *more, says=says)
    assert not list(tmp_path.glob("models/**/*.pt"))
    assert not list(tmp_path.glob("pickles/*.pkl"))
    assert not list(tmp_path.glob("resume_ckpts/**/*"))


@pytest.mark.parametrize(("script", "examples"), [(LOCO, 9), (VALIDATION, 1)])
def test_examples_of_one_class_are_refused(script, examples, tmp_path):
    labels = load_dataset("digits", tmp_path)[0].labels.numpy()
    (tmp_path / "chosen.txt").write_text("\n".join(map(str, np.flatnonzero(labels == 4)[:examples])))
    more = ("--n_retrain=1",) if script == VALIDATION else ()
    says = (rf"--subset .*chosen\.txt: its {examples} training examples belong to one class", "two classes")
    refuse(FLAG, script, tmp_path, f"--subset={tmp_path / 'chosen.txt'}", *more, says=says)
    assert not list(tmp_path.glob("models/**/*.pt"))


def test_a_whole_number_may_be_written_with_a_point(tmp_path):
    assert len(run(L2REG, tmp_path, "--n_exp=3.0")["deltas"]) == 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_rate_at_which_training_diverges_is_named(script, tmp_path):
    flag = "--lr" if script == L2REG else "--lr_retrain"
    answer = call(script, *flags(script, tmp_path, f"{flag}=1e30"))
    assert answer.status == 1
    assert "try a lower learning rate (currently 1e+30)" in answer.complaint
