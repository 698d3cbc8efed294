"""compute_ntk.py and plot_ntk.py as users run them: files, resuming, cheaper options, and bad input."""

import io
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from refusals import FILE, FLAG, refuse, spoilt
from support import Forked, call, folders, succeed, write_blobs

import src.curvature.ntk as ntk
from src.artifacts.io import read_checkpoint, read_pickle, write_json, write_pickle
from src.artifacts.store import write_scores
from src.curvature.ntk import velocity
from src.datasets import load_dataset

RUN = "small_mlp_with_sgd_sched_const"


def flags(world, base, *more):
    """A small problem: groups of five of sixty examples, two epochs, two seeds."""
    groups = (
        "--m_samples=5",
        "--lower_index",
        "0",
        "30",
        "55",
        "--ntk_velocity_epoch",
        "1",
        "2",
        "--seeds",
        "1",
        "2",
    )
    where = (f"--ntk_folder={base / 'ntks'}", *folders(world.base, "datasets", "models", "metrics"))
    return (world.dataset, "--model=small_mlp", "--ntk_chosen_metric=samis_loss", *groups, *where, *more)


def drawing(world, base, *more):
    """The flags of a figure of its velocities."""
    where = (f"--ntk_folder={base / 'ntks'}", f"--plots_folder={base}", *folders(world.base, "datasets"))
    return (world.dataset, "--model=small_mlp", "--metrics", "samis_loss", *where, *more)


def place(world, base):
    return base / "ntks" / world.name / RUN / "samis_loss"


def kernel(folder, epoch, seed=1, lower=0):
    return read_pickle(folder / f"epoch_{epoch}" / f"seed_{seed}" / f"l_index_{lower}" / "m_5" / "k.pkl")


def test_files_and_figure(world, tmp_path):
    result = succeed("compute_ntk.py", *flags(world, tmp_path))
    assert "a kernel of 5 examples has 15 rows and takes about" in result.err
    assert "Spearman of mean velocity and rank" in result.out
    folder = place(world, tmp_path)
    for seed in (1, 2):
        for epoch in (1, 2):
            found = read_pickle(folder / f"epoch_{epoch}" / f"seed_{seed}" / "vs.pkl")
            assert list(found) == [0, 30, 55]
            for lower, value in found.items():
                pair = [kernel(folder, e, seed, lower) for e in (epoch, epoch + 1)]
                assert pair[0].dtype == np.float32
                assert pair[0].shape == (15, 15)
                assert value == velocity(*pair)
                assert 0 < value <= 1
    beside = json.loads((folder / "epoch_1" / "seed_1" / "l_index_30" / "m_5" / "k.json").read_text())
    assert beside["settings"]["m_samples"] == 5
    assert len(set(beside["example_indices"])) == 5
    drawn = succeed("plot_ntk.py", *drawing(world, tmp_path))
    assert "samis_loss, epoch 2: Spearman of mean velocity and rank" in drawn.out
    for kind in ("png", "pdf"):
        assert list((tmp_path / "ntk" / world.name).glob(f"velocity_{RUN}_samis_loss.{kind}"))


def test_drawing_only_some(world, tmp_path):
    """Folders of epochs t + 1 contain only kernels, which is not an error."""
    succeed("compute_ntk.py", *flags(world, tmp_path))
    for more in (("--seeds", "1"), ("--epochs", "2", "2"), ("--epochs", "1", "--seeds", "2")):
        drawn = succeed("plot_ntk.py", *drawing(world, tmp_path, *more))
        assert drawn.out.count("Spearman") == (2 if more[0] == "--seeds" else 1)


def test_the_command_for_a_missing_epoch_makes_it(tmp_path):
    """Missing epochs: not reached, with schedules that do and do not depend on the length; not kept."""
    base = ("--dataset=digits", "--model=small_mlp")
    training = ("--batch_size=256", "--learning_rate=0.05")
    where = folders(tmp_path, "datasets", "models", "metrics", "log", "resume_ckpts")
    asked = (*base, "--ntk_chosen_metric=samis_loss", "--m_samples=2", "--lower_index", "0", "--seeds", "1",
             f"--ntk_folder={tmp_path}", *where[:2])  # fmt: skip
    for schedule, kept, epoch in (("const", "all", 1), ("cosine", "all", 1), ("exp", "last", 1)):
        succeed("train_full.py", *base, *training, f"--lr_sched={schedule}", "--epochs=1" if kept == "all" else
                "--epochs=2", f"--save_epochs={kept}", *where)  # fmt: skip
        problem = call("compute_ntk.py", *asked, "--ntk_velocity_epoch", epoch, f"--lr_sched={schedule}")
        assert problem.status == FILE
        command = problem.complaint.split("create it with: python ")[1].split(" (and your other")[0].split()
        succeed(*command, *training, *where)
        succeed("compute_ntk.py", *asked, "--ntk_velocity_epoch", epoch, f"--lr_sched={schedule}")


