"""compute_memorization.py: planted truth, parts of several machines, the models of train_split.py, and bad flags."""

import json
import re
import shlex
import time

import numpy as np
import pytest
import torch
from refusals import FILE, FLAG, refuse
from support import ROOT, Forked, call, folders, succeed, write_blobs

from src.artifacts.io import read_json, read_npz
from src.artifacts.store import diff_settings, read_scores
from src.datasets import load_dataset, validation_indices
from src.metrics import Proxy
from src.metrics.memorization import read_members
from src.training import load_model

COPIES, ALONE = 5, 12


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Digits of which 12 have a wrong label, and 6 are repeated 5 times with the same wrong label; scored."""
    base = tmp_path_factory.mktemp("planted")
    digits, test = load_dataset("digits", base)
    images = digits.fetch(torch.arange(300)).permute(0, 2, 3, 1).numpy()
    labels = digits.labels[:300].numpy().copy()
    labels[:18] = (labels[:18] + 1 + np.arange(18) % 9) % 10
    copied = np.repeat(np.arange(12, 18), COPIES - 1)
    np.savez(base / "digits.npz", x_train=np.concatenate([images, images[copied]]),
             y_train=np.concatenate([labels, labels[copied]]), x_test=test.fetch(torch.arange(40))[:, 0],
             y_test=test.labels[:40])  # fmt: skip
    flags = (f"--dataset=npz:{base / 'digits.npz'}", "--model=small_mlp", "--epochs=30", "--batch_size=32",
             "--learning_rate=0.1", "--seed=3")  # fmt: skip
    done = succeed(
        "compute_memorization.py", *flags, "--members=60", "--influence", *folders(base, "datasets", "metrics")
    )
    return base, flags, done


def test_wrong_labels_are_memorized_unless_they_are_repeated(planted):
    base, _, done = planted
    name = next((base / "metrics" / "memorization").glob("mem_digits-*.pkl")).stem.removeprefix("mem_")
    alone, repeated = np.arange(ALONE), np.r_[12:18, 300 : 300 + 6 * (COPIES - 1)]
    clean = np.arange(18, 300)
    for mode in ("mem", "mem_prob"):
        proxy = Proxy(mode, name, normalize=False, folder=base / "metrics", n=324)
        assert np.abs(proxy.scores).max() <= 1
        assert np.median(proxy.scores[alone]) > 0.5
        assert np.median(proxy.scores[repeated]) < 0.2
        assert np.median(proxy.scores[clean]) < 0.1
        assert (proxy.scores[alone][:, None] > proxy.scores[clean]).mean() > 0.9
    record = read_json(base / "metrics" / "memorization" / f"mem_{name}.json")
    assert (record["members"], record["settings"]["fraction"], record["model"]) == (60, 0.7, "small_mlp")
    assert record["cost"] == pytest.approx(60 * (30 * 227 + (324 + 40) / 3) / 324, abs=1e-3)
    for word in (
        "227 of 324 examples",
        "60 members",
        "side by side",
        "standard error",
        "per member",
        "member 50 of 60",
        " left",
    ):
        assert word in done.err
    assert "examples above 0.5" in done.out


def test_the_files_agree_with_the_members(planted):
    base, _, _ = planted
    folder = base / "metrics" / "memorization"
    members, _ = read_members(next(folder.glob("members/*/small_mlp/seed_3/members_1.npz")))
    inside, correct = members.included, members.correct.astype(float)
    name = next(folder.glob("mem_digits-*.pkl")).stem.removeprefix("mem_")
    estimates = read_npz(folder / f"estimates_{name}.npz")
    for i in (0, 15, 200):
        groups = [correct[inside[:, i] == group, i] for group in (True, False)]
        assert estimates["mem"][i] == pytest.approx(groups[0].mean() - groups[1].mean())
        assert read_scores(folder / f"mem_{name}.pkl")[i] == estimates["mem"][i]
        assert estimates["mem_error"][i] ** 2 == pytest.approx(sum(g.var(ddof=1) / len(g) for g in groups))
        assert (estimates["members_in"][i], estimates["members_out"][i]) == tuple(map(len, groups))
        influence = np.load(folder / f"influence_{name}.npy", mmap_mode="r")
        assert influence.shape == (40, 324)
        tested = members.test_correct[:, 7].astype(float)
        expected = tested[inside[:, i]].mean() - tested[~inside[:, i]].mean()
        assert influence[7, i] == pytest.approx(expected, abs=1e-3)
    out = read_npz(folder / f"out_of_sample_{name}.npz")
    np.testing.assert_allclose(out["probabilities"].sum(1), 1, atol=0.01)
    means = (members.probability * ~inside).sum(0, dtype=np.float64) / (~inside).sum(0)
    np.testing.assert_allclose(out["probabilities"][np.arange(324), out["labels"]], means, atol=2e-3)
    p = 1 / (1 + np.exp(-members.test_margin.astype(float)))
    assert ((p > 0.5) <= members.test_correct).all()
    assert json.loads(str(out["settings"]))["fraction"] == 0.7


def test_parts_of_several_machines_equal_one_run(planted, tmp_path):
    """One run, a run that is extended, and two merged parts have the same members and scores, bit for bit."""
    _, flags, _ = planted
    flags = (*flags[:2], "--epochs=2", "--batch_size=32", "--learning_rate=0.1")

    def run(name, *more):
        return succeed("compute_memorization.py", *flags, *more, *folders(tmp_path / name, "datasets", "metrics"))

    run("one", "--members=40")
    run("extended", "--members=33", "--ensemble_size=11")
    run("extended", "--members=40")
    part = run("a", "--members=1-25", "--train_only", "--no-out_of_sample", "--ensemble_size=4")
    for result in (part, run("b", "--members=26-40")):
        assert "--merge FOLDERS" in result.out
    assert not [path for name in "ab" for path in (tmp_path / name).rglob("mem_*")]
    merge = ("--merge", tmp_path / "b" / "metrics")
    refused = call(
        "compute_memorization.py", *flags, "--members=40", *merge, *folders(tmp_path / "c", "datasets", "metrics")
    )
    assert (refused.status, "has no member 1-25" in refused.err) == (FILE, True)
    assert "out-of-sample probabilities are not written" in run("a", "--members=40", *merge).err
    content = {}
    for name in ("one", "extended", "a"):
        content[name] = {path.name: path.read_bytes() for path in (tmp_path / name).rglob("mem*_*.[pj]*")}
        assert len(content[name]) == 4
    assert content["one"] == content["extended"] == content["a"]
    both = [next((tmp_path / name).rglob("members_1.npz")).read_bytes() for name in ("one", "extended")]
    assert both[0] == both[1]

    where = folders(tmp_path / "a", "datasets", "metrics")
    for change, says in (("--learning_rate=0.2", r"learning_rate \(0.1 vs. 0.2\)"), ("--members=39", "40 members"),
                         ("--complementary", "complementary")):  # fmt: skip
        refuse(
            "compute_memorization.py", *flags, "--members=40", change, *where, status=FILE, says=says, keep=tmp_path
        )
    other = (*flags[:-1], "--learning_rate=0.2", "--members=40", *folders(tmp_path / "d", "datasets", "metrics"))
    refuse(
        "compute_memorization.py", *other, *merge, status=FILE, says=("learning_rate", "same settings"), keep=tmp_path
    )
    empty = ("--merge", tmp_path / "none")
    refuse("compute_memorization.py", *flags, "--members=40", *empty, *where, status=FILE, says="has no members")
    path = next((tmp_path / "one").rglob("members_1.npz"))
    path.write_bytes(path.read_bytes()[:5000])
    one = (*flags, *folders(tmp_path / "one", "datasets", "metrics"))
    refuse("compute_memorization.py", *one, "--members=40", status=FILE, says=(path.name, "damaged"))
    succeed("compute_memorization.py", *one, "--members=40", "--overwrite")


def test_the_documented_command_makes_the_shipped_scores(tmp_path):
    """The settings are the same; two members do not suffice for scores, but show them."""
    page = (ROOT / "docs" / "memorization.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("python compute_memorization.py"))
    _, script, *flags = shlex.split(line)
    shipped = read_json(ROOT / "src" / "metrics" / "memorization" / "mem_digits.json")
    assert f"--members={shipped['members']}" in flags
    call(script, *flags, "--members=2", *folders(tmp_path, "datasets", "metrics"))
    _, settings = read_members(next(tmp_path.rglob("members_1.npz")))
    assert not diff_settings(shipped["settings"], settings)
    assert shipped["label_hash"] == settings["labels"]
    assert Proxy("mem", "digits", folder=ROOT / "src" / "metrics", normalize=False).scores.max() > 0.5


def test_a_killed_run_continues(planted, tmp_path):
    """The members finished before the kill are kept, and the scores equal those of an uninterrupted run."""
    _, flags, _ = planted
    flags = (*flags[:2], "--epochs=2", "--batch_size=32", "--learning_rate=0.1", "--members=300")
    where = folders(tmp_path / "killed", "datasets", "metrics")
    process = Forked("compute_memorization.py", *flags, "--ensemble_size=10", *where)
    while process.poll() is None and not list((tmp_path / "killed").rglob("members_1.npz")):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    again = succeed("compute_memorization.py", *flags, *where)
    assert 0 < int(re.search(r"300 members, (\d+) already trained", again.err)[1]) < 300
    succeed("compute_memorization.py", *flags, *folders(tmp_path / "whole", "datasets", "metrics"))
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).rglob("mem*.*") if path.suffix != ".lock"}
             for name in ("killed", "whole")]  # fmt: skip
    assert len(files[0]) == 3 + 6
    assert files[0] == files[1]


def test_one_after_another_equals_side_by_side_up_to_rounding(planted, tmp_path):
    """The members see the same examples in the same order, with the same augmentation and initial weights."""
    _, flags, _ = planted
    found = []
    for ensemble in ("vectorised", "sequential"):
        where = folders(tmp_path / ensemble, "datasets", "metrics")
        succeed("compute_memorization.py", *flags[:3], "--epochs=12", "--batch_size=25", "--learning_rate=0.1",
                "--lr_sched=onecycle", "--weight_decay=0.01", "--data_augmentation", "--members=4", "--complementary",
                f"--ensemble={ensemble}", *where)  # fmt: skip
        found.append(read_members(next((tmp_path / ensemble).rglob("members_1.npz")))[0])
    np.testing.assert_array_equal(found[0].included, found[1].included)
    np.testing.assert_allclose(found[0].probability, found[1].probability, atol=2e-3)
    np.testing.assert_allclose(found[0].left_out, found[1].left_out, atol=200)
    assert np.ptp(found[0].probability) > 0.2
    assert np.abs(found[0].probability[0] - found[0].probability[2]).max() > 0.05


def test_a_model_with_batch_normalization_and_too_few_members(tmp_path):
    data = write_blobs(tmp_path / "blobs.npz", n=60)
    flags = (f"--dataset=npz:{data}", "--model=resnet8", "--epochs=1", "--batch_size=16", "--learning_rate=0.05")
    where = folders(tmp_path, "datasets", "metrics")
    refuse("compute_memorization.py", *flags, "--ensemble=vectorised", *where, status=FLAG, says="running statistics")
    done = call("compute_memorization.py", *flags, "--members=3", *where)
    assert done.status == 1
    assert "of 60 examples were trained on by all members or by none" in done.complaint
    assert "--members 2" in done.complaint
    assert not list(tmp_path.rglob("mem_*.pkl"))
    estimates = read_npz(next(tmp_path.rglob("estimates_*.npz")))
    lacking = (estimates["members_in"] == 0) | (estimates["members_out"] == 0)
    np.testing.assert_array_equal(np.isnan(estimates["mem"]), lacking)
    succeed("compute_memorization.py", *flags, "--members=2", "--complementary", "--overwrite", *where)
    assert len(Proxy("mem", "blobs", folder=tmp_path / "metrics").indices) == 60


def test_cross_validation(planted, tmp_path):
    """Out-of-sample probabilities of two rounds of folds find the wrong labels."""
    _, flags, _ = planted
    flags, where = ("compute_memorization.py", *flags, "--folds=4"), folders(tmp_path, "datasets", "metrics")
    refuse(*flags, "--members=6", *where, status=FLAG, says="whole rounds of 4 folds")
    refuse(*flags, "--members=8", "--fraction=0.5", *where, status=FLAG, says="with --folds")
    refuse(*flags, "--members=8", "--complementary", *where, status=FLAG, says="with --folds")
    succeed(*flags, "--members=8", *where)
    name = next(tmp_path.rglob("mem_digits-*.pkl")).stem.removeprefix("mem_")
    members, settings = read_members(next(tmp_path.rglob("members_1.npz")))
    assert settings["folds"] == 4
    assert ((~members.included[:4]).sum(0) == 1).all()
    held = (members.probability.astype(float) * ~members.included).sum(0) / 2
    proxy = Proxy("out_prob", name, normalize=False, folder=tmp_path / "metrics", n=324)
    np.testing.assert_allclose(proxy.scores, -held, atol=1e-12)
    assert proxy.record["negated"]
    assert (proxy.scores[:ALONE][:, None] > proxy.scores[18:300]).mean() > 0.95
    refuse(
        "compute_memorization.py",
        *planted[1],
        "--folds=2",
        "--members=8",
        *where,
        status=FILE,
        says=r"folds \(4 vs. 2\)",
    )


def test_the_models_of_train_split(tmp_path):
    """Against accuracy and probabilities computed from the checkpoints, one model at a time."""
    data, where = write_blobs(tmp_path / "blobs.npz", n=63), folders(tmp_path, "datasets", "models", "metrics")
    dataset = f"--dataset=npz:{data}"
    settings = ("--model=small_mlp", "--epochs=2", "--lr_sched=const")
    estimate = ("compute_memorization.py", dataset, *settings, *where)
    refuse(*estimate, "--from_splits", 1, status=FILE, says="train_split.py")
    for seed in (1, 2):
        succeed("train_split.py", dataset, *settings, "--batch_size=16", "--learning_rate=0.02", f"--seed={seed}",
                "--samis_validation_split_index=all", "--save_epochs=last",
                *folders(tmp_path, "datasets", "models", "metrics", "log", "resume_ckpts"))  # fmt: skip
    succeed(*estimate, "--from_splits", 1, 2)

    train, _ = load_dataset(f"npz:{data}", tmp_path)
    labels, name = train.labels.numpy(), train.entry.name
    inside, outside = np.zeros((2, 2, 63)), np.zeros((2, 2, 63))  # kind, seed, example
    out_of_sample = np.zeros((63, 3))
    for seed in (1, 2):
        for split in range(1, 11):
            held = validation_indices(tmp_path / "datasets" / "splits", name, seed, split, labels, 3)
            run = f"split_small_mlp_over_{name}_with_sgd_sched_const_val_split_{split}"
            model, state = load_model(tmp_path / "models" / run / f"seed_{seed}" / "last.pt")
            norm = state["normalisation"]
            images = (train.fetch(torch.arange(63)).float() / 255 - norm.mean[0]) / norm.std[0]
            with torch.no_grad():
                p = model(images).softmax(1).numpy()
            for kind, values in enumerate((p.argmax(1) == labels, p[np.arange(63), labels])):
                outside[kind, seed - 1, held] = values[held]
                inside[kind, seed - 1] += np.where(np.isin(np.arange(63), held), 0, values / 9)
            out_of_sample[held] += p[held] / 2
    folder = tmp_path / "metrics" / "memorization"
    estimates = read_npz(folder / f"estimates_{name}.npz")
    for kind, mode in enumerate(("mem", "mem_prob")):
        difference = inside[kind] - outside[kind]
        np.testing.assert_allclose(read_scores(folder / f"{mode}_{name}.pkl"), difference.mean(0), atol=2e-3)
        np.testing.assert_allclose(estimates[f"{mode}_error"], np.abs(np.diff(difference, axis=0)[0]) / 2, atol=2e-3)
    np.testing.assert_allclose(
        read_npz(folder / f"out_of_sample_{name}.npz")["probabilities"], out_of_sample, atol=2e-3
    )
    record = read_json(folder / f"mem_{name}.json")
    assert (record["seeds"], record["settings"]["batch_size"], record["settings"]["protocol"]) == (
        [1, 2],
        16,
        "splits",
    )
    assert record["cost"] == pytest.approx(2 * (10 * (63 + 15) / 63 / 3 + 2 * 9), abs=0.01)

    refuse(*estimate, "--from_splits", 1, status=FILE, says=("seeds", "--overwrite"))
    succeed(*estimate, "--from_splits", 1, "--overwrite")
    assert np.isnan(read_npz(folder / f"estimates_{name}.npz")["mem_error"]).all()  # one seed has no standard error
