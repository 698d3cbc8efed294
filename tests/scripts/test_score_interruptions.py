"""A script that writes scores can be killed before or after writing any file, and succeeds when it is rerun."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from refusals import snapshot
from support import folders, succeed

from src.artifacts.store import read_record, read_scores, record_path
from src.errors import FileError
from src.metrics import SCORES


class Killed(BaseException):
    """The process is killed here."""


def kill_points(monkeypatch: pytest.MonkeyPatch, run: Callable[[], None]) -> Iterator[int]:
    """For each k, run until just before or after the k-th file is renamed; yield after each run."""
    replace, left = os.replace, 0

    def dying(source: str, target: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        replace(source, target)
        left -= 1
        if left == 0:
            raise Killed

    for point in range(1, 100):
        left = point
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            try:
                run()
            except Killed:
                pass
            else:
                return
        yield point


def assert_whole_or_refused(path: Path, allowed: list[tuple[bytes, bytes | None]]) -> None:
    """A reader finds scores with their record, or an error that they do not match."""
    if not path.exists():
        return
    beside = record_path(path)
    pair = path.read_bytes(), beside.read_bytes() if beside.exists() else None
    if pair not in allowed:
        with pytest.raises(FileError, match=r"does not match .*; one of them was replaced"):
            read_scores(path)


@pytest.mark.parametrize("before", ["nothing", "other settings", "no record"])
def test_average_scores(world, tmp_path, monkeypatch, before):
    modes = ("samis_loss", "mean_loss")
    paths = [SCORES[mode].path(tmp_path / "now" / "metrics", world.name) for mode in modes]
    start, now = tmp_path / "start", tmp_path / "now"
    for seed in ("1", "2"):
        shutil.copytree(world.seed_file.parents[1] / seed, start / "metrics" / world.name / "small_mlp" / seed)
    if before != "nothing":
        succeed("average_scores.py", world.dataset, "--model=small_mlp", "--seeds", "1", "--modes", *modes,
                *folders(start, "metrics"))  # fmt: skip
    if before == "no record":
        for path in (start / "metrics").rglob("*.json"):
            path.unlink()
    flags = (world.dataset, "--model=small_mlp", "--seeds", "1", "2", "--modes", *modes, *folders(now, "metrics"))
    flags += () if before == "nothing" else ("--overwrite",)

    def pair(path: Path) -> tuple[bytes, bytes | None]:
        return path.read_bytes(), record_path(path).read_bytes() if record_path(path).exists() else None

    def with_table(path: Path) -> tuple[bytes, bytes]:
        return path.read_bytes(), path.with_suffix(".csv").read_bytes()

    shutil.copytree(start, now)
    old = [[pair(path)] if path.exists() else [] for path in paths]
    tables = [with_table(path) for path in paths if path.exists()]
    succeed("average_scores.py", *flags)
    tables += [with_table(path) for path in paths]
    whole, new = snapshot(now), [pair(path) for path in paths]
    shutil.rmtree(now)
    shutil.copytree(start, now)
    points = []
    for point in kill_points(monkeypatch, lambda: succeed("average_scores.py", *flags)):
        points.append(point)
        for path, was, wanted in zip(paths, old, new, strict=True):
            assert_whole_or_refused(path, [*was, wanted])
            if path.exists() and path.with_suffix(".csv").exists():
                assert with_table(path) in tables  # never the table of other scores
        succeed("average_scores.py", *flags)
        assert snapshot(now) == whole
        shutil.rmtree(now)
        shutil.copytree(start, now)
    assert len(points) == 3 * 2 * len(modes)  # the pickle, the json file and the table


def test_scores_of_an_experiment(tmp_path, monkeypatch):
    def flags(base: Path) -> tuple:
        return ("examples/1_loo_iterations.py", "--dataset=digits", "--subset=60", "--model=small_mlp", "--epochs=1",
                "--bs=30", "--delta=2", "--var_version=diag", "--lr=0.01", "--lrmin=0.001", "--name_exp=killed",
                "--write_scores", *folders(base, "datasets", "models", "log", "resume_ckpts", "pickles", "metrics")
                )  # fmt: skip

    succeed(*flags(tmp_path / "whole"))
    wanted = SCORES["mpe"].path(tmp_path / "whole" / "metrics", "digits")
    points = []
    for point in kill_points(monkeypatch, lambda: succeed(*flags(tmp_path / f"{len(points)}"))):
        base = tmp_path / f"{len(points)}"
        points.append(point)
        path = SCORES["mpe"].path(base / "metrics", "digits")
        if not record_path(path).exists():
            continue
        succeed(*flags(base))
        assert path.read_bytes() == wanted.read_bytes()
        assert read_record(path) == read_record(wanted)
        assert read_scores(path).shape == (1438,)
    assert len(points) >= 4
