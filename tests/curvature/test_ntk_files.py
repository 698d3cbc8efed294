"""Files of velocities: processes lose nothing of each other, and nothing passes for results of other settings."""

import json
import subprocess
import sys

import pytest
from support import ROOT

from src.artifacts import read_pickle
from src.curvature.ntk import add_groups, stored_groups
from src.errors import FileError

OLD, NEW = {"classes": "all"}, {"classes": "true_label"}


def group(velocity):
    return {"0": {"velocity": velocity}}


def test_velocities_that_are_replaced(tmp_path):
    path = tmp_path / "seed_1" / "vs.pkl"
    assert add_groups(path, OLD, group(0.1), False) == group(0.1)
    assert read_pickle(path) == {0: 0.1}
    for overwrite in (False, True):
        assert stored_groups(path, OLD, overwrite) == group(0.1)
    with pytest.raises(FileError, match="different settings: classes"):
        add_groups(path, NEW, group(0.2), False)
    assert add_groups(path, NEW, group(0.2), True) == group(0.2)
    path.unlink()  # as an interruption between the two files leaves it
    assert stored_groups(path, NEW, False) == group(0.2)
    with pytest.raises(FileError, match="different settings: classes"):
        stored_groups(path, OLD, False)
    add_groups(path, NEW, {}, False)
    path.with_suffix(".json").unlink()
    with pytest.raises(FileError, match=r"settings.*--overwrite"):
        stored_groups(path, NEW, False)
    for bad in (float("nan"), "fast", None):
        path.with_suffix(".json").write_text(json.dumps({"settings": NEW, "groups": group(bad)}))
        with pytest.raises(FileError, match=r"has no velocities.*--overwrite"):
            stored_groups(path, NEW, False)
        assert stored_groups(path, NEW, True) == {}


ADD = """
import sys
from pathlib import Path
from src.curvature.ntk import add_groups

path, first = Path(sys.argv[1]), int(sys.argv[2])
assert sys.stdin.readline()
for number in range(first, first + 40, 2):
    add_groups(path, {"classes": "all"}, {str(number): {"velocity": float(number)}}, False)
"""


def test_two_processes_lose_no_velocity_of_each_other(tmp_path):
    path = tmp_path / "vs.pkl"
    processes = [
        subprocess.Popen([sys.executable, "-c", ADD, str(path), str(first)], cwd=ROOT, stdin=subprocess.PIPE)
        for first in (0, 1)
    ]
    for process in processes:
        process.stdin.write(b"now\n")
        process.stdin.flush()
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert read_pickle(path) == {number: float(number) for number in range(40)}
