"""Runs whose console goes away: the work is done all the same, and exit status 0 means that it was."""

import os
import shlex
import subprocess
import sys

import pytest
from support import ROOT, TRAIN, folders, succeed, write_blobs

from src.artifacts import read_checkpoint, read_json, read_npz, read_pickle, samis_path

CLOSED = ">&- 2>&- <&-"
FULL = ">/dev/full 2>/dev/full"


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return f"--dataset=npz:{write_blobs(tmp_path_factory.mktemp('blobs') / 'blobs.npz', n=60)}"


def run(redirection, script, *flags):
    """Run a script with a shell's redirection, or (``|``) with a pipe that nobody reads; returns the exit status."""
    command = shlex.join([sys.executable, str(ROOT / script), *map(str, flags)])
    if redirection != "|":
        return subprocess.run(["sh", "-c", f"exec {command} {redirection}"], timeout=300).returncode
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.run(shlex.split(command), stdout=write, stderr=write, timeout=300).returncode
    finally:
        os.close(write)


def training(blobs, base, *flags):
    return (blobs, "--model=small_mlp", "--epochs=2", "--batch_size=16", "--learning_rate=0.05",
            "--lr_sched=const", *flags, *folders(base, *TRAIN))  # fmt: skip


@pytest.mark.parametrize("redirection", ["|", CLOSED, ">&-", "2>&-", FULL])
def test_training_survives(blobs, tmp_path, redirection):
    flags = training(blobs, tmp_path)
    if redirection == FULL:  # and so is the log's disk
        succeed("train_full.py", *flags)
        (log,) = tmp_path.glob("log/*/seed_1.log")
        log.unlink()
        log.symlink_to("/dev/full")
        flags += ("--overwrite",)
    assert run(redirection, "train_full.py", *flags) == 0
    (last,) = tmp_path.glob("models/*/seed_1/last.pt")
    assert read_checkpoint(last)["epoch"] == 2
    results = read_json(last.with_name("results.json"))
    assert results["finished"]
    assert len(results["history"]) == 2


def test_a_bad_flag_is_an_error_without_a_console_too(blobs, tmp_path):
    assert run(CLOSED, "train_full.py", *training(blobs, tmp_path), "--optimizer=none") == 2


@pytest.mark.parametrize("redirection", ["|", CLOSED])
def test_scoring_survives(blobs, tmp_path, redirection):
    for optimizer in ("sgd", "sam"):
        succeed("train_full.py", *training(blobs, tmp_path, f"--optimizer={optimizer}"))
    flags = ("--model=small_mlp", "--epochs=2", *folders(tmp_path, "datasets", "models", "metrics"))
    assert run(redirection, "compute_sam_sgd.py", blobs, *flags) == 0
    (dataset,) = (path.name for path in tmp_path.glob("metrics/*"))
    assert len(read_npz(samis_path(tmp_path / "metrics", dataset, "small_mlp", 1, "prob"))["indices"]) == 60


@pytest.mark.parametrize("redirection", ["|", CLOSED])
def test_an_experiment_survives(blobs, tmp_path, redirection):
    flags = (blobs, "--model=small_mlp", "--epochs=2", "--bs=16", "--delta=1", "--name_exp=lost",
             *folders(tmp_path, "datasets", "models", "log", "resume_ckpts", "pickles"))  # fmt: skip
    assert run(redirection, "examples/1_loo_iterations.py", *flags) == 0
    assert len(read_pickle(tmp_path / "pickles" / "lost_iter.pkl")["test_nlls"]) == 2
