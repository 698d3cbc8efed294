"""Locks against two processes that write to one folder, on one machine or a shared file system.

A lock is a kernel lock on a file beside the results. The kernel frees it when its process ends, however it ends, so
no lock outlives its process; on NFS the lock manager does the same. The file contains ``host pid`` of whoever locked
it last, for messages alone.
"""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from src.errors import FileError

log = logging.getLogger(__name__)

_POLL = 0.25  # seconds between two tries: short beside any training, long beside a file server's answer
_NO_LOCK_ERRORS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class NoLocksError(FileError):
    """A file system has no locks."""


@contextmanager
def try_lock(path: str | Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock a file, or learn at once that another process holds it.

    Locks belong to processes: a process that holds one may take it again (also from another thread), and holds it
    until the last of these contexts ends. A forked child is another process.

    Args:
        path: The lock file; its folder is made. It stays, as removing it would let two processes hold one lock: one
            that opened the file before the removal locks a file without a name, the next makes a new file.
        wait: Wait for the other process instead.

    Yields:
        Whether this process now holds it.

    Raises:
        FileError: The file cannot be written, or its file system has no locks.
    """
    file_lock = FileLock(
        path,
        is_singleton=True,  # of this process, so that it counts its holders
        thread_local=False,
        fallback_to_soft=False,  # that is a file's mere existence, which outlives a killed process
        preserve_lock_file=True,
        poll_interval=_POLL,
        on_acquired=_sign,
    )
    mine = True
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file_lock.acquire(blocking=wait)
    except Timeout:  # also an OSError, so it comes first
        mine = False
    except OSError as error:
        if error.errno in _NO_LOCK_ERRORS:
            raise NoLocksError(
                f"{path}: cannot be locked, its file system has no locks ({error.strerror}); "
                "choose a folder on a local disk, or one whose file system is mounted with locks"
            ) from error
        raise FileError(
            f"{path}: cannot be locked ({error.strerror}); choose a folder that can be written"
        ) from error
    try:
        yield mine
    finally:
        if mine:
            file_lock.release()


@contextmanager
def lock(path: str | Path, doing: str, *, wait: bool = False) -> Iterator[None]:
    """Do what one process alone may do at a time; stop where another process is doing it, or wait for it.

    Whoever had to wait must look again at what is on disk: the work may be done by then. A file system without locks
    costs work that nobody waits for this protection, and a warning; processes that share work need the locks.

    Args:
        path: The lock file, as of :func:`try_lock`.
        doing: What the other process is doing, for messages, such as ``"training this run"``.
        wait: Wait for the other process, after one line in the log.

    Raises:
        FileError: Another process holds the lock, and ``wait`` is off; the file cannot be written; or its file system
            has no locks, and ``wait`` is on.
    """
    with ExitStack() as held:
        try:
            mine = held.enter_context(try_lock(path))
        except NoLocksError as error:
            if wait:
                raise
            log.warning("%s", error)
            mine = True
        if not mine:
            if not wait:
                raise FileError(f"{Path(path).parent}: another process is {doing} ({_holder(path)}); wait for it")
            log.info("waiting: another process is %s (%s; %s)", doing, _holder(path), path)
            held.enter_context(try_lock(path, wait=True))
        yield


def _holder(path: str | Path) -> str:
    """Who locked the file last, as ``host NAME, process ID``, for messages: it may have ended since."""
    with suppress(OSError):
        words = Path(path).read_text(errors="replace").split("\n")[0].split()
        if len(words) == 2:
            return f"host {words[0]}, process {words[1]}"
    return "an unknown process"


def _sign(descriptor: int) -> None:
    """Write ``host pid`` into the locked file."""
    line = f"{socket.gethostname()} {os.getpid()}\n".encode()
    with suppress(OSError):  # a full disk may cost the name, not the lock
        os.pwrite(descriptor, line, 0)  # first the new line, then the rest away: readers take the first line
        os.ftruncate(descriptor, len(line))
