"""Temporary files of killed writers are removed; those of running writers are kept."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from support import ROOT, TRAIN, folders, succeed

from src.artifacts.io import link, require_writable, write_text

KILLED = 99
WRITER = """
import sys, time
from src.artifacts.io import write_with

def write(file):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(600)

write_with(sys.argv[1], write)
"""


@contextlib.contextmanager
def writing(path):
    """A process that is writing a file."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "writing\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def parts(folder):
    return sorted(path.name for path in folder.rglob("*.part"))


@pytest.mark.parametrize("touch", [require_writable, lambda folder: write_text(folder / "other.txt", "")])
def test_what_a_killed_process_was_writing_is_removed(tmp_path, touch):
    with writing(tmp_path / "file.pt") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(parts(tmp_path)) == 1
        touch(tmp_path)
        assert parts(tmp_path) == []


def test_what_a_living_process_is_writing_stays(tmp_path):
    with writing(tmp_path / "file.pt") as process:
        old = time.time() - 1e6  # a slow writer is not dead
        (part,) = tmp_path.glob(".*.part")
        os.utime(part, (old, old))
        write_text(tmp_path / "other.txt", "")
        assert parts(tmp_path) == [part.name]
        process.kill()


def test_unlocked_files_of_earlier_versions_are_removed_when_they_are_old(tmp_path):
    for name, age in ((".new.txt.abcdefgh.part", 60), (".old.txt.abcdefgh.part", 1e6)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / ".train.part").mkdir()
    (tmp_path / "mine.part").write_text("not ours")
    write_text(tmp_path / "other.txt", "")
    assert parts(tmp_path) == [".new.txt.abcdefgh.part", ".train.part", "mine.part"]


def test_a_run_removes_what_a_killed_one_left_in_its_folders(tmp_path):
    run = "standard_small_mlp_over_digits_with_sgd_sched_const/seed_1"
    for file in (f"models/{run}/epoch_1.pt", f"resume_ckpts/{run}/epoch=1.pth.tar"):
        with writing(tmp_path / file):
            pass
    assert len(parts(tmp_path)) == 2
    succeed("train_full.py", "--dataset=digits", "--model=small_mlp", "--epochs=1", "--subset=50",
            "--lr_sched=const", *folders(tmp_path, *TRAIN))  # fmt: skip
    assert parts(tmp_path) == []


def test_a_link_that_a_kill_left_is_removed_and_its_file_stays(tmp_path):
    source = write_text(tmp_path / "made" / "weights.pt", "weights")
    best = write_text(tmp_path / "best.pt", "before")
    child = os.fork()
    if not child:
        os.replace = lambda *_: os._exit(KILLED)
        link(source, best)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    (part,) = tmp_path.glob(".*.part")
    assert os.path.samefile(part, source)
    assert best.read_text() == "before"
    folder = tmp_path.rename(
        tmp_path.with_name(f"{tmp_path.name} moved")
    )  # a folder that this process has not checked yet
    require_writable(folder)
    assert parts(folder) == []
    assert (folder / "made" / "weights.pt").read_text() == "weights"
