"""Atomic writing and safe reading of files.

A reader sees the old file or the new one, never a partial file. Reading a file never runs code from it, and every
failure is a one-line error that names the file.
"""

import csv
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import pickle
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from src.artifacts.plain_pickle import load_plain
from src.errors import FileError
from src.figures import DPI, STYLE

_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first bytes of a torch file that is not a zip archive


def _read(path: str | Path, what: str, load: Callable[[BinaryIO], Any]) -> Any:
    """Open a file, call ``load`` on it, and turn every failure into a ``FileError`` of one line."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise FileError(f"{path}: is a folder, expected {what}")
        if not stat.S_ISREG(mode):  # reading a pipe or a device could block forever
            raise FileError(f"{path}: is a pipe, socket, or device, expected {what}")
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise FileError(f"{path}: is a link to {path.readlink()}, which does not exist") from error
        raise FileError(f"{path}: file not found, expected {what}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise FileError(f"{path}: cannot be opened ({reason}); check the path and its permissions") from error
    with file:
        try:
            return load(file)
        except FileError:
            raise
        except Exception as error:  # corrupt files raise almost any exception
            if isinstance(error, OSError) and error.errno not in (
                None,
                errno.EINVAL,
            ):  # EINVAL: an invalid offset in the file
                raise FileError(f"{path}: cannot be read ({error.strerror})") from error
            reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
            raise FileError(f"{path}: is not {what}, or is damaged ({reason}); restore or recreate it") from error


def read_npz(path: str | Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Read the arrays of an npz file. Arrays may contain numbers and text; object arrays are refused.

    Args:
        path: The file.
        names: The arrays to read, if they exist; None for all.

    Raises:
        FileError: The file is missing, damaged, or contains anything else.
    """

    def load(file: BinaryIO) -> dict[str, np.ndarray]:
        with _open_zip(file, "numpy's npz") as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            wanted = members if names is None else members.keys() & names
            return {name: _member(archive, members[name]) for name in wanted}

    return _read(path, "an npz archive of arrays", load)


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read one array of an npz archive."""
    with archive.open(name) as member:
        return _array(member, name)


def _array(file: IO[bytes], name: str) -> np.ndarray:
    """Read one array in numpy's npy format; ``name`` is for messages."""
    try:
        array = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        if "Object arrays" in str(error):
            raise ValueError(
                f"{name} is an array of Python objects, which could run code; save it as numbers or text "
                "with an explicit dtype"
            ) from error
        raise ValueError(f"{name} is not an array: {error}") from error
    if file.read(1):  # the checksum of an npz member is verified only at its end
        raise ValueError(f"{name} has more bytes than values")
    if array.dtype.kind not in "biufcUS":
        raise ValueError(f"{name} is an array of {array.dtype}, not of numbers or text")
    if array.dtype.kind == "U":
        codes = np.frombuffer(array.tobytes(), np.dtype("u4").newbyteorder(array.dtype.byteorder))
        if (codes > sys.maxunicode).any():
            raise ValueError(f"{name} has invalid Unicode characters")
    return array


def _open_zip(file: BinaryIO, name: str) -> zipfile.ZipFile:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"truncated, or not in {name} format")
    return zipfile.ZipFile(file)


