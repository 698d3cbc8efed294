"""Runs that lose their console finish anyway, and exit with status 0 if and only if the work was done."""

import os
import shlex
import subprocess
import sys

import pytest
from support import ROOT, TRAIN, Forked, folders, succeed, write_blobs

from src.artifacts.io import read_checkpoint, read_json, read_npz, read_pickle
from src.artifacts.paths import samis_path


def unread_pipe():
    """Standard output and error go to a pipe without a reader."""
    read, write = os.pipe()
    os.close(read)
    for descriptor in (1, 2):
        os.dup2(write, descriptor)


def full_disk():
    """Standard output and error go to a file on a full disk."""
    full = os.open("/dev/full", os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(full, descriptor)


def closed(*descriptors):
    """Close the standard streams before Python starts."""
    for descriptor in descriptors:
        os.close(descriptor)
        setattr(sys, ("stdin", "stdout", "stderr")[descriptor], None)


CONSOLES = {
    "a pipe that nobody reads": unread_pipe,
    "no output": lambda: closed(1),
    "no error output": lambda: closed(2),
    "a full disk": full_disk,
}


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return f"--dataset=npz:{write_blobs(tmp_path_factory.mktemp('blobs') / 'blobs.npz', n=60)}"


def ends_without_a_console(script, *flags):
    """Run a script in a separate process without standard streams; return its exit status."""
    command = shlex.join([sys.executable, str(ROOT / script), *map(str, flags)])
    return subprocess.run(["sh", "-c", f"exec {command} >&- 2>&- <&-"], timeout=300).returncode


def training(blobs, base, *flags):
    return (blobs, "--model=small_mlp", "--epochs=2", "--batch_size=16", "--learning_rate=0.05",
            "--lr_sched=const", *flags, *folders(base, *TRAIN))  # fmt: skip


def check_run(base):
    (last,) = base.glob("models/*/seed_1/last.pt")
    assert read_checkpoint(last)["epoch"] == 2
    results = read_json(last.with_name("results.json"))
    assert results["finished"]
    assert len(results["history"]) == 2


@pytest.mark.parametrize("console", CONSOLES)
def test_training_survives(blobs, tmp_path, console):
    flags = training(blobs, tmp_path)
    if console == "a full disk":  # and the log's disk is also full
        succeed("train_full.py", *flags)
        (log,) = tmp_path.glob("log/*/seed_1.log")
        log.unlink()
        log.symlink_to("/dev/full")
        flags += ("--overwrite",)
    assert Forked("train_full.py", *flags, prepare=CONSOLES[console]).result().status == 0
    check_run(tmp_path)


def test_a_process_without_a_console(blobs, tmp_path):
    flags = training(blobs, tmp_path)
    assert ends_without_a_console("train_full.py", *flags) == 0
    check_run(tmp_path)
    assert ends_without_a_console("train_full.py", *flags, "--optimizer=none") == 2


@pytest.mark.parametrize("console", ["a pipe that nobody reads", "no output"])
def test_scoring_survives(blobs, tmp_path, console):
    for optimizer in ("sgd", "sam"):
        succeed("train_full.py", *training(blobs, tmp_path, f"--optimizer={optimizer}"))
    flags = (blobs, "--model=small_mlp", "--epochs=2", *folders(tmp_path, "datasets", "models", "metrics"))
    assert Forked("compute_sam_sgd.py", *flags, prepare=CONSOLES[console]).result().status == 0
    (dataset,) = (path.name for path in tmp_path.glob("metrics/*"))
    assert len(read_npz(samis_path(tmp_path / "metrics", dataset, "small_mlp", 1, "prob"))["indices"]) == 60


@pytest.mark.parametrize("console", ["a pipe that nobody reads", "no output"])
def test_an_experiment_survives(blobs, tmp_path, console):
    flags = (blobs, "--model=small_mlp", "--epochs=2", "--bs=16", "--delta=1", "--name_exp=lost",
             *folders(tmp_path, "datasets", "models", "log", "resume_ckpts", "pickles"))  # fmt: skip
    assert Forked("examples/1_loo_iterations.py", *flags, prepare=CONSOLES[console]).result().status == 0
    assert len(read_pickle(tmp_path / "pickles" / "lost_iter.pkl")["test_nlls"]) == 2