def test_groups_follow_the_scores(world, tmp_path):
    """Planted scores that fall with the index: rank 0 is the last example."""
    write_scores(tmp_path / "s" / "sam_sgd" / f"samis_loss_{world.name}.pkl", -np.arange(60.0), {})
    succeed("compute_ntk.py", *flags(world, tmp_path, f"--scores_folder={tmp_path / 's'}"))
    folder = place(world, tmp_path) / "epoch_1" / "seed_1"
    indices = json.loads((folder / "l_index_0" / "m_5" / "k.json").read_text())["example_indices"]
    assert indices == [59, 58, 57, 56, 55]


def test_what_is_there_is_kept_and_what_is_missing_computed(world, tmp_path):
    succeed("compute_ntk.py", *flags(world, tmp_path))
    folder = place(world, tmp_path)
    whole = {path: path.read_bytes() for path in folder.rglob("*.pkl")}
    times = {path: path.stat().st_mtime_ns for path in whole}
    again = succeed("compute_ntk.py", *flags(world, tmp_path))
    assert "a kernel of" not in again.err
    assert {path: path.stat().st_mtime_ns for path in whole} == times
    cut = folder / "epoch_1" / "seed_2"  # the state after an interruption: one group done, the next kernel written
    beside = json.loads((cut / "vs.json").read_text())
    shutil.rmtree(cut / "l_index_55")
    shutil.rmtree(folder / "epoch_2" / "seed_2" / "l_index_30")
    (folder / "epoch_2" / "seed_2" / "vs.pkl").unlink()
    (cut / "vs.pkl").unlink()  # killed between the two files
    write_json(cut / "vs.json", {**beside, "groups": {"0": beside["groups"]["0"]}})
    succeed("compute_ntk.py", *flags(world, tmp_path))
    assert {path: path.read_bytes() for path in folder.rglob("*.pkl")} == whole


def test_other_groups_join_and_other_settings_are_refused(world, tmp_path):
    few = [flag for flag in flags(world, tmp_path) if flag not in ("30", "55")]
    succeed("compute_ntk.py", *few)
    succeed("compute_ntk.py", *flags(world, tmp_path))
    path = place(world, tmp_path) / "epoch_1" / "seed_1" / "vs.pkl"
    assert list(read_pickle(path)) == [0, 30, 55]
    refuse("compute_ntk.py", *flags(world, tmp_path, "--ntk_classes=true_label"), status=FILE, keep=tmp_path,
           says=("vs.pkl: was made with different settings: ntk_classes", "--overwrite"))  # fmt: skip
    succeed("compute_ntk.py", *flags(world, tmp_path, "--ntk_classes=true_label", "--overwrite"))
    assert kernel(place(world, tmp_path), 1).shape == (5, 5)


def test_two_processes_on_different_groups_keep_both(world, tmp_path):
    every = flags(world, tmp_path)
    shares = [[flag for flag in every if flag not in left] for left in (("30", "55"), ("0",))]
    processes = [Forked("compute_ntk.py", *share) for share in shares]
    for process in processes:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    for path in place(world, tmp_path).rglob("vs.pkl"):
        assert list(read_pickle(path)) == [0, 30, 55]
    done = {path: path.read_bytes() for path in tmp_path.rglob("*.pkl")}
    succeed("compute_ntk.py", *every)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pkl")} == done


def test_cheaper_options(world, tmp_path):
    exact = succeed("compute_ntk.py", *flags(world, tmp_path / "exact", "--precision=fp64"))
    sketched = succeed(
        "compute_ntk.py", *flags(world, tmp_path / "sketch", "--projection_dim=3000", "--no-keep_kernels")
    )
    assert "sketch of size 3000: relative error 0.0" in sketched.err
    assert not list((tmp_path / "sketch").rglob("k.pkl"))
    one, other = (
        read_pickle(place(world, tmp_path / name) / "epoch_1" / "seed_1" / "vs.pkl") for name in ("exact", "sketch")
    )
    for lower in one:
        assert other[lower] == pytest.approx(one[lower], rel=0.2)
    assert "epoch 1: velocity" in exact.out


