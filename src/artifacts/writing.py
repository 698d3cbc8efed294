"""Atomic writing: a reader sees the old file or the new one, never a part of either."""

import fcntl
import json
import os
import pickle
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from src.errors import FileError

_LOCKED = ".locked-"  # in the names of temporary files that their writer keeps locked
_OLD = 24 * 3600.0  # seconds after which a temporary file that nothing is known of counts as abandoned
_swept: set[str] = set()


def write_with(path: str | Path, write: Callable[[BinaryIO], None], *, interruptible: bool = False) -> Path:
    """Write a file atomically: into a temporary file beside it, flushed to the disk, then renamed.

    Args:
        path: The file to write; its folder is made.
        write: Called with the open binary file.
        interruptible: Let Ctrl-C and termination stop ``write`` at once, as it may take minutes.

    Returns:
        The path.

    Raises:
        FileError: The disk is full, or the folder cannot be written. The old file, if any, is untouched.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        with nullcontext() if interruptible else _uninterrupted():
            descriptor, temporary = _temporary(path)
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(temporary, 0o666 & ~_umask())
                os.replace(temporary, path)  # before the file is closed, which unlocks it
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) or _is_torch_write_error(error):
            reason = getattr(error, "strerror", None) or "the disk may be full"
            raise FileError(f"{path}: could not be written ({reason}); make room or choose another folder") from error
        raise
    return path


def require_writable(folder: str | Path) -> None:
    """Make a folder and try it, so that a long run does not end with a result that cannot be stored.

    Raises:
        FileError: It cannot be made, or not be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        _remove_abandoned(folder)
    except OSError as error:
        raise FileError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error


def _temporary(path: Path) -> tuple[int, str]:
    """Make a temporary file beside ``path`` and lock it; the kernel unlocks it when this process ends, however."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{_LOCKED}", suffix=".part")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, name
        os.close(descriptor)  # another process found it before it was locked, and removed it


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder, at this process's first look at it."""
    if str(folder.absolute()) in _swept:
        return
    _swept.add(str(folder.absolute()))
    for path in folder.glob(".*.part"):
        with suppress(OSError), path.open("r+b") as file:  # what cannot be removed stays
            if _is_abandoned(path, file):
                path.unlink()


def _is_abandoned(path: Path, file: BinaryIO) -> bool:
    """Whether nobody writes a temporary file; if so, it is now locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        known = False
    else:
        known = _LOCKED in path.name  # earlier versions did not lock theirs
    return known or time.time() - os.fstat(file.fileno()).st_mtime > _OLD


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and termination wait until the file is whole: torch's writer would turn them into its own error.

    Handlers are exchanged rather than signals blocked, as any other thread would still receive a blocked one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread alone
        return
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if handler is not None}
    for number in before:
        signal.signal(number, lambda got, frame: caught.append(got))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


def _umask() -> int:
    """The process's file mode mask (reading it means setting it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_torch_write_error(error: BaseException) -> bool:
    """Whether torch's zip writer failed; it hides the operating system's error in a RuntimeError."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "unexpected pos" in text)


def write_npz(path: str | Path, **arrays: Any) -> Path:
    """Write named arrays as an uncompressed npz file. Objects are refused: they would be pickled."""
    plain = {name: np.asarray(value) for name, value in arrays.items()}
    for name, value in plain.items():
        if value.dtype.hasobject:
            raise TypeError(f"array {name!r} holds Python objects")
    return write_with(path, lambda file: np.savez(file, **plain))


def write_json(path: str | Path, value: Any) -> Path:
    """Write a value as indented json; numpy scalars and paths are turned into plain ones."""
    return write_with(path, lambda file: file.write(json_bytes(value)) and None)


def json_bytes(value: Any) -> bytes:
    """The content of such a file."""
    return (json.dumps(value, indent=2, default=_plain, allow_nan=True) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not belong in a json file")


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file (UTF-8)."""
    return write_with(path, lambda file: file.write(text.encode()) and None)


def write_pickle(path: str | Path, value: Any) -> Path:
    """Write plain values as a pickle, protocol 4 (the format of the published score files)."""
    return write_with(path, lambda file: pickle.dump(value, file, protocol=4))


def write_checkpoint(path: str | Path, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint: tensors and plain values only, so that it loads with ``weights_only=True``."""
    import torch

    return write_with(path, lambda file: torch.save(dict(state), file))


def save_figure(figure: Any, stem: str | Path) -> list[Path]:
    """Write a matplotlib figure as ``stem.png`` (200 dpi) and ``stem.pdf``.

    Characters that the font lacks, such as an emoji in a class name, are drawn as boxes without a warning.

    Returns:
        The two paths.
    """
    stem = Path(stem)
    written = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        for kind in ("png", "pdf"):
            path = stem.with_name(f"{stem.name}.{kind}")
            written.append(write_with(path, lambda file, kind=kind: figure.savefig(file, format=kind, dpi=200)))
    return written
