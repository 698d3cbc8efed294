"""Atomic writing and safe reading.

A reader sees the old file or the new one, never a part of either. Nothing that is read can run code, and every
failure is one line that names the file.
"""

import errno
import fcntl
import hashlib
import json
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
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from src.artifacts.plain_pickle import load_plain
from src.errors import FileError
from src.formatting import FIGURE_DPI

_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how a file begins that is no zip archive


def _read(path: str | Path, what: str, load: Callable[[BinaryIO], Any]) -> Any:
    """Open a file, call ``load`` on it, and turn every way in which this can fail into one line."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise FileError(f"{path}: is a folder; {what} was expected there")
        if not stat.S_ISREG(mode):  # reading a pipe or a device may never end
            raise FileError(f"{path}: is a pipe, socket or device; {what} was expected there")
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise FileError(f"{path}: is a link to {path.readlink()}, which does not exist") from error
        raise FileError(f"{path}: there is no such file; {what} was expected there") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise FileError(f"{path}: cannot be opened ({reason}); its content was not checked") from error
    with file:
        try:
            return load(file)
        except FileError:
            raise
        except Exception as error:  # corrupt files raise nearly anything
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a wrong offset
                raise FileError(f"{path}: cannot be read ({error.strerror})") from error
            reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
            raise FileError(f"{path}: is not {what}, or is damaged ({reason}); restore or recreate it") from error


def read_npz(path: str | Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Read the arrays of an npz file: numbers and text; object arrays are refused.

    Args:
        path: The file.
        names: Read only those of these names, where there are such (default: all).

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
    """An array of an npz archive."""
    with archive.open(name) as member:
        try:
            array = np.lib.format.read_array(member, allow_pickle=False)
        except ValueError as error:
            if "Object arrays" in str(error):
                raise ValueError(
                    f"{name} is an array of Python objects, which could run code; save it as numbers or text, "
                    "with its dtype given"
                ) from error
            raise ValueError(f"{name} is not an array: {error}") from error
        if member.read(1):  # the checksum is compared at the end only
            raise ValueError(f"{name} has more bytes than values")
    if array.dtype.kind not in "biufcUS":
        raise ValueError(f"{name} is an array of {array.dtype}, not of numbers or text")
    if array.dtype.kind == "U":
        codes = np.frombuffer(array.tobytes(), np.dtype("u4").newbyteorder(array.dtype.byteorder))
        if (codes > sys.maxunicode).any():
            raise ValueError(f"{name} has characters that do not exist")
    return array


def _open_zip(file: BinaryIO, name: str) -> zipfile.ZipFile:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"truncated, or not in {name} format")
    return zipfile.ZipFile(file)


def read_json(path: str | Path) -> Any:
    """Read a json file.

    Raises:
        FileError: The file is missing or not json.
    """
    return _read(path, "a json file", lambda file: json.loads(file.read()))


def read_pickle(path: str | Path) -> Any:
    """Read a pickle of plain values: dicts, lists, numbers, strings, numpy arrays; a Namespace is read as a dict.

    Raises:
        FileError: The file is missing, damaged, or contains anything else. Nothing in it is run.
    """
    return _read(path, "a pickle of plain values", lambda file: load_plain(file.read()))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors and plain values only, and verify its checksums.

    Raises:
        FileError: The file is missing, damaged, or not a checkpoint of this project.
    """
    import torch

    def load(file: BinaryIO) -> dict[str, Any]:
        if file.read(len(_OLD_TORCH)) == _OLD_TORCH:
            raise FileError(
                f"{path}: is in the format of torch before 1.6, which has no checksums; convert it with "
                f"torch.save(torch.load({str(path)!r}, weights_only=True), NEW)"
            )
        with _open_zip(file, "torch's") as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise FileError(
                    f"{path}: is a TorchScript archive, which is a program and is not run; "
                    f"torch.save(torch.jit.load({str(path)!r}).state_dict(), NEW) saves its weights"
                )
            if wrong := archive.testzip():  # torch.load itself does not look at the checksums
                raise ValueError(f"the checksum of {wrong} is wrong")
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # torch's own words advise to load it all the same
            file.seek(0)
            named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if any(name.startswith("torch.nn.modules.") for name in named):
                raise FileError(
                    f"{path}: is a whole pickled model (torch.save(model)), as the papers' scripts write it; it is "
                    "not read, as that would run code. Where it was written, "
                    f"torch.save(torch.load({str(path)!r}, weights_only=False).state_dict(), NEW) saves its weights "
                    "for PyTorch code of your own. The scripts here read checkpoints that they wrote: train "
                    "the model with train_full.py or train_split.py"
                ) from error
            raise ValueError("it holds more than tensors and plain values, so reading it could run code") from error
        if not isinstance(state, dict):
            raise ValueError("it holds no dictionary")
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
        if not words or wrong is not None:
            raise ValueError("it is empty" if not words else f"{wrong[:40]!r} is not an index from 0")
        return np.asarray(words, dtype=np.int64)

    return _read(path, "a list of indices (one per line)", load)


def file_digest(path: str | Path) -> str:
    """The sha256 of a file's content, in hex.

    Raises:
        FileError: The file is missing, or cannot be read.
    """
    return _read(path, "a regular file", lambda file: hashlib.file_digest(file, "sha256").hexdigest())


def label_hash(labels: Any) -> str:
    """16 hex digits that identify a data set's labels (and so their order)."""
    plain = np.ascontiguousarray(np.asarray(labels, dtype="<i8"))
    return hashlib.sha256(plain.tobytes()).hexdigest()[:16]


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
            raise FileError(f"{path}: could not be written ({reason}); make room or choose another folder") from error
        raise
    return path


def link(source: Path, target: Path) -> Path:
    """Give a file a second name, atomically; copy it where the file system has no hard links, or is another.

    Both names share their bytes on the disk. As :func:`write_with` replaces a name and never changes a file, writing
    to one of them leaves the other as it is.

    Args:
        source: A file that is complete.
        target: Its further name; a file that has it is replaced, its folder is made.

    Returns:
        ``target``.

    Raises:
        FileError: The source is missing; or it was copied, and the disk is full, or the folder cannot be written.
    """
    temporary = _temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:  # also where another process took the new name for an abandoned file, and removed it
        _read(source, "a complete file", lambda file: write_with(target, lambda copy: shutil.copyfileobj(file, copy)))
    finally:
        with suppress(OSError):
            temporary.unlink()  # where both were names of one file, replacing has left it
    return target


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


def _temporary_name(path: Path) -> Path:
    """A new name for a temporary file beside ``path``."""
    return path.with_name(f".{path.name}{_LOCKED}{os.urandom(4).hex()}.part")


def _temporary(path: Path) -> tuple[int, Path]:
    """Make a temporary file beside ``path`` and lock it; the kernel unlocks it when this process ends, however."""
    while True:
        name = _temporary_name(path)
        # not mkstemp, whose files only the owner may read: the umask, which threads share, is changed by reading it
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
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
def uninterrupted() -> Iterator[None]:
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

    The PNG file is compressed lightly: images of photos take a third of the time, and a quarter more bytes.
    Characters that the font lacks, such as an emoji in a class name, are drawn as boxes without a warning.

    Returns:
        The two paths.
    """
    stem = Path(stem)
    written = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        for kind, more in (("png", {"pil_kwargs": {"compress_level": 1}}), ("pdf", {})):
            path = stem.with_name(f"{stem.name}.{kind}")
            save = partial(figure.savefig, format=kind, dpi=FIGURE_DPI, **more)
            written.append(write_with(path, save))
    return written
