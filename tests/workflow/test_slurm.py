"""The workflow on a real Slurm: job arrays, and a run that is killed with its jobs and continued.

Needs Snakemake, and a Slurm that accepts jobs: make test-cluster starts one on this machine.
"""

import re
import shutil
import subprocess
import time

import pytest
from workflow_runs import (
    STUDY,
    assert_same_scores,
    assert_same_weights,
    kill,
    needs_snakemake,
    run,
    start,
    wait_for_a_training,
)

pytestmark = pytest.mark.slow

JOBS = "workflow_test"
SLURM = (
    "--slurm-no-account",  # the local Slurm has no accounting
    "--slurm-status-command=squeue",
    "--slurm-init-seconds-before-status-checks=5",
    f"--slurm-jobname-prefix={JOBS}",
    "--slurm-array-jobs=train_full",
    "--latency-wait=10",
    "--default-resources=slurm_partition=main",
)


def jobs():
    """The numbers of this test's jobs."""
    lines = subprocess.run(["squeue", "-h", "-o", "%A %j"], capture_output=True, text=True).stdout.splitlines()
    return [line.split()[0] for line in lines if line.split()[1].startswith(JOBS)]


def slurm_answers():
    return shutil.which("sinfo") is not None and subprocess.run(["sinfo"], capture_output=True).returncode == 0


@needs_snakemake
@pytest.mark.skipif(not slurm_answers(), reason="needs a running Slurm: make test-cluster")
def test_jobs_that_are_killed_in_a_training_continue(tmp_path):
    cluster, alone = tmp_path / "cluster", tmp_path / "alone"
    for base in (cluster, alone):
        base.mkdir()
        (base / "study.yaml").write_text(STUDY)
    study = ("killed", f"--configfile={cluster / 'study.yaml'}")

    process = start(cluster, *study, *SLURM, profile="slurm")
    wait_for_a_training(cluster, process, done=0)
    kill(process)
    while running := jobs():  # a killed Snakemake leaves its jobs running; as if the nodes had failed
        subprocess.run(["scancel", "--signal=KILL", "--full", *running], capture_output=True)
        time.sleep(0.5)
    run(cluster, "--unlock")
    log = run(cluster, *study, *SLURM, profile="slurm")
    assert len(re.findall(r"rule train_full:", log)) == 2
    assert "rule data:" not in log
    assert any("continuing after epoch" in path.read_text() for path in (cluster / "runs/killed/log").rglob("*.log"))
    run(alone, *study)
    assert_same_weights(cluster, alone)
    assert_same_scores(cluster, alone)
