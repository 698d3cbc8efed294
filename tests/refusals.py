"""Checks that bad input is refused with one clear line and the right exit status, and that no file is lost."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from resource import RLIMIT_FSIZE, setrlimit

from support import Forked, Result, call

LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| INFO ")
FLAG, FILE = 2, 1  # exit statuses


def check(result: Result, script: str, status: int, *patterns: str) -> str:
    """Check that a script ended with one line that contains all patterns; returns the line."""
    lines = [line for line in result.err.splitlines() if line.strip() and not LOG_LINE.match(line)]
    assert len(lines) == 1, result.err
    assert lines[0].startswith(f"{script.rsplit('/')[-1]}: "), lines[0]
    assert result.status == status, lines[0]
    for pattern in patterns:
        assert re.search(pattern, lines[0]), f"{pattern!r} is not in: {lines[0]}"
    return lines[0]


def refuse(script: str, *flags: object, status: int, says: str | tuple[str, ...], keep: Path | None = None) -> str:
    """Run a script that must refuse its input.

    Args:
        script: Its file name.
        flags: Its flags.
        status: The exit status: ``FLAG`` or ``FILE``.
        says: Regular expressions that the line must match: what is named, what is wrong, what to do.
        keep: A folder whose files (except logs) must not change, and which must not contain partial files.
    """
    before = snapshot(keep) if keep else {}
    line = check(call(script, *flags), script, status, *((says,) if isinstance(says, str) else says))
    if keep:
        assert_kept(before, keep)
    return line


def snapshot(folder: Path) -> dict[Path, bytes]:
    """Return the files in a folder, without logs and locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".log", ".lock"))
    return {path: path.read_bytes() for path in files}


def assert_kept(before: dict[Path, bytes], folder: Path) -> None:
    """Check that no file was changed or removed, and that there are no partial files."""
    after = snapshot(folder)
    for path, content in before.items():
        assert after.get(path) == content, f"{path} changed"
    assert not [path for path in after if path.name.endswith(".part")]


def on_a_full_disk(limit: int, script: str, *flags: object) -> Result:
    """Run a script in a process in which no file can grow beyond ``limit`` bytes."""
    return Forked(script, *flags, prepare=lambda: setrlimit(RLIMIT_FSIZE, (limit, limit))).result()


@contextmanager
def spoilt(path: Path, content: bytes | None) -> Iterator[None]:
    """Replace a file's contents (None removes the file), and restore it on exit."""
    old = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(old)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Run as user nobody, because root can read everything."""
    user = os.geteuid()
    if not user:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


class RunsCode:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.proof, "code ran"))
