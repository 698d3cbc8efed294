"""Claims: several processes share one grid of runs, on one machine or a shared file system, and do none twice.

A claim is a kernel lock on a file beside the results. The kernel frees it when its process ends, however it ends, so
no claim outlives its process; on NFS the lock manager does the same. The file holds ``host pid`` of whoever locked
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
def claim(path: str | Path) -> Iterator[bool]:
    """Claim a piece of work, or learn at once that another process holds it.

    Claims belong to processes: a process that holds the path may claim it again (also from another thread), gets
    True, and holds it until the last of these claims ends. A forked child is another process.

    Args:
        path: The lock file; its folder is made. It stays when the claim ends.

    Yields:
        Whether this process now holds it.

    Raises:
        FileError: The file cannot be written, or its file system has no locks.
    """
    lock = _lock(Path(path))
    mine = _acquire(lock, blocking=False)
    try:
        yield mine
    finally:
        if mine:
            lock.release()


@contextmanager
def claimed(path: str | Path, waiting: str = "another process works on this") -> Iterator[None]:
    """Claim a piece of work, after whoever holds it.

    Whoever had to wait must look again at what is on disk: the work may be done by then.

    Args:
        path: The lock file, as of :func:`claim`.
        waiting: What the holder does, for the one line that is logged before waiting.

    Raises:
        FileError: The file cannot be written, or its file system has no locks.
    """
    lock = _lock(Path(path))
    if not _acquire(lock, blocking=False):
        log.info("waiting: %s (%s; %s)", waiting, claim_holder(path), path)
        _acquire(lock, blocking=True)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def sole(path: str | Path, doing: str) -> Iterator[None]:
    """Claim work that one process alone may do; stop where another process is doing it.

    A file system without locks costs this protection, and a warning, not the work.

    Args:
        path: The lock file, as of :func:`claim`.
        doing: What the other process is doing, for the message, such as ``"training this run"``.

    Raises:
        FileError: Another process holds the claim, or the file cannot be written.
    """
    with ExitStack() as held:
        try:
            mine = held.enter_context(claim(path))
        except NoLocksError as error:
            log.warning("%s", error)
            mine = True
        if not mine:
            raise FileError(f"{Path(path).parent}: another process is {doing} ({claim_holder(path)}); wait for it")
        yield


def claim_holder(path: str | Path) -> str:
    """Who locked the file last, as ``host NAME, process ID``, for messages: it may have ended since."""
    with suppress(OSError):
        words = Path(path).read_text(errors="replace").split("\n")[0].split()
        if len(words) == 2:
            return f"host {words[0]}, process {words[1]}"
    return "an unknown process"


def _lock(path: Path) -> FileLock:
    """This process's one lock on a file, which counts its claims.

    The file is never removed. Removing it would let two processes hold the same claim: one that opened the file
    before the removal locks a file without a name, the next makes a new file of that name and locks it as well.
    """
    return FileLock(
        path,
        is_singleton=True,
        thread_local=False,
        fallback_to_soft=False,  # that is a file's mere existence, which outlives a killed process
        preserve_lock_file=True,
        poll_interval=_POLL,
        on_acquired=_sign,
    )


def _acquire(lock: FileLock, *, blocking: bool) -> bool:
    """Lock; False if another process holds it and ``blocking`` is off."""
    path = Path(lock.lock_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=blocking)
    except Timeout:  # also an OSError, so it comes first
        return False
    except OSError as error:
        if error.errno in _NO_LOCK_ERRORS:
            raise NoLocksError(
                f"{path}: cannot be locked, its file system has no locks ({error.strerror}); "
                "choose a folder on a local disk, or one whose file system is mounted with locks"
            ) from error
        raise FileError(
            f"{path}: cannot be locked ({error.strerror}); choose a folder that can be written"
        ) from error
    return True


def _sign(descriptor: int) -> None:
    """Write ``host pid`` into the locked file."""
    line = f"{socket.gethostname()} {os.getpid()}\n".encode()
    with suppress(OSError):  # a full disk may cost the name, not the claim
        os.pwrite(descriptor, line, 0)  # first the new line, then the rest away: readers take the first line
        os.ftruncate(descriptor, len(line))
