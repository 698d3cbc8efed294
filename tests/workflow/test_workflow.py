"""The workflow: every study's commands are valid, GPUs are shared out, and a killed run continues bit for bit.

Tests of Snakemake are skipped where it is not installed (make workflow installs it in .venv-workflow).
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT, call

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


def snakemake(base, *words):
    """The command that runs the workflow in a folder, with this interpreter."""
    return [
        SNAKEMAKE,
        f"--snakefile={WORKFLOW / 'Snakefile'}",
        f"--profile={WORKFLOW / 'profiles' / 'local'}",
        f"--directory={base}",
        "--cores=1",
        *words,
        "--config",
        f"python={sys.executable}",
    ]


def run(base, *words):
    done = subprocess.run(snakemake(base, *words), capture_output=True, text=True, timeout=500, cwd=base)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_snakemake
def test_every_command_of_every_study_has_flags_that_its_script_knows(tmp_path):
    targets = [
        name for name in run(tmp_path, "--list-target-rules").split() if re.match("digits_|samis|mem|mpe|pru", name)
    ]
    assert {"digits_all", "samis_splits", "mpe_fig2a"} <= set(targets)
    plan = run(tmp_path, "--dry-run", *targets, "geometry", "report")
    commands = set(re.findall(r"export OMP_NUM_THREADS.*", plan))
    used: dict[str, set[str]] = {}
    for command in commands:
        words = shlex.split(command)
        (script,) = (word for word in words if word.endswith(".py"))
        assert Path(script).is_file()
        used.setdefault(script, set()).update(word.split("=")[0] for word in words if word.startswith("--"))
    assert {Path(script).name for script in used} >= {"train_split.py", "compute_memorization.py", "5_loco.py"}
    for script, flags in used.items():
        known = set(re.findall(r"--[\w-]+", call(os.path.relpath(script, ROOT), "--help").out))
        assert flags <= known, script


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


def kill_in_second_training(base):
    """Start the study, and kill Snakemake and its job in the middle of the second training. Return the first one."""
    process = subprocess.Popen(
        snakemake(base, "killed", f"--configfile={base / 'study.yaml'}"),
        cwd=base,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    runs = base / "runs"
    for _ in range(30000):
        finished = [name for name in ("sgd", "sam") if (runs / LAST.format(name)).exists()]
        begun = {name for name in ("sgd", "sam") if (runs / STATES.format(name) / "epoch=2.pth.tar").exists()}
        if len(finished) == 1 and begun - set(finished):
            break
        assert process.poll() is None
        time.sleep(0.01)
    for pid in descendants(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    (other,) = {"sgd", "sam"} - set(finished)
    assert not (runs / LAST.format(other)).exists()
    return finished[0]


@needs_snakemake
def test_a_killed_workflow_continues_in_the_middle_of_a_training(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for base in (killed, whole):
        base.mkdir()
        (base / "study.yaml").write_text(STUDY)
    run(whole, "killed", f"--configfile={whole / 'study.yaml'}")

    finished = kill_in_second_training(killed)
    before = (killed / "runs" / LAST.format(finished)).stat()
    run(killed, "--unlock")
    log = run(killed, "killed", f"--configfile={killed / 'study.yaml'}")
    after = (killed / "runs" / LAST.format(finished)).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert log.count("rule train_full:") == 1  # the killed training
    assert "rule data:" not in log
    assert re.search(r"continuing after epoch [2-5] of 6", log)

    for optimizer in ("sgd", "sam"):
        first, second = (
            read_checkpoint(base / "runs" / LAST.format(optimizer))["model_state"] for base in (killed, whole)
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    scores = [
        read_npz(base / "runs/killed/metrics/digits/resnet8/1/nn_loss_diff_score.npz") for base in (killed, whole)
    ]
    for name in scores[0].keys() - {"settings"}:
        np.testing.assert_array_equal(scores[0][name], scores[1][name], err_msg=name)
    averages = [(base / "runs/killed/metrics/sam_sgd/samis_loss_digits.pkl").read_bytes() for base in (killed, whole)]
    assert averages[0] == averages[1]
    assert "Nothing to be done" in run(killed, "killed", f"--configfile={killed / 'study.yaml'}")


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock (util-linux)")
def test_each_gpu_is_given_to_one_job_at_a_time(tmp_path):
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "4,7"}

    def start(count):
        # after exec, the job is the process itself
        # fmt: off
        words = [WORKFLOW / "on_gpus", str(count), sys.executable, "-c",
                 "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(60)"]
        # fmt: on
        process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return process, process.stdout.readline().strip()

    (first, one), (second, two) = start(1), start(1)
    third, none = start(1)
    try:
        assert (one, two, none) == ("4", "7", "")
        assert third.wait(timeout=30) == 1
        assert "1 more free GPUs are needed, of 4,7" in third.stderr.read()
        cpu, devices = start(0)
        cpu.kill()
        assert devices == ""
        first.kill()
        first.wait()
        first, again = start(1)  # a killed job gives its GPU back
        assert again == "4"
    finally:
        for process in (first, second, third, cpu):
            process.kill()
            process.communicate()
