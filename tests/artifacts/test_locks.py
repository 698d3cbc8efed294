"""Locks admit one process at a time, and are released however it ends."""

import errno
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager
from functools import partial

import filelock._unix
import pytest
from support import ROOT

from src.artifacts.locks import lock, try_lock
from src.errors import FileError

SERVER = multiprocessing.get_context("forkserver")  # fresh processes that inherit no open file
SERVER.set_forkserver_preload(["src.artifacts.locks"])  # imported once, not in each process


def work(path, pipe):
    """Do what the test asks for, in a separate process; a forked child stays alive."""
    held = None
    while (order := pipe.recv()) != "end":
        if order == "hold":
            held = try_lock(path)
            pipe.send(held.__enter__())
        elif order == "release":
            held.__exit__(None, None, None)
            pipe.send(True)
        elif order == "try":
            with try_lock(path) as mine:
                pass
            pipe.send(mine)  # after its end
        elif order == "fork":
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            child.start()
            pipe.send(child.pid)
        elif order == "crash":
            with try_lock(path):
                os.close(2)  # keep the traceback out of the tests' output
                raise ValueError


class Worker:
    """Another process."""

    def __init__(self, path):
        self.pipe, other = SERVER.Pipe()
        self.process = SERVER.Process(target=work, args=(path, other), daemon=False)
        self.process.start()
        other.close()

    def ask(self, order):
        self.pipe.send(order)
        assert self.pipe.poll(60)
        return self.pipe.recv()

    def end(self, order="end"):
        if self.process.is_alive():
            self.pipe.send(order)
        self.process.join(60)


@pytest.fixture
def start(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the fork server looks there for modules to preload
    workers = []

    def begin(path):
        workers.append(Worker(path))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.end()


@contextmanager
def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive()


def test_one_of_two_processes_gets_it_and_the_name_of_the_holder_is_known(tmp_path, start):
    path = tmp_path / "run" / "seed_1" / "claim.lock"  # its folder is created
    first, second = start(path), start(path)
    assert first.ask("hold")
    assert not second.ask("try")
    with try_lock(path) as mine:
        assert not mine
    who = f"another process is training this run \\(host {socket.gethostname()}, process {first.process.pid}\\)"
    with pytest.raises(FileError, match=who), lock(path, "training this run"):
        pass
    assert first.ask("release")
    assert second.ask("try")
    with try_lock(path) as mine:
        assert mine
    assert path.read_text() == f"{socket.gethostname()} {os.getpid()}\n"


def test_a_killed_holder_and_a_crashed_one_free_it_also_while_a_forked_child_lives(tmp_path, start):
    path = tmp_path / "claim.lock"
    killed = start(path)
    assert killed.ask("hold")
    child = killed.ask("fork")
    try:
        with try_lock(path) as mine:
            assert not mine
        os.kill(killed.process.pid, signal.SIGKILL)
        killed.process.join(60)
        for _ in range(600):  # a newly forked child needs a moment to close the files that it inherited
            with try_lock(path) as mine:
                if mine:
                    break
            time.sleep(0.1)
        assert mine
        os.kill(child, 0)  # the child was alive the whole time
    finally:
        os.kill(child, signal.SIGKILL)

    crashed = start(path)
    crashed.end("crash")
    assert crashed.process.exitcode == 1
    with try_lock(path) as mine:
        assert mine


def test_waiting_logs_one_line_that_names_the_holder(tmp_path, start, caplog):
    path = tmp_path / "claim.lock"
    holder = start(path)
    assert holder.ask("hold")
    got = threading.Event()

    def wait():
        with lock(path, "pre-training this model", wait=True):
            got.set()

    with caplog.at_level(logging.INFO, logger="src"), in_thread(wait):
        assert not got.wait(0.6)
        assert holder.ask("release")
    assert got.is_set()
    (record,) = caplog.records
    assert record.getMessage() == (
        f"waiting: another process is pre-training this model (host {socket.gethostname()}, "
        f"process {holder.process.pid}; {path})"
    )


def test_a_free_lock_does_not_wait_and_says_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="src"), lock(tmp_path / "claim.lock", "working", wait=True):
        pass
    assert not caplog.records


def test_locks_of_one_process_nest_and_end_with_the_last(tmp_path, start, monkeypatch):
    path = tmp_path / "claim.lock"
    other = start(path)
    monkeypatch.chdir(tmp_path)
    with try_lock(path) as outer:
        with try_lock("claim.lock") as inner, lock(path, "working"):  # for any spelling of the path
            assert outer
            assert inner
        assert not other.ask("try")
        answers = []

        def within():
            with try_lock(path) as mine:
                answers.append(mine)

        with in_thread(within):
            pass
        assert answers == [True]
        assert not other.ask("try")
    assert other.ask("try")


def test_an_exception_frees_it_and_passes(tmp_path):
    path = tmp_path / "claim.lock"
    for context in (try_lock, partial(lock, doing="working"), partial(lock, doing="working", wait=True)):
        with pytest.raises(OSError, match="of the work"), context(path):
            raise OSError("of the work")
        inode = path.stat().st_ino
        with try_lock(path) as mine:
            assert mine
        assert path.stat().st_ino == inode  # never removed, because waiting processes have this file open


def test_folders_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "claim.lock", tmp_path / "folder"):
        for context in (try_lock, partial(lock, doing="working"), partial(lock, doing="working", wait=True)):
            said = r"cannot be locked \(.*\); choose a writable folder"
            with pytest.raises(FileError, match=said) as caught, context(path):
                pass
            assert str(caught.value).startswith(f"{path}: ")


def test_a_disk_that_takes_no_name_still_takes_the_lock(tmp_path, monkeypatch, start):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "claim.lock"
    monkeypatch.setattr(os, "pwrite", full)
    with try_lock(path) as mine:
        assert mine
    holder = start(path)
    assert holder.ask("hold")
    path.write_text("")
    with pytest.raises(FileError, match="an unknown process"), lock(path, "working"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_work_goes_on_without_locks_and_says_so(tmp_path, monkeypatch, caplog, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock._unix.fcntl, "flock", no_locks)
    with lock(tmp_path / "claim.lock", "training this run"):
        pass
    assert "claim.lock: cannot be locked, because its file system does not support locks" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_processes_that_share_work_need_locks(tmp_path, monkeypatch, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock._unix.fcntl, "flock", no_locks)
    for context in (try_lock, partial(lock, doing="writing the table", wait=True)):
        said = r"claim\.lock: cannot be locked, because its file system does not support locks"
        with pytest.raises(FileError, match=said) as caught, context(tmp_path / "claim.lock"):
            pass
        assert "\n" not in str(caught.value)
