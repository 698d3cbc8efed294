"""Files of kernels and velocities: whatever an interruption leaves, nothing passes for results of other settings."""

import subprocess
import sys

import numpy as np
import pytest
from support import ROOT

from src.artifacts import read_pickle
from src.curvature import ntk_files
from src.curvature.ntk_files import KernelFiles
from src.errors import FileError

OLD, NEW = {"classes": "all"}, {"classes": "true_label"}


def files(folder, overwrite=False):
    return KernelFiles(folder, "digits", "run", "mem", 2, overwrite)


def group(velocity):
    return {"0": {"velocity": velocity}}


def killed(monkeypatch, name):
    """Writing files of one kind is cut off before anything is written."""

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ntk_files, name, die)


@pytest.mark.parametrize("cut", ["write_json", "write_pickle"])
def test_a_kernel_that_is_being_replaced(tmp_path, monkeypatch, cut):
    files(tmp_path).write_kernel(1, 3, 0, np.zeros((2, 2), np.float32), OLD, {})
    with monkeypatch.context() as patch:
        killed(patch, cut)
        with pytest.raises(KeyboardInterrupt):
            files(tmp_path, True).write_kernel(1, 3, 0, np.ones((2, 2), np.float32), NEW, {})
    for settings in (OLD, NEW):
        assert not files(tmp_path).has_kernel(1, 3, 0, settings)


@pytest.mark.parametrize("cut", ["write_json", "write_pickle"])
def test_velocities_that_are_being_replaced(tmp_path, monkeypatch, cut):
    files(tmp_path).add_velocities(1, 3, OLD, group(0.1))
    with monkeypatch.context() as patch:
        killed(patch, cut)
        with pytest.raises(KeyboardInterrupt):
            files(tmp_path, True).add_velocities(1, 3, NEW, group(0.2))
    assert not files(tmp_path).velocities(1, 3).exists()
    there, other, value = (OLD, NEW, 0.1) if cut == "write_json" else (NEW, OLD, 0.2)
    assert files(tmp_path).read_velocities(1, 3, there) == group(value)
    with pytest.raises(FileError, match="different settings: classes"):
        files(tmp_path).read_velocities(1, 3, other)
    assert files(tmp_path, True).read_velocities(1, 3, other) == {}


ADD = """
import sys
from pathlib import Path
from src.curvature.ntk_files import KernelFiles

files, first = KernelFiles(Path(sys.argv[1]), "digits", "run", "mem", 2, False), int(sys.argv[2])
assert sys.stdin.readline()
for number in range(first, first + 40, 2):
    files.add_velocities(1, 3, {"classes": "all"}, {str(number): {"velocity": float(number)}})
"""


def test_two_processes_lose_no_velocity_of_each_other(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", ADD, str(tmp_path), str(first)], cwd=ROOT, stdin=subprocess.PIPE)
        for first in (0, 1)
    ]
    for process in processes:
        process.stdin.write(b"now\n")
        process.stdin.flush()
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert read_pickle(files(tmp_path).velocities(1, 3)) == {number: float(number) for number in range(40)}


def test_files_without_settings(tmp_path):
    path = files(tmp_path).kernel(1, 3, 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    with pytest.raises(FileError, match=r"k\.pkl: has no settings beside it .*--overwrite"):
        files(tmp_path).has_kernel(1, 3, 0, OLD)
    assert not files(tmp_path, True).has_kernel(1, 3, 0, OLD)
