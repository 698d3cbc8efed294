"""Running scripts as users do, and small data sets of the user's own."""

import contextlib
import importlib.util
import io
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# The published score files: in a folder beside the checkout, or where fetch_scores.py puts them.
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
    """How a script ended."""

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The last line of the error output."""
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


def call(script: str, *flags: object) -> Result:
    """Run a script within this process (fast); flags are turned into strings."""
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
    """A script of ``examples/`` as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def start(script: str, *flags: object, cwd: Path | None = None) -> subprocess.Popen:
    """Start a script as a process of its own, from any folder."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def folders(base: Path, *names: str) -> list[str]:
    """Folder flags below ``base``."""
    return [f"--{name}_folder={base / name}" for name in names]


TRAIN = ("datasets", "models", "metrics", "log", "resume_ckpts")


def write_blobs(path: Path, n: int = 120, classes: int = 3, size: int = 8, channels: int = 1, **changes) -> Path:
    """A data set that can be learned: each class has its own blurred pattern, under noise."""
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
