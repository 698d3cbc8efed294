"""Locks that keep two processes from writing to one folder, on one machine or a shared file system.

A lock is a kernel lock on a file next to the results. The kernel releases it when the process ends, even if it is
killed, so no lock outlives its process. On NFS, the lock manager does the same. The file contains ``host pid`` of the
process that locked it last, only for messages.
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

_POLL = 0.25  # seconds between attempts: much shorter than training, much longer than a file server's response time
_NO_LOCK_ERRORS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class NoLocksError(FileError):
    """The file system does not support locks."""


@contextmanager
def try_lock(path: str | Path, *, wait: bool = False) -> Iterator[bool]:
    """Try to lock a file without waiting.

    Locks belong to processes. A process that holds a lock can acquire it again (even from another thread), and holds
    it until the last of these contexts ends. A forked child is a separate process.

    Args:
        path: The lock file; its folder is created. The file is never removed, since removal would let two processes
            hold the lock: a process that opened the file earlier would lock the deleted file, and the next process
            would create a new file.
        wait: Whether to wait for another process that holds the lock.

    Yields:
        Whether this process now holds the lock.

    Raises:
        FileError: The file cannot be written, or its file system does not support locks.
    """
    file_lock = FileLock(
        path,
        is_singleton=True,  # one object per process, which counts its holders
        thread_local=False,
        fallback_to_soft=False,  # a soft lock is the existence of a file, which outlives a killed process
        preserve_lock_file=True,
        poll_interval=_POLL,
        on_acquired=_sign,
    )
    mine = True
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file_lock.acquire(blocking=wait)
    except Timeout:  # a subclass of OSError, so it comes first
        mine = False
    except OSError as error:
        if error.errno in _NO_LOCK_ERRORS:
            raise NoLocksError(
                f"{path}: cannot be locked, because its file system does not support locks ({error.strerror}); "
                "choose a folder on a local disk or on a file system mounted with locks"
            ) from error
        raise FileError(f"{path}: cannot be locked ({error.strerror}); choose a writable folder") from error
    try:
        yield mine
    finally:
        if mine:
            file_lock.release()


@contextmanager
def lock(path: str | Path, doing: str, *, wait: bool = False) -> Iterator[None]:
    """Allow only one process at a time to run the body. If another process is running it, stop or wait.

    After waiting, check the disk again: the other process may have finished the work. If the file system does not
    support locks, the body runs unprotected after a warning, unless ``wait`` is set: processes that share work need
    the locks.

    Args:
        path: The lock file, see :func:`try_lock`.
        doing: What the other process is doing, for messages, such as ``"training this run"``.
        wait: Whether to wait for the other process, after logging one line.

    Raises:
        FileError: Another process holds the lock and ``wait`` is False; the file cannot be written; or its file
            system does not support locks and ``wait`` is True.
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
    """The process that locked the file last, as ``host NAME, process ID``, for messages. It may have ended since."""
    with suppress(OSError):
        words = Path(path).read_text(errors="replace").split("\n")[0].split()
        if len(words) == 2:
            return f"host {words[0]}, process {words[1]}"
    return "an unknown process"


def _sign(descriptor: int) -> None:
    """Write ``host pid`` into the locked file."""
    line = f"{socket.gethostname()} {os.getpid()}\n".encode()
    with suppress(OSError):  # on a full disk, the name is lost but not the lock
        os.pwrite(descriptor, line, 0)  # write before truncating, since readers use only the first line
        os.ftruncate(descriptor, len(line))