def test_old_files_without_settings_are_drawn(world, tmp_path):
    """Velocities in the format of the paper's code: only a dictionary."""
    folder = tmp_path / "ntks" / "digits" / RUN / "mem" / "epoch_10" / "seed_3"
    write_pickle(folder / "vs.pkl", {0: 0.1, 100: 0.2, 500: 0.25})
    drawn = succeed("plot_ntk.py", "--dataset=digits", "--model=small_mlp", f"--ntk_folder={tmp_path / 'ntks'}",
                    f"--plots_folder={tmp_path}", "--log")  # fmt: skip
    assert "mem, epoch 10: Spearman of mean velocity and rank 1.00" in drawn.out


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (
            ("--ntk_velocity_epoch", "3"),
            FILE,
            ("no checkpoint of epoch 4, seed 1", "train_full.py .*--epochs=4 --save_epochs=3,4 --resume"),
        ),
        (
            ("--seeds", "7"),
            FILE,
            ("no checkpoint of epoch 1, 2, 3, seed 7", "train_full.py .*--seed=7 --epochs=3 --save_epochs=1,2,3 "),
        ),
        (("--optimizer=adam",), FILE, ("with_adam_sched_const", "--optimizer=adam")),
        (("--m_samples=61",), FLAG, ("--m_samples 61", "exceeds the 60 scored examples")),
        (("--lower_index", "56"), FLAG, ("--lower_index 56: a group of 5 examples", "ranks up to 55")),
        (("--lower_index", "5000"), FLAG, ("--lower_index 5000: a group of 5 examples",)),
        (("--ntk_chosen_metric=csl",), FILE, ("csl_.*no .*scores", "--scores_folder|(make|create) it")),
        (("--ntk_chosen_metric=nonsense",), FLAG, ("--ntk_chosen_metric", "unknown score")),
        (("--subset=20",), FLAG, ("--lower_index 30: a group of 5 examples from this rank exceeds the 20 scored",)),
        (("--projection_dim=0",), FLAG, ("--projection_dim", "at least 1")),
    ],
)
def test_bad_input(world, tmp_path, more, status, says):
    refuse("compute_ntk.py", *flags(world, tmp_path, *more), status=status, says=says, keep=tmp_path)


def test_scores_of_other_data(world, tmp_path):
    write_scores(tmp_path / "s" / "sam_sgd" / f"samis_loss_{world.name}.pkl", np.arange(59.0), {})
    refuse("compute_ntk.py", *flags(world, tmp_path, f"--scores_folder={tmp_path / 's'}"), status=FILE,
           says=("samis_loss_", "59", "60"), keep=tmp_path)  # fmt: skip


def test_networks_that_do_not_fit(world, tmp_path):
    """A different architecture under the same name, weights that are not finite, different data, a subset."""
    path = world.checkpoint.with_name("epoch_2.pt")
    state = read_checkpoint(path)
    other = read_checkpoint(world.checkpoint)

    def packed(**changes):
        file = io.BytesIO()
        torch.save({**state, **changes}, file)
        return file.getvalue()

    weights = {name: torch.full_like(value, torch.nan) for name, value in other["model_state"].items()}
    for content, says in (
        (packed(model="mlp"), ("epoch_2.pt",)),
        (packed(model_state=weights), ("epoch_2.pt: .* is not finite",)),
        (packed(settings={**state["settings"], "subset": "abc"}), ("subset",)),
        (packed(label_hash="0" * 16), ("was trained on different data: label_hash",)),
        (b"nothing", ("epoch_2.pt: is not a checkpoint",)),
    ):
        with spoilt(path, content):
            refuse("compute_ntk.py", *flags(world, tmp_path), status=FILE, says=says)
            shutil.rmtree(tmp_path / "ntks", ignore_errors=True)


