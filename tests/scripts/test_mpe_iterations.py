"""Scripts 1 and 4 of the sensitivity experiments, as users run them."""

import sys

import numpy as np
import pytest
from support import ROOT, TRAIN, Forked, call, folders, succeed, write_blobs

from src.artifacts.io import read_pickle, write_pickle
from src.metrics import Proxy

LOO = "examples/1_loo_iterations.py"
EVOLVING = "examples/4_evolving_sensitivities.py"
SHORT = (
    "--dataset=digits",
    "--model=small_mlp",
    "--subset=150",
    "--bs=32",
    "--bs_jacs=100",
    "--delta=1",
    "--lr=0.05",
)
SMALL = (*SHORT, "--epochs=3", "--name_exp=t")
OWN = ("datasets", "models", "log", "resume_ckpts", "pickles")


def flags(base, *more):
    return (*SMALL, "--lrmin=0.001", *folders(base, *OWN), *more)


def same(first, second, skip=("args",)):
    assert first.keys() == second.keys()
    for name in first.keys() - set(skip):
        if isinstance(first[name], dict):
            assert first[name] == second[name], name
        else:
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_the_file_has_the_papers_keys_and_types(tmp_path):
    succeed(LOO, *flags(tmp_path))
    found = read_pickle(tmp_path / "pickles" / "t_iter.pkl")
    assert [type(value) for value in found["estimated_nll"]] == [np.float64] * 3
    assert found["epochs"].tolist() == [
        1,
        2,
        3,
    ]  # the last epoch is measured although it is not one of 1, 2, 5, 10, ...
    assert found["epochs"].dtype == np.int64
    assert [type(value) for value in found["test_accs"]] == [float] * 3
    assert [type(value) for value in found["test_nlls"]] == [np.float32] * 3
    assert found["args"]["model"] == "small_mlp"
    assert (np.array(found["estimated_nll"]) > found["train_nll"]).all()
    assert found["settings"]["examples"] == 150


