"""The last line of a successful run is the next command, and it runs as printed."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from support import ROOT, TRAIN, folders, succeed, write_blobs

from src.artifacts.io import write_pickle
from src.datasets import dataset_name
from src.models import build_model

SMALL = ("--dataset=digits", "--model=small_mlp", "--subset=200")
RATE = ("--batch_size=50", "--learning_rate=0.1", "--lr_sched=const")


def follow(result, script, *contains, flags=()):
    """Run the printed command, which must be of ``script``."""
    line = result.out.strip().splitlines()[-1]
    word, program, path, *words = shlex.split(line)
    assert (word, program, Path(path).name) == ("next:", "python", script)
    for part in contains:
        assert part in words, line
    return succeed(str(Path(path).resolve().relative_to(ROOT)), *words, *flags)


def test_from_training_to_images(tmp_path):
    (tmp_path / "a b").mkdir()  # a name that needs quotes
    flags = ("--dataset=digits", "--model=small_mlp", "--epochs=2", *RATE, *folders(tmp_path / "a b", *TRAIN))
    first = succeed("train_full.py", *flags, "--optimizer=sam", "--rho=0.1")
    second = follow(first, "train_full.py", "--optimizer=sgd")
    scored = follow(second, "compute_sam_sgd.py", "--protocol=full", "--epochs=2")
    averaged = follow(scored, "average_scores.py", "--seeds", "1")
    drawn = follow(averaged, "plot_images.py", flags=("--only_overview", f"--plots_folder={tmp_path}"))
    assert "overview_samis_loss_5.png" in drawn.out
    follow(drawn, "plot_proxies.py", "--modes", "samis_loss")
    succeed("train_full.py", *flags, "--seed=2")
    last = succeed("train_full.py", *flags, "--seed=2", "--optimizer=sam", "--rho=0.1")
    follow(follow(last, "compute_sam_sgd.py"), "average_scores.py", "--seeds", "1", "2", "--overwrite")


def test_the_splits(tmp_path):
    data = write_blobs(tmp_path / "blobs.npz", n=90)
    flags = (f"--dataset=npz:{data}", "--model=small_mlp", "--epochs=1", *RATE, "--save_epochs=last",
             *folders(tmp_path, *TRAIN))  # fmt: skip
    result = succeed("train_split.py", *flags, "--samis_validation_split_index=none")
    assert (Path(result.out.splitlines()[0]) / "val_10.txt").exists()
    assert not list(tmp_path.rglob("*.pt"))
    assert "train_split.py" in result.out.splitlines()[-1]
    assert "--samis_validation_split_index=all" in result.out.splitlines()[-1]
    result = succeed("train_split.py", *flags, "--samis_validation_split_index=3")
    damaged = (
        tmp_path / "models" / f"split_small_mlp_over_{dataset_name(f'npz:{data}')}_with_sam_sched_const_val_split_1"
    )
    (damaged / "seed_1").mkdir(parents=True)
    (damaged / "seed_1" / "results.json").write_text("{")  # of another run; this run succeeds anyway
    result = follow(result, "train_split.py", "--samis_validation_split_index=all")
    shutil.rmtree(damaged)
    result = follow(result, "train_split.py", "--optimizer=sam", "--samis_validation_split_index=all")
    result = follow(result, "compute_sam_sgd.py", "--protocol=split")
    follow(result, "average_scores.py")


def test_from_a_selection_to_the_curvature(tmp_path):
    init = f"--init={tmp_path / 'weights.pt'}"
    torch.save(build_model("small_mlp", 10, 1, 8, seed=5).state_dict(), tmp_path / "weights.pt")
    result = succeed("select_coreset.py", *SMALL, "--coreset_func=random", "--coreset_fraction=0.5", init,
                     f"--out={tmp_path / 'half.npz'}", *folders(tmp_path, *TRAIN))  # fmt: skip
    selection = f"--selection={tmp_path / 'half.npz'}"
    result = follow(result, "train_prune.py", selection, init, flags=("--coreset_epochs=2",))
    few = ("--top_n=1", "--lanczos_steps=5", "--max_steps=5", "--trace_probes=2", f"--hessian_folder={tmp_path}")
    result = follow(result, "compute_hessian_eigen.py", flags=few)
    follow(result, "plot_hessian.py", flags=(f"--plots_folder={tmp_path}",))


def test_from_pruning_to_a_comparison(tmp_path):
    result = succeed("train_prune.py", *SMALL, *RATE, "--coreset_func=csl", "--coreset_fraction=0.5",
                     "--coreset_epochs=1", "--coreset_pretrain_epochs=2", *folders(tmp_path, *TRAIN))  # fmt: skip
    result = follow(result, "compare_pruning.py", "random", "csl", flags=(f"--plots_folder={tmp_path}",))
    assert "csl" in result.out


def test_the_geometry(tmp_path):
    flags = ("--dataset=digits", "--model=small_mlp", *RATE, *folders(tmp_path, *TRAIN))
    result = succeed("train_full.py", *flags, "--epochs=2", "--optimizer=adam", "--learning_rate=0.01")
    few = ("--top_n=1", "--lanczos_steps=5", "--max_steps=5", "--trace_probes=2", f"--hessian_folder={tmp_path}")
    result = follow(result, "compute_hessian_eigen.py", "--optimizer=adam", flags=few)
    result = follow(result, "plot_hessian.py", "adam", flags=(f"--plots_folder={tmp_path}",))
    result = succeed("compute_ntk.py", "--dataset=digits", "--model=small_mlp", "--optimizer=adam", "--seeds", "1",
                     "--ntk_chosen_metric=samis_loss", "--scores_folder=src/metrics", "--m_samples=2",
                     "--lower_index", "0", "500", "--ntk_velocity_epoch", "1", f"--ntk_folder={tmp_path}",
                     *folders(tmp_path, "datasets", "models"))  # fmt: skip
    follow(result, "plot_ntk.py", flags=(f"--plots_folder={tmp_path}",))


def test_fetched_scores(tmp_path, monkeypatch):
    def fetch(file, folder, *_):
        file.path(folder).parent.mkdir(parents=True)
        return write_pickle(file.path(folder), {index: index / 60 for index in range(60)})

    monkeypatch.setattr("src.metrics.proxy.fetch", fetch)
    result = succeed("fetch_scores.py", "--dataset=cifar10", "--modes", "eps", f"--folder={tmp_path / 'scores'}")
    write_blobs(tmp_path / "cifar10.npz", n=60, classes=10, size=32, channels=3)
    where = (f"--datasets_folder={tmp_path}", f"--plots_folder={tmp_path}")
    follow(result, "plot_proxies.py", f"--scores_folder={tmp_path / 'scores'}", "eps", flags=where)


@pytest.mark.parametrize(
    ("script", "figure", "more"),
    [
        ("1_loo_iterations.py", "plot_loo_iterations.py", ()),
        ("2_loo_l2reg.py", "plot_loo_l2reg.py", ("--n_exp=4",)),
        ("3_validation_sensitivities.py", "plot_validation_sensitivities.py",
         ("--n_retrain=3", "--epochs_retrain=1", "--delta=1")),
        ("4_evolving_sensitivities.py", "plot_evolving_sensitivities.py", ("--delta=1",)),
        ("5_loco.py", "plot_loco.py", ("--epochs_retrain=1", "--delta=1")),
        ("6_group_removal.py", "plot_group_removal.py", ("--epochs_retrain=1", "--n_groups=2", "--group_size=3")),
        ("7_von_logistic.py", "plot_von_logistic.py", ("--updates=3",)),
    ],
)  # fmt: skip
def test_the_experiments(tmp_path, script, figure, more):
    trained = SMALL[::2] if script == "7_von_logistic.py" else (*SMALL, "--epochs=2")
    result = succeed(
        f"examples/{script}",
        *trained,
        "--bs=50",
        "--name_exp=small",
        "--lr=0.01",
        "--lrmin=0",
        *more,
        *folders(tmp_path, "datasets", "models", "log", "resume_ckpts", "pickles"),
    )
    drawn = follow(result, figure, f"--pickles_folder={tmp_path / 'pickles'}", flags=(f"--plots_folder={tmp_path}",))
    assert list(tmp_path.glob("*.png")), drawn.out


def test_the_command_runs_from_any_folder(tmp_path, monkeypatch, capsys):
    from src.cli import print_next

    monkeypatch.setattr(
        "sys.argv",
        ["../tools/train_full.py", "--no-adaptive", "--name", "it's", "--overwrite", "--seeds", "-1", "2"],
    )
    print_next("next.py", ("seeds", "adaptive", "name"), left=None, on=True)
    assert (
        capsys.readouterr().out
        == "next: python ../tools/next.py --no-adaptive --name 'it'\"'\"'s' --seeds -1 2 --on\n"
    )
    print_next("next.py", drop=("name", "adaptive"), seeds=[3, 4], rate=0.5)
    assert capsys.readouterr().out == "next: python ../tools/next.py --seeds 3 4 --rate=0.5\n"
    print_next("next.py", ("name", "overwrite"), overwrite=True)  # in the folder where the next script needs it
    assert capsys.readouterr().out == "next: python ../tools/next.py --name 'it'\"'\"'s' --overwrite\n"