def read_npy(path: str | Path) -> np.ndarray:
    """Read an array of numbers or text from an npy file.

    Raises:
        FileError: The file is missing, damaged, or contains anything else.
    """
    return _read(path, "an npy file", lambda file: _array(file, "it"))


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        FileError: The file is missing or not text.
    """
    return _read(path, "a text file", lambda file: file.read().decode("utf-8-sig"))


def read_csv(path: str | Path, *, stripped: bool = True) -> list[list[str]]:
    """Read the rows of a csv file in UTF-8, without empty lines.

    Args:
        path: The file.
        stripped: Whether to remove spaces around the cells.

    Raises:
        FileError: The file is missing or not text.
    """

    def load(file: BinaryIO) -> list[list[str]]:
        rows = csv.reader(io.StringIO(file.read().decode("utf-8-sig"), newline=""))
        return [[cell.strip() if stripped else cell for cell in row] for row in rows if row]

    return _read(path, "a csv file", load)


def read_json(path: str | Path) -> Any:
    """Read a json file.

    Raises:
        FileError: The file is missing or not json.
    """
    return _read(path, "a json file", lambda file: json.loads(file.read()))


def read_pickle(path: str | Path) -> Any:
    """Read a pickle of plain values: dicts, lists, numbers, strings, numpy arrays. A Namespace is read as a dict.

    Raises:
        FileError: The file is missing, damaged, or contains anything else. No code in it is run.
    """
    return _read(path, "a pickle of plain values", lambda file: load_plain(file.read()))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of tensors and plain values onto the CPU, and verify its checksums.

    Raises:
        FileError: The file is missing, damaged, or not a checkpoint of this project.
    """
    import torch

    def load(file: BinaryIO) -> dict[str, Any]:
        if file.read(len(_OLD_TORCH)) == _OLD_TORCH:
            raise FileError(
                f"{path}: is in the torch format before version 1.6, which has no checksums; convert it with "
                f"torch.save(torch.load({str(path)!r}, weights_only=True), NEW)"
            )
        with _open_zip(file, "torch's") as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise FileError(
                    f"{path}: is a TorchScript archive, which contains code and is not loaded; save its weights with "
                    f"torch.save(torch.jit.load({str(path)!r}).state_dict(), NEW)"
                )
            if wrong := archive.testzip():  # torch.load does not verify checksums
                raise ValueError(f"the checksum of {wrong} does not match")
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # torch's message suggests loading the file unsafely
            file.seek(0)
            named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if any(name.startswith("torch.nn.modules.") for name in named):
                raise FileError(
                    f"{path}: is a pickled model (torch.save(model)), as written by the papers' scripts; it is not "
                    "loaded, because that would run code. To use its weights, run "
                    f"torch.save(torch.load({str(path)!r}, weights_only=False).state_dict(), NEW) in the environment "
                    "that wrote it, and give NEW to --init, or to --checkpoint with --model"
                ) from error
            raise ValueError(
                "it contains more than tensors and plain values, so loading it could run code"
            ) from error
        if not isinstance(state, dict):
            raise ValueError("it does not contain a dictionary")
        try:
            json.dumps(state.get("settings"))
        except (TypeError, ValueError) as error:
            raise ValueError("its settings are not plain values") from error
        return state

    return _read(path, "a checkpoint", load)


def read_index_file(path: str | Path) -> np.ndarray:
    """Read one non-negative integer per line.

    Returns:
        int64 array ``(m,)``, in the order of the file.

    Raises:
        FileError: The file is missing, empty, or a line is not a non-negative integer.
    """

    def load(file: BinaryIO) -> np.ndarray:
        words = file.read().decode().split()
        wrong = next((word for word in words if not re.fullmatch(r"\d{1,18}", word, re.ASCII)), None)
        if not words:
            raise ValueError("it is empty")
        if wrong is not None:
            raise ValueError(f"{wrong[:40]!r} is not an index from 0")
        return np.asarray(words, dtype=np.int64)

    return _read(path, "a list of indices (one per line)", load)


def file_digest(path: str | Path) -> str:
    """The sha256 of a file's content, as hex digits.

    Raises:
        FileError: The file is missing or cannot be read.
    """
    return _read(path, "a regular file", lambda file: hashlib.file_digest(file, "sha256").hexdigest())


def label_hash(labels: Any) -> str:
    """Hash a data set's labels, including their order, as 16 hex digits."""
    plain = np.ascontiguousarray(np.asarray(labels, dtype="<i8"))
    return hashlib.sha256(plain.tobytes()).hexdigest()[:16]


_LOCKED = ".locked-"  # in the names of temporary files that their writer locks
_OLD = 24 * 3600.0  # seconds after which a temporary file of unknown state counts as abandoned
_swept: set[str] = set()


def write_with(path: str | Path, write: Callable[[BinaryIO], object], *, interruptible: bool = False) -> Path:
    """Write a file atomically: write a temporary file next to it, flush it to disk, and rename it.

    Args:
        path: The file to write; its folder is created.
        write: Called with the open binary file.
        interruptible: Whether Ctrl-C and termination stop ``write`` immediately, for writes that take minutes.

    Returns:
        The path.

    Raises:
        FileError: The disk is full, or the folder is not writable. An existing file is unchanged.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        with nullcontext() if interruptible else uninterrupted():
            descriptor, temporary = _temporary(path)
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)  # before the file is closed, which unlocks it
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) or _is_torch_write_error(error):
            reason = getattr(error, "strerror", None) or "the disk may be full"
            raise FileError(
                f"{path}: could not be written ({reason}); free disk space or choose another folder"
            ) from error
        raise
    return path


def link(source: Path, target: Path) -> Path:
    """Atomically hard-link a file to a second name, or copy it if hard links are not possible.

    Both names share the same data on disk. :func:`write_with` replaces a name and never changes a file, so writing to
    one name does not affect the other.

    Args:
        source: A complete file.
        target: The second name; its folder is created, and an existing file is replaced.

    Returns:
        ``target``.

    Raises:
        FileError: The source is missing, or copying failed because the disk is full or the folder is not writable.
    """
    temporary = _temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:  # also if another process removed the new name as an abandoned file
        _read(source, "a complete file", lambda file: write_with(target, lambda copy: shutil.copyfileobj(file, copy)))
    finally:
        with suppress(OSError):
            temporary.unlink()  # os.replace does nothing if both names already refer to one file
    return target


def require_writable(folder: str | Path) -> None:
    """Create a folder and check that it is writable, so that a long run does not fail when it saves its result.

    Raises:
        FileError: The folder cannot be created or is not writable.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        _remove_abandoned(folder)
    except OSError as error:
        raise FileError(f"{folder}: is not writable ({error.strerror}); choose another folder") from error


