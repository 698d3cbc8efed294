"""Helpers that run scripts as users do, and small data sets in the format of users' own data."""

import contextlib
import importlib.util
import io
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# The published score files are in a folder next to the checkout, or where fetch_scores.py puts them.
_FETCHED = ("forgettability/forg_cifar10.pkl", "memorization/cifar100_infl_matrix.npz", "sam_sgd/samis_loss_svhn.pkl")
PUBLISHED = next(
    (
        folder
        for folder in (SHARED / "published_scores", ROOT / "src" / "metrics")
        if all((folder / file).exists() for file in _FETCHED)
    ),
    None,
)
needs_published = pytest.mark.skipif(
    PUBLISHED is None,
    reason="needs the published scores: run fetch_scores.py with --dataset=cifar10, cifar100 and svhn",
)


@dataclass(frozen=True)
class Result:
    """Exit status and output of a script."""

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The last line of the error output."""
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


def call(script: str, *flags: object) -> Result:
    """Run a script in this process, which is fast. Flags are converted to strings."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [str(ROOT / script), *map(str, flags)]
    status: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = argv
    return Result(int(status or 0), out.getvalue(), err.getvalue())


def succeed(script: str, *flags: object) -> Result:
    """Run a script that must succeed."""
    result = call(script, *flags)
    assert result.status == 0, result.err
    return result


def example(name: str):
    """Import a script of ``examples/`` as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


class Forked:
    """A script in a forked process. It starts at once, because torch is already imported, and exits like any process.

    Args:
        script: A script's name in the repository, or any path.
        flags: Its flags, converted to strings.
        cwd: The working directory.
        environment: Additional environment variables.
        prepare: Called in the process before the script.
    """

    def __init__(self, script, *flags, cwd=None, environment=None, prepare=None) -> None:
        self.returncode: int | None = None
        self._written: dict[int, str] = {}
        pipes = {descriptor: os.pipe() for descriptor in (1, 2)}
        self._pid = os.fork()
        if self._pid:
            self._readers = [threading.Thread(target=self._read, args=(d, pipe[0])) for d, pipe in pipes.items()]
            for reader, (_, writing) in zip(self._readers, pipes.values(), strict=True):
                os.close(writing)
                reader.start()
            return
        status: object = 1
        try:
            for descriptor, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
                os.dup2(pipes[descriptor][1], descriptor)
                stream = open(descriptor, "w", buffering=1, errors=errors, closefd=False)  # noqa: SIM115
                setattr(sys, name, stream)
                setattr(sys, f"__{name}__", stream)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            tqdm.set_lock(threading.RLock())  # its lock is shared with forked processes, including killed ones
            os.environ.update(environment or {})
            os.chdir(cwd or os.getcwd())
            if prepare:
                prepare()
            sys.argv = [str(ROOT / script), *map(str, flags)]
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                with contextlib.suppress(OSError):
                    stream.flush()
            os._exit(int(status))

    def _read(self, descriptor: int, pipe: int) -> None:
        with open(pipe, errors="surrogateescape") as file:
            self._written[descriptor] = file.read()

    def poll(self) -> int | None:
        """Return the exit status (negative for a signal), or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def communicate(self, timeout: float = 400) -> tuple[str, str]:
        """Wait until it ends and return its standard output and error."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"still running after {timeout} s")
            time.sleep(0.01)
        for reader in self._readers:
            reader.join(timeout)
        return self._written[1], self._written[2]

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self._pid, number)

    def kill(self) -> None:
        """Kill it without cleanup."""
        self.send_signal(signal.SIGKILL)

    def result(self) -> Result:
        """Wait until it ends and return the result."""
        out, err = self.communicate()
        return Result(self.returncode, out, err)


def as_torchrun(world: int, script: str | Path, *flags: object) -> list[Result]:
    """Run a script in several processes, with the environment variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
    started = [
        Forked(script, *flags, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    return [process.result() for process in started]


def folders(base: Path, *names: str) -> list[str]:
    """Return flags that put folders inside ``base``."""
    return [f"--{name}_folder={base / name}" for name in names]


TRAIN = ("datasets", "models", "metrics", "log", "resume_ckpts")


def write_blobs(path: Path, n: int = 120, classes: int = 3, size: int = 8, channels: int = 1, **changes) -> Path:
    """Write a learnable data set: each class has its own blurred pattern, plus noise."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(40, 216, (classes, size, size, channels))
    arrays = {}
    for part, count in (("train", n), ("test", max(n // 4, classes))):
        labels = np.arange(count) % classes
        noise = rng.normal(0, 25, (count, size, size, channels))
        arrays[f"x_{part}"] = np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8)
        arrays[f"y_{part}"] = labels.astype(np.int64)
    arrays.update(changes)
    np.savez(path, **arrays)
    return path
