"""Safe reading: nothing that is read can run code, and every failure is one line that names the file."""

import errno
import hashlib
import json
import pickle
import re
import stat
import sys
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from src.artifacts.plain_pickle import load_plain
from src.errors import FileError

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
