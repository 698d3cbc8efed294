"""The workflow: every study's commands are valid, GPUs are shared out, and a killed run continues bit for bit.

Tests of Snakemake are skipped where it is not installed (make workflow installs it in .venv-workflow).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, call
from workflow_runs import (
    LAST,
    STUDY,
    WORKFLOW,
    assert_same_weights,
    kill,
    needs_snakemake,
    run,
    start,
    wait_for_a_training,
)


@needs_snakemake
def test_every_command_of_every_study_has_flags_that_its_script_knows(tmp_path):
    files = (WORKFLOW / "config").glob("*.yaml")
    studies = [name for path in files for name in re.findall(r"^  (\w+):\n    kind:", path.read_text(), re.MULTILINE)]
    assert {"report", "samis_splits", "mpe_fig2a", "mpe_fig11d"} <= set(studies)
    papers = {name for name in studies if not name.startswith(("digits_", "small_"))}
    assert {f"digits_{name}" for name in papers} <= set(studies)
    plan = run(tmp_path, "--dry-run", *studies)
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


@needs_snakemake
def test_a_killed_workflow_continues_in_the_middle_of_a_training(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for base in (killed, whole):
        base.mkdir()
        (base / "study.yaml").write_text(STUDY)
    pair = [f"runs/{LAST.format(optimizer)}" for optimizer in ("sgd", "sam")]
    study = (*pair, f"--configfile={killed / 'study.yaml'}")
    run(whole, *study)

    process = start(killed, *study)
    (finished,) = wait_for_a_training(killed, process, done=1)
    kill(process)
    before = (killed / "runs" / LAST.format(finished)).stat()
    assert not all((killed / "runs" / LAST.format(name)).exists() for name in ("sgd", "sam"))
    run(killed, "--unlock")
    log = run(killed, *study)
    after = (killed / "runs" / LAST.format(finished)).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert log.count("rule train_full:") == 1  # the killed training
    assert "rule data:" not in log
    assert re.search(r"continuing after epoch [2-5] of 6", log)
    assert_same_weights(killed, whole)
    assert "Nothing to be done" in run(killed, *study)

    # with other settings, the models are refused and stay
    (killed / "study.yaml").write_text(STUDY.replace("epochs: 6", "epochs: 7"))
    assert "epochs (6 vs. 7)" in run(killed, *study, status=1)
    assert_same_weights(killed, whole)


@needs_snakemake
def test_a_moved_checkout_plans_all_jobs(tmp_path):
    study = f"--configfile={tmp_path / 'study.yaml'}"
    (tmp_path / "study.yaml").write_text(STUDY)
    run(tmp_path, "data/splits/digits/seed_1/val_10.txt", study)
    shutil.copytree(WORKFLOW, tmp_path / "moved" / "workflow")
    plan = run(tmp_path, "--dry-run", f"--snakefile={tmp_path / 'moved' / 'workflow' / 'Snakefile'}", study, "killed")
    assert "rule train_full:" in plan
    assert "rule data:" not in plan


@needs_snakemake
@pytest.mark.parametrize(
    ("key", "other", "message"),
    [
        ("    data:", "    dta:", "study killed: dta: is not read; choose from data, dataset, kind"),
        ("gpus: 0}}", "gpu: 0}}", "study killed: resources: scoring: gpu: is not read; choose from cpus, gpus"),
        ("protocol: full", "protocol: splits", "study killed: protocol: splits: choose from split, full"),
        ("dataset: digits", "dataset: folder:photos", "study killed: dataset: folder:photos: give the name"),
    ],
)
def test_a_study_with_a_key_that_no_rule_reads_is_refused(tmp_path, key, other, message):
    assert key in STUDY
    (tmp_path / "study.yaml").write_text(STUDY.replace(key, other))
    assert message in run(tmp_path, "--dry-run", f"--configfile={tmp_path / 'study.yaml'}", "killed", status=1)


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock (util-linux)")
def test_each_gpu_is_given_to_one_job_at_a_time(tmp_path):
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "4,7"}

    def job(count, **more):
        # after exec, the job is the process itself
        # fmt: off
        words = [WORKFLOW / "on_gpus", str(count), sys.executable, "-c",
                 "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(60)"]
        # fmt: on
        process = subprocess.Popen(
            words, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        return process, process.stdout.readline().strip()

    (first, one), (second, two) = job(1), job(1)
    third, none = job(1)
    (fourth, in_slurm), (fifth, in_same) = job(1, SLURM_JOB_ID="8"), job(1, SLURM_JOB_ID="8")
    try:
        assert (one, two, none) == ("4", "7", "")
        assert (in_slurm, in_same) == ("4", "7")  # the numbers are those of the Slurm job, which has its own GPUs
        assert third.wait(timeout=30) == 1
        assert "1 more free GPUs are needed, of 4,7" in third.stderr.read()
        cpu, devices = job(0)
        cpu.kill()
        assert devices == ""
        first.kill()
        first.wait()
        first, again = job(1)  # a killed job gives its GPU back
        assert again == "4"
    finally:
        for process in (first, second, third, fourth, fifth, cpu):
            process.kill()
            process.communicate()