@pytest.mark.parametrize(
    "optimizer",
    [
        ("--optimizer=iblr", "--optim_var"),
        ("--optimizer=adam", "--optim_var", "--class_cov=woodbury"),
        ("--optimizer=adamw", "--var_version=diag"),
        ("--optimizer=sgd", "--class_cov=full"),
        ("--optimizer=iblr", "--var_version=kfac", "--base_shuffle=epoch"),
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, optimizer):
    """A crash after epoch 3 was measured but before it was stored; epoch 2 was measured and stored."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeed(LOO, *flags(whole, *optimizer))
    succeed(LOO, *flags(broken, *optimizer))
    for state in broken.glob("resume_ckpts/**/epoch=3.pth.tar"):
        state.unlink()
    result = succeed(LOO, *flags(broken, *optimizer, "--resume"))
    assert "continuing after epoch 2" in result.err
    first, second = (read_pickle(base / "pickles" / "t_iter.pkl") for base in (whole, broken))
    same(first, second)
    if optimizer[-1] == "--class_cov=woodbury":
        assert {"estimated_nll_diag", "estimated_nll_full", "estimated_nll_woodbury", "unstable"} <= first.keys()
        np.testing.assert_array_equal(first["estimated_nll"], first["estimated_nll_woodbury"])


def test_iblr_needs_ivon_opt_only_for_its_own_backend(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ivon", None)
    train = ("--dataset=digits", "--subset=100", "--model=small_mlp", "--epochs=1", "--optimizer=iblr")
    succeed("train_full.py", *train, *folders(tmp_path, *TRAIN))
    succeed(LOO, *flags(tmp_path, "--optimizer=iblr", "--optim_var", "--write_scores", *folders(tmp_path, "metrics")))
    for script, given in (
        ("train_full.py", (*train, "--overwrite", *folders(tmp_path, *TRAIN))),
        (LOO, flags(tmp_path, "--optimizer=iblr", "--optim_var", "--overwrite")),
    ):
        result = call(script, *given, "--iblr_backend=ivon-opt")
        assert result.status == 2
        assert "--iblr_backend ivon-opt: " in result.complaint
        assert "pip install -r requirements-iblr.txt" in result.complaint


def test_the_two_backends_agree(tmp_path):
    found = []
    for backend in ("fast", "laplace-torch"):
        for structure in ("kfac", "diag"):
            more = (f"--laplace_backend={backend}", f"--var_version={structure}", "--class_cov=full")
            succeed(LOO, *flags(tmp_path / backend / structure, "--epochs=1", *more))
            found.append(read_pickle(tmp_path / backend / structure / "pickles" / "t_iter.pkl"))
    for form in ("diag", "full", "woodbury"):
        for ours, theirs in (found[0::2], found[1::2]):
            np.testing.assert_allclose(ours[f"estimated_nll_{form}"], theirs[f"estimated_nll_{form}"], rtol=1e-4)
    assert found[0]["estimated_nll"] != found[1]["estimated_nll"]  # kfac is not diag


def test_results_of_other_settings_are_kept(tmp_path):
    succeed(LOO, *flags(tmp_path))
    before = (tmp_path / "pickles" / "t_iter.pkl").read_bytes()
    result = call(LOO, *flags(tmp_path, "--delta=2"))
    assert result.status == 1
    assert "delta (1.0 vs. 2.0)" in result.complaint
    assert "--overwrite" in result.complaint
    assert (tmp_path / "pickles" / "t_iter.pkl").read_bytes() == before
    succeed(LOO, *flags(tmp_path, "--delta=2", "--overwrite"))
    assert read_pickle(tmp_path / "pickles" / "t_iter.pkl")["args"]["delta"] == 2.0


def test_an_estimate_that_is_gone_is_not_made_up(tmp_path):
    succeed(LOO, *flags(tmp_path))
    for state in tmp_path.glob("resume_ckpts/**/epoch=3.pth.tar"):
        state.unlink()
    (tmp_path / "pickles" / "t_iter.pkl").unlink()
    result = call(LOO, *flags(tmp_path, "--resume"))
    assert result.status == 1
    assert "t_iter.pkl: has no estimate of epoch 1" in result.complaint


def test_a_foreign_pickle_is_not_replaced(tmp_path):
    write_pickle(tmp_path / "pickles" / "t_iter.pkl", {"estimated_nll": [1.0]})
    result = call(LOO, *flags(tmp_path))
    assert result.status == 1
    assert "t_iter.pkl: does not record the settings" in result.complaint


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_variances_that_the_optimiser_does_not_have_are_refused_at_once(tmp_path, optimizer):
    result = call(LOO, *flags(tmp_path, "--optim_var", f"--optimizer={optimizer}"))
    assert result.status == 2
    assert f"--optim_var: the state of {optimizer} has no variances" in result.complaint
    assert not (tmp_path / "models").exists()


def test_a_floor_above_the_rate_is_refused(tmp_path):
    result = call(LOO, *flags(tmp_path, "--lrmin=1"))
    assert result.status == 2
    assert "--lrmin 1: is above the initial learning rate, --lr 0.05" in result.complaint


def test_scores_reach_the_other_paper(tmp_path):
    more = (f"--metrics_folder={tmp_path / 'metrics'}", "--write_scores", "--class_cov=full", "--optim_var")
    succeed(LOO, *flags(tmp_path, "--optimizer=iblr", *more, "--subset=1438"))
    proxy = Proxy("mpe", "digits", folder=tmp_path / "metrics", normalize=False)
    assert len(proxy.scores) == 1438
    again = succeed(LOO, *flags(tmp_path, "--optimizer=iblr", *more, "--subset=1438", "--resume"))
    assert "mpe_digits.pkl" in again.out
    np.testing.assert_allclose(
        Proxy("mpe", "digits", folder=tmp_path / "metrics", normalize=False).scores, proxy.scores, rtol=1e-12
    )
    plots = f"--plots_folder={tmp_path / 'plots'}"
    scores = f"--scores_folder={tmp_path / 'metrics'}"
    succeed("plot_images.py", "--dataset=digits", "--modes", "mpe", scores, plots)
    succeed(
        "select_coreset.py", "--dataset=digits", "--model=lenet", "--coreset_func=min_mpe", "--coreset_fraction=0.2",
        "--per_class=0", scores, f"--out={tmp_path / 'selection.npz'}",
        *folders(tmp_path, "models", "log", "resume_ckpts"),
    )  # fmt: skip
    chosen = np.load(tmp_path / "selection.npz")["indices"]
    assert sorted(chosen) == sorted(np.argsort(-proxy.scores, kind="stable")[: len(chosen)])


@pytest.mark.parametrize(("script", "cwd"), [(LOO, ROOT / "examples"), (EVOLVING, ROOT)])
def test_scripts_run_inside_their_folder_and_from_the_root(tmp_path, script, cwd):
    process = Forked(script, *SMALL, "--lrmin=0", "--epochs=1", *folders(tmp_path, *OWN), cwd=cwd)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def test_own_data_and_colour(tmp_path):
    data = write_blobs(tmp_path / "own.npz", channels=3, size=9)
    more = (f"--dataset=npz:{data}", "--subset=60", "--epochs=2")
    succeed(LOO, *flags(tmp_path, *more, "--model=lenet"))
    found = read_pickle(tmp_path / "pickles" / "t_iter.pkl")
    assert found["settings"]["channels"] == 3


def test_data_that_the_network_cannot_take_are_refused_before_training(tmp_path):
    data = write_blobs(tmp_path / "own.npz", size=4)
    result = call(LOO, *flags(tmp_path, f"--dataset=npz:{data}", "--model=resnet20_frn", "--subset=60"))
    assert result.status == 2
    assert "--model resnet20_frn: needs images of at least 5x5 pixels" in result.complaint
    assert not (tmp_path / "models").exists()


def test_laplace_torch_refuses_what_it_cannot_do_before_training(tmp_path):
    data = write_blobs(tmp_path / "own.npz", channels=3, size=8)
    more = (f"--dataset=npz:{data}", "--subset=40", "--epochs=1", "--model=resnet20_frn")
    result = call(LOO, *flags(tmp_path, *more, "--laplace_backend=laplace-torch"))
    assert result.status == 2
    assert "--laplace_backend laplace-torch" in result.complaint
    assert "fast" in result.complaint
    assert not (tmp_path / "models").exists()


# ------------------------------------------------------------------------------------------------- script 4


def test_evolving_sensitivities_and_their_resume(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ("--checkpoints", 1, 4, 7, 12, 15)
    for base in (whole, broken):
        succeed(EVOLVING, *flags(base), *more)
    found = read_pickle(whole / "pickles" / "t_evolving.pkl")
    assert found["sensitivity"].shape == (5, 150)
    assert found["sensitivity"].dtype == np.float64
    assert found["steps"].tolist() == [1, 4, 7, 12, 15]
    assert found["iterations_list"].tolist() == [2, 5, 8, 13, 16]
    assert type(found["test_acc"]) is float
    assert type(found["test_nll"]) is np.float32
    assert (found["sensitivity"] > 0).all()
    for state in broken.glob("resume_ckpts/**/epoch=3.pth.tar"):
        state.unlink()
    succeed(EVOLVING, *flags(broken), *more, "--resume")
    same(found, read_pickle(broken / "pickles" / "t_evolving.pkl"))


def test_a_step_beyond_the_run_is_refused(tmp_path):
    result = call(EVOLVING, *flags(tmp_path), "--checkpoints", 3, 16)
    assert result.status == 2
    assert "--checkpoints 16: the run has 15 steps" in result.complaint


def test_a_checkpoint_that_is_gone_is_not_passed_over(tmp_path):
    more = ("--checkpoints", 1, 15)
    succeed(EVOLVING, *flags(tmp_path), *more)
    for state in tmp_path.glob("resume_ckpts/**/epoch=3.pth.tar"):
        state.unlink()
    (tmp_path / "pickles" / "t_evolving.pkl").unlink()
    result = call(EVOLVING, *flags(tmp_path), *more, "--resume")
    assert result.status == 1
    assert "t_evolving.pkl: has no sensitivities after step 1" in result.complaint


@pytest.mark.parametrize(("change", "remove"), [(("--var_version=diag", "--overwrite"), False), ((), True)])
def test_a_finished_run_without_its_estimates_does_not_pass_for_done(tmp_path, change, remove):
    succeed(LOO, *flags(tmp_path))
    path = tmp_path / "pickles" / "t_iter.pkl"
    before = path.read_bytes()
    if remove:
        path.unlink()
    result = call(LOO, *flags(tmp_path, *change, "--resume"))
    assert result.status == 1
    assert "t_iter.pkl: has no estimate of epoch 1, but training is already past it" in result.complaint
    assert remove or path.read_bytes() == before


def test_a_finished_run_is_written_again(tmp_path):
    succeed(LOO, *flags(tmp_path))
    before = read_pickle(tmp_path / "pickles" / "t_iter.pkl")
    succeed(LOO, *flags(tmp_path, "--resume"))
    same(before, read_pickle(tmp_path / "pickles" / "t_iter.pkl"))


def test_scores_of_another_network_are_not_replaced(tmp_path):
    more = (f"--metrics_folder={tmp_path / 'metrics'}", "--write_scores", "--epochs=1")
    succeed(LOO, *flags(tmp_path, *more))
    result = call(LOO, *flags(tmp_path, *more, "--model=lenet", "--name_exp=other"))
    assert result.status == 1
    assert "mpe_digits.pkl" in result.complaint
    assert "model (small_mlp vs. lenet)" in result.complaint
    succeed(LOO, *flags(tmp_path, *more, "--model=lenet", "--name_exp=other", "--overwrite"))


def test_a_run_that_diverges_says_so(tmp_path):
    result = call(LOO, *flags(tmp_path, "--lr=1e30"))
    assert result.status == 1
    assert "a smaller learning rate may help" in result.complaint
    result = call(EVOLVING, *flags(tmp_path, "--lr=1e30", "--checkpoints", 4))
    assert result.status == 1
    assert "a smaller learning rate may help" in result.complaint