def test_damaged_results(world, tmp_path):
    succeed("compute_ntk.py", *flags(world, tmp_path))
    folder = place(world, tmp_path) / "epoch_1" / "seed_1"
    with spoilt(folder / "vs.pkl", b"damaged"):
        refuse("plot_ntk.py", *drawing(world, tmp_path), status=FILE, says=("vs.pkl: ",), keep=tmp_path)
    for content, says in ((b"[]", "no (valid )?settings"), (b"{", "is not a json file")):
        with spoilt(folder / "vs.json", content):
            refuse("compute_ntk.py", *flags(world, tmp_path), status=FILE, says=("vs.json: ", says), keep=tmp_path)
            refuse("plot_ntk.py", *drawing(world, tmp_path), status=FILE, says=("vs.json: ",), keep=tmp_path)
    known = json.loads((folder / "vs.json").read_text())
    for bad in (float("nan"), "fast", None):
        known["groups"]["0"]["velocity"] = bad
        with spoilt(folder / "vs.json", json.dumps(known).encode()):
            refuse("compute_ntk.py", *flags(world, tmp_path), status=FILE, says=("vs.json: ", "velocities"))
        for content in ({0: bad, 30: 0.5}, {"a": 0.5}, {(): bad}, [bad], {}):
            with spoilt(folder / "vs.pkl", pickle.dumps(content)):
                refuse("plot_ntk.py", *drawing(world, tmp_path), status=FILE, says=("vs.pkl: ",), keep=tmp_path)
    (folder / "vs.pkl").unlink()
    (folder / "vs.json").unlink()
    with spoilt(folder / "l_index_0" / "m_5" / "k.pkl", (folder / "l_index_0" / "m_5" / "k.json").read_bytes()):
        refuse("compute_ntk.py", *flags(world, tmp_path), status=FILE, says=("k.pkl: ",))
    shutil.rmtree(tmp_path / "ntks" / world.name / RUN / "samis_loss" / "epoch_1" / "seed_1")
    succeed("compute_ntk.py", *flags(world, tmp_path))
    for more, says in (
        (("--metrics", "csl"), "csl: has no velocities; compute them with compute_ntk.py"),
        (("--model=lenet",), "has no kernels for lenet trained with sgd; compute them with compute_ntk.py"),
        (("--epochs", "7"), "epoch_7: has no velocities; compute them with compute_ntk.py"),
        (("--seeds", "3"), "seed_3.vs.pkl: file not found"),
    ):
        refuse("plot_ntk.py", *drawing(world, tmp_path, *more), status=FILE, says=(says,), keep=tmp_path)


def test_a_kernel_that_does_not_fit_the_memory(world, tmp_path, monkeypatch):
    monkeypatch.setattr(ntk, "available_memory", lambda device: 1000)
    result = call("compute_ntk.py", *flags(world, tmp_path))
    assert result.status == FLAG
    assert "a kernel with 15 rows takes" in result.complaint
    assert "--ntk_classes=true_label" in result.complaint
    assert "--m_samples=" in result.complaint


def test_own_data_with_colours(tmp_path):
    """Other models and data: a residual network with BatchNorm on color images."""
    data = f"npz:{write_blobs(tmp_path / 'colour.npz', n=24, channels=3)}"
    where = folders(tmp_path, "datasets", "models", "metrics", "log", "resume_ckpts")
    succeed("train_full.py", f"--dataset={data}", "--model=resnet8", "--epochs=2", "--batch_size=8",
            "--learning_rate=0.05", "--lr_sched=const", *where)  # fmt: skip
    name = load_dataset(data, tmp_path)[0].entry.name
    write_scores(tmp_path / "metrics" / "dynamics" / f"csl_{name}.pkl", np.arange(24.0), {})
    succeed("compute_ntk.py", f"--dataset={data}", "--model=resnet8", "--ntk_chosen_metric=csl", "--m_samples=2",
            "--seeds", "1", "--ntk_velocity_epoch", "1", f"--ntk_folder={tmp_path / 'ntks'}", *where[:3])  # fmt: skip
    assert len(list(tmp_path.rglob("k.pkl"))) == 2 * 23


def test_velocities_of_a_seed_are_not_those_of_another(world, tmp_path):
    succeed("compute_ntk.py", *flags(world, tmp_path))
    for one in list(place(world, tmp_path).glob("epoch_*/seed_1")):
        shutil.copytree(one, one.with_name("seed_9"))
    refuse("plot_ntk.py", *drawing(world, tmp_path), "--seeds", 1, 9, status=FILE, says=("seed_9/", "seed_1/"))