def _temporary_name(path: Path) -> Path:
    """A new name for a temporary file next to ``path``."""
    return path.with_name(f".{path.name}{_LOCKED}{os.urandom(4).hex()}.part")


def _temporary(path: Path) -> tuple[int, Path]:
    """Create and lock a temporary file next to ``path``. The kernel releases the lock when this process ends."""
    while True:
        name = _temporary_name(path)
        # mkstemp's files are readable only by the owner, and reading the umask to fix that is not thread-safe
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, name
        os.close(descriptor)  # another process removed the file before it was locked


def _remove_abandoned(folder: Path) -> None:
    """Remove temporary files of killed processes from a folder, the first time this process uses the folder."""
    if str(folder.absolute()) in _swept:
        return
    _swept.add(str(folder.absolute()))
    for path in folder.glob(".*.part"):
        with suppress(OSError), path.open("r+b") as file:  # ignore files that cannot be removed
            if _is_abandoned(path, file):
                path.unlink()


def _is_abandoned(path: Path, file: BinaryIO) -> bool:
    """Whether no process is writing a temporary file. If so, the file is now locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        known = False
    else:
        known = _LOCKED in path.name  # earlier versions did not lock their files
    return known or time.time() - os.fstat(file.fileno()).st_mtime > _OLD


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer Ctrl-C and termination until the file is complete, since torch's writer would raise a different error.

    The signal handlers are replaced. Blocking the signals would not help, since another thread would receive them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run only in the main thread
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


def _is_torch_write_error(error: BaseException) -> bool:
    """Whether torch's zip writer failed. It hides the operating system's error in a RuntimeError."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "unexpected pos" in text)


def write_npz(path: str | Path, **arrays: Any) -> Path:
    """Write named arrays as an uncompressed npz file. Object arrays are refused, since they would be pickled."""
    plain = {name: np.asarray(value) for name, value in arrays.items()}
    for name, value in plain.items():
        if value.dtype.hasobject:
            raise TypeError(f"array {name!r} contains Python objects")
    return write_with(path, lambda file: np.savez(file, **plain))


def write_json(path: str | Path, value: Any) -> Path:
    """Write a value as indented json. Numpy values and paths are converted to plain ones."""
    return write_with(path, lambda file: file.write(json_bytes(value)))


def json_bytes(value: Any) -> bytes:
    """The content of a file written by ``write_json``."""
    return (json.dumps(value, indent=2, default=_plain, allow_nan=True) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written to a json file")


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file (UTF-8)."""
    return write_with(path, lambda file: file.write(text.encode()))


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> Path:
    """Write rows as a csv file (UTF-8). Cells with commas, quotes or line breaks are quoted.

    Args:
        path: The file.
        rows: The rows.
        columns: The columns to write; None for those of the first row.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or list(rows[0]), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_text(path, text.getvalue())


def write_pickle(path: str | Path, value: Any) -> Path:
    """Write plain values as a pickle, protocol 4 (the format of the published score files)."""
    return write_with(path, lambda file: pickle.dump(value, file, protocol=4))


def write_checkpoint(path: str | Path, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint of tensors and plain values, which loads with ``weights_only=True``."""
    import torch

    return write_with(path, lambda file: torch.save(dict(state), file))


def save_figure(figure: Any, stem: str | Path) -> list[Path]:
    """Write a matplotlib figure as ``stem.png`` (300 dpi) and ``stem.pdf``.

    PNG compression is low, which takes a third of the time for images of photos and a quarter more bytes.
    Characters missing from the font, such as an emoji in a class name, are drawn as boxes without a warning.

    Returns:
        The two paths.
    """
    import matplotlib

    logging.getLogger("fontTools").setLevel(logging.WARNING)  # fontTools logs every step of embedding a font
    stem = Path(stem)
    written = []
    with warnings.catch_warnings(), matplotlib.rc_context(STYLE):
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        for kind, more in (("png", {"pil_kwargs": {"compress_level": 1}}), ("pdf", {})):
            path = stem.with_name(f"{stem.name}.{kind}")
            save = partial(figure.savefig, format=kind, dpi=DPI, **more)
            written.append(write_with(path, save))
    return written
