"""A small study, and helpers that run the workflow on it, on this machine or a cluster."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT

from src.artifacts.io import read_checkpoint, read_npz

WORKFLOW = ROOT / "workflow"
SNAKEMAKE = shutil.which("snakemake", path=f"{ROOT / '.venv-workflow' / 'bin'}:{os.environ['PATH']}")
needs_snakemake = pytest.mark.skipif(SNAKEMAKE is None, reason="needs Snakemake: make workflow")

STUDY = """
studies:
  killed:
    kind: samis
    protocol: full
    dataset: digits
    model: resnet8
    seeds: [1]
    data: {subset: 400}
    training: {epochs: 6, batch_size: 32, learning_rate: 0.1, lr_sched: cosine, data_augmentation: true}
    resources: {training: {cpus: 1, mem_mb: 500, minutes: 5, gpus: 0}, scoring: {cpus: 1, mem_mb: 500, gpus: 0}}
"""
LAST = "killed/models/standard_resnet8_over_digits_with_{}_sched_cosine/seed_1/last.pt"
STATES = "killed/resume_ckpts/standard_resnet8_over_digits_with_{}_sched_cosine/seed_1"


def snakemake(base, *words, profile="local"):
    """The command that runs the workflow in a folder, with this interpreter."""
    return [
        SNAKEMAKE,
        f"--snakefile={WORKFLOW / 'Snakefile'}",
        f"--profile={WORKFLOW / 'profiles' / profile}",
        f"--directory={base}",
        *(["--cores=1"] if profile == "local" else []),
        *words,
        "--config",
        f"python={sys.executable}",
    ]


def run(base, *words, profile="local", status=0):
    command = snakemake(base, *words, profile=profile)
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=base)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def descendants(pid):
    """A process and everything that it started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it ended meanwhile
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found, wanted = [], [pid]
    while wanted:
        one = wanted.pop()
        found.append(one)
        wanted += [child for child, parent in parents.items() if parent == one]
    return found


def start(base, *words, profile="local"):
    quiet = subprocess.DEVNULL
    command = snakemake(base, *words, profile=profile)
    return subprocess.Popen(command, cwd=base, stdout=quiet, stderr=quiet)


def wait_for_a_training(base, process, done):
    """Wait until ``done`` trainings have finished and another is past its second epoch. Return the finished ones."""
    runs, both = base / "runs", {"sgd", "sam"}
    for _ in range(60000):
        begun = {name for name in both if (runs / STATES.format(name) / "epoch=2.pth.tar").exists()}
        finished = {name for name in both if (runs / LAST.format(name)).exists()}
        if len(finished) == done and begun - finished:
            return finished
        assert process.poll() is None
        time.sleep(0.01)
    raise AssertionError("no training began")


def kill(process):
    """Kill a process and everything that it started."""
    for pid in descendants(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def assert_same_weights(*bases):
    """The trained models are equal bit for bit."""
    runs = [base / "runs" for base in bases]
    for optimizer in ("sgd", "sam"):
        first, second = (read_checkpoint(one / LAST.format(optimizer))["model_state"] for one in runs)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def assert_same_scores(*bases):
    """The scores of the pair, and their average, are equal bit for bit."""
    runs = [base / "runs" for base in bases]
    first, second = (read_npz(one / "killed/metrics/digits/resnet8/1/nn_loss_diff_score.npz") for one in runs)
    for name in first.keys() - {"settings"}:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    first, second = ((one / "killed/metrics/sam_sgd/samis_loss_digits.pkl").read_bytes() for one in runs)
    assert first == second
