"""The grid of pruning runs is filled exactly once, by one or several processes, even if some are killed."""

import csv
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from refusals import FILE, FLAG, refuse, spoilt
from support import TRAIN, Forked, call, folders, succeed, write_blobs

from src.artifacts.io import read_json, save_figure
from src.coresets.runner import CoresetRun

TRAINING = ("--coreset_epochs=2", "--batch_size=16", "--learning_rate=0.05", "--lr_sched=const",
            "--coreset_pretrain_epochs=2", "--coreset_pretrain_lr=0.05", "--coreset_networks=2")  # fmt: skip
GRID = ("--model=small_mlp", "--funcs", "random", "el2n", "infobatch_dynamic", "--fractions", "0.2", "0.5",
        "--seeds", "1", "2", *TRAINING)  # fmt: skip
CELLS = 3 * 2 * 2


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("blobs") / "blobs.npz", n=90)


def flags(blobs, base, *more):
    return (f"--dataset=npz:{blobs}", *GRID, *more, *folders(base, *TRAIN, "plots"))


def comparison(base, ending):
    (path,) = (base / "plots" / "pruning").glob(f"*/comparison.{ending}")
    return path


def results(base):
    return {path.parent: path for path in (base / "models").glob("*_static_coreset_*/seed_*/results.json")}


def test_a_grid_is_filled_once(blobs, tmp_path):
    result = succeed("compare_pruning.py", *flags(blobs, tmp_path, "--full"))
    assert result.err.count("cell ") >= CELLS + 2
    content = read_json(comparison(tmp_path, "json"))
    assert len(content["cells"]) == CELLS + 2
    assert all(cell["finished"] for cell in content["cells"])
    for cell in content["cells"]:
        run = (
            f"{cell['method']}_static_coreset_large_{cell['share']}_small_mlp_over_*/seed_{cell['seed']}/results.json"
        )
        (path,) = (tmp_path / "models").glob(run)
        assert cell["accuracy"] == read_json(path)["history"][-1]["test_accuracy"]
    with comparison(tmp_path, "csv").open() as file:
        rows = list(csv.DictReader(file))
    row = next(row for row in rows if row["method"] == "el2n" and row["share"] == "0.5")
    accuracies = [c["accuracy"] for c in content["cells"] if (c["method"], c["share"]) == ("el2n", 0.5)]
    assert float(row["mean"]) == pytest.approx(np.mean(accuracies))
    assert float(row["std"]) == pytest.approx(np.std(accuracies, ddof=1))
    assert "| el2n" in comparison(tmp_path, "md").read_text()
    assert comparison(tmp_path, "png").stat().st_size > 10_000
    assert comparison(tmp_path, "pdf").exists()
    assert not list((tmp_path / "resume_ckpts").rglob("*.pth.tar"))  # of finished runs
    before = {folder: path.stat().st_mtime_ns for folder, path in results(tmp_path).items()}
    again = succeed("compare_pruning.py", *flags(blobs, tmp_path, "--full"))
    assert "cell 1 of" not in again.err
    assert {folder: path.stat().st_mtime_ns for folder, path in results(tmp_path).items()} == before
    more = succeed("compare_pruning.py", *flags(blobs, tmp_path, "--full"), "--fractions", "0.2", "0.5", "0.9")
    assert more.err.count(" of 20: ") == 6  # new cells


@pytest.mark.parametrize(
    ("more", "minutes", "expected"),
    [
        ((), 0.0, [0, 1, 2, 3, "figure of 4"]),
        ((), 0.7, [0, 1, "figure of 2", 2, 3, "figure of 4", "figure of 4"]),
        (
            ("--overwrite",),
            0.0,
            [0, "figure of 1", 1, 2, 3, "figure of 4"],
        ),  # existing files may belong to a different grid
    ],
)
def test_the_table_grows_with_each_cell_and_is_drawn_once_a_minute(
    blobs, tmp_path, monkeypatch, more, minutes, expected
):
    """The contents of the table at the start of each cell and at each drawing, for a given time per cell."""
    now, seen, train = [0.0], [], CoresetRun.train

    def finished():
        tables = list(tmp_path.glob("plots/pruning/*/comparison.json"))
        return sum(cell["finished"] for cell in read_json(tables[0])["cells"]) if tables else 0

    def training(run):
        seen.append(finished())
        now[0] += 60.0 * minutes
        return train(run)

    def drawing(figure, stem):
        seen.append(f"figure of {finished()}")
        return save_figure(figure, stem)

    monkeypatch.setattr("src.coresets.grid.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("src.coresets.grid.save_figure", drawing)
    monkeypatch.setattr(CoresetRun, "train", training)
    succeed("compare_pruning.py", *flags(blobs, tmp_path), "--funcs", "random", *more)
    assert seen == expected


def test_finished_cells_need_no_lock(blobs, tmp_path):
    grid = (*flags(blobs, tmp_path), "--funcs", "random", "--fractions", "0.5", "--seeds", "1")
    succeed("compare_pruning.py", *grid)
    (path,) = results(tmp_path).values()
    (path.parent / "claim.lock").unlink()
    (path.parent / "claim.lock").mkdir()  # as if the folder were not writable
    succeed("compare_pruning.py", *grid)


def test_train_prune_makes_the_same_cell(blobs, tmp_path):
    single = ("train_prune.py", f"--dataset=npz:{blobs}", "--model=small_mlp", "--coreset_func=el2n",
              "--coreset_fraction=0.5", "--seed=2", *TRAINING)  # fmt: skip
    succeed(*single, *folders(tmp_path / "single", *TRAIN))
    succeed("compare_pruning.py", *flags(blobs, tmp_path / "grid"), "--funcs", "el2n", "--seeds", "2")
    name = "el2n_static_coreset_large_0.5_*/seed_2/results.json"
    histories = [
        [(record["train_loss"], record["test_accuracy"]) for record in read_json(path)["history"]]
        for where in ("single", "grid")
        for path in (tmp_path / where / "models").glob(name)
    ]
    assert len(histories) == 2
    assert histories[0] == histories[1]


def test_processes_share_a_grid_though_one_is_killed(blobs, tmp_path):
    """Two processes start together and one is killed: the other does the remaining work and repeats nothing."""
    first, second = (Forked("compare_pruning.py", *flags(blobs, tmp_path)) for _ in range(2))
    deadline = time.monotonic() + 300
    while len(results(tmp_path)) < 3 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.05)
    first.kill()
    _, killed_log = first.communicate()
    _, log = second.communicate(timeout=500)
    assert second.returncode == 0, log
    content = read_json(comparison(tmp_path, "json"))
    assert all(cell["finished"] for cell in content["cells"])
    starts = [
        line.split(": ", 1)[1] for text in (killed_log, log) for line in text.splitlines() if " of 12: " in line
    ]
    twice = {name for name in starts if starts.count(name) > 1}
    assert len(twice) <= 2  # the killed run, and those that waited for its pretraining
    assert len(set(starts)) == CELLS


def test_a_partial_grid_is_a_table_too(blobs, tmp_path):
    succeed("train_prune.py", f"--dataset=npz:{blobs}", "--model=small_mlp", "--coreset_func=random",
            "--coreset_fraction=0.2", *TRAINING, *folders(tmp_path, *TRAIN))  # fmt: skip
    result = succeed("compare_pruning.py", *flags(blobs, tmp_path), "--table_only")
    assert "1 of 2 seeds" in result.out
    assert len(results(tmp_path)) == 1


def test_damaged_tables_and_results_are_named(blobs, tmp_path):
    table = (f"--dataset=npz:{blobs}", "--model=small_mlp", "--funcs", "random", "--fractions", "0.5", *TRAINING,
             "--seeds", "1", *folders(tmp_path, *TRAIN, "plots"))  # fmt: skip
    succeed("compare_pruning.py", *table)
    (path,) = results(tmp_path).values()
    content, history = read_json(path), read_json(path)["history"]
    for changes, says in (
        ({"best_test_accuracy": ["a"]}, "best_test_accuracy is not a number"),
        ({"seconds": "long"}, "seconds is not a number"),
        ({"history": 5}, "history is not a list"),
        ({"history": [*history[:1], None]}, "no accuracy for epoch 2"),
        (
            {"history": [*history[:1], {**history[1], "test_accuracy": "a"}]},
            "record of epoch 2 does not consist of numbers",
        ),
    ):
        with spoilt(path, json.dumps({**content, **changes}).encode()):
            refuse("compare_pruning.py", *table, status=FILE, says=(r"results\.json: is damaged", says))
    path = comparison(tmp_path, "json")
    for damaged, says in (
        ([1], "was not written by this script"),
        ({"settings": 3}, "was not written by this script"),
    ):
        with spoilt(path, json.dumps(damaged).encode()):
            refuse("compare_pruning.py", *table, status=FILE, says=(r"comparison\.json: ", says, "--overwrite"))
    for cells in (5, [5], [{}], [{"method": [], "share": 0.5, "shots": None, "seed": 1}]):
        with spoilt(path, json.dumps({**read_json(path), "cells": cells}).encode()):
            refuse(
                "compare_pruning.py",
                *table,
                status=FILE,
                says=("is damaged or was not written by this script", "--overwrite"),
            )


def test_a_grid_of_shots(blobs, tmp_path):
    shots = [
        flag for flag in flags(blobs, tmp_path) if flag not in ("--fractions", "0.2", "0.5", "infobatch_dynamic")
    ]
    shots += ["--seeds", "1"]
    succeed("compare_pruning.py", *shots, "--shots", "2", "5")
    cells = read_json(comparison(tmp_path, "json"))["cells"]
    assert {cell["examples"] for cell in cells} == {6, 15}
    refuse("compare_pruning.py", *shots, "--shots_up_to", "2", "5", status=FILE, says=("shots_up_to",))
    succeed("compare_pruning.py", *shots, "--shots_up_to", "2", "99", "--name=up_to")
    cells = read_json(comparison(tmp_path, "json").with_name("up_to.json"))["cells"]
    assert {cell["examples"] for cell in cells} == {6, 90}


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (("--fractions", "0"), FLAG, ("--fractions", "above 0")),
        (("--funcs", "nope"), FLAG, ("--funcs", "unknown method 'nope'")),
        (("--funcs", "min_csl"), FILE, ("no cumulative sample loss scores", "average_scores.py")),
        (("--funcs", "tdds"), FLAG, ("--coreset_pretrain_epochs 2", "tdds")),
        (("--shots", "2"), FLAG, ("not allowed with",)),
        (("--seeds", "-1"), FLAG, ("--seeds",)),
        (("--name=../table",), FLAG, ("--name", "without folders")),
        (("--resume",), FLAG, ("--resume: unknown",)),
        (("--optimizer=iblr",), FLAG, ("--optimizer iblr", "infobatch_dynamic")),
    ],
)
def test_what_cannot_be_is_found_before_the_first_run(blobs, tmp_path, more, status, says):
    refuse("compare_pruning.py", *flags(blobs, tmp_path), *more, status=status, says=says)
    assert not results(tmp_path)


def test_a_table_of_other_settings_is_kept(blobs, tmp_path):
    small = (*flags(blobs, tmp_path), "--funcs", "random", "--fractions", "0.5", "--seeds", "1")
    succeed("compare_pruning.py", *small)
    says = (r"learning_rate \(0.05 vs. 0.1\)", "--overwrite")
    refuse("compare_pruning.py", *small, "--learning_rate=0.1", status=FILE, says=says, keep=tmp_path)
    succeed("compare_pruning.py", *small, "--learning_rate=0.1", "--overwrite")


def test_a_table_does_not_say_what_its_cells_compare(blobs, tmp_path):
    """Older tables record what --selection_subsample was, or not at all; for small groups auto is exact."""
    grid = (*flags(blobs, tmp_path), "--funcs", "k_center", "--fractions", "0.5", "--seeds", "1")
    succeed("compare_pruning.py", *grid)
    (path,) = tmp_path.glob("**/comparison.json")
    content = read_json(path)
    assert "selection_subsample" not in content["settings"]
    for recorded in ("auto", "exact"):
        path.write_text(json.dumps({**content, "settings": {**content["settings"], "selection_subsample": recorded}}))
        succeed("compare_pruning.py", *grid, "--table_only")
    succeed("compare_pruning.py", *grid, "--selection_subsample=exact")
    refuse("compare_pruning.py", *grid, "--selection_subsample=0.4", status=FILE, says="selection_subsample")


def test_a_table_with_more_cells_is_kept(blobs, tmp_path):
    grid = (*flags(blobs, tmp_path), "--funcs", "random", "--seeds", "1")
    succeed("compare_pruning.py", *grid)
    fewer = (*grid, "--fractions", "0.5", "--table_only")
    says = ("1 cells that this grid lacks, such as random 0.2 seed 1", "another --name")
    refuse("compare_pruning.py", *fewer, status=FILE, says=says, keep=tmp_path)
    succeed("compare_pruning.py", *fewer, "--name=half", "--coreset_pretrain_epochs=9")  # which is not read


def test_a_table_that_another_grid_wrote_meanwhile_is_kept(blobs, tmp_path, monkeypatch):
    grid = (*flags(blobs, tmp_path), "--seeds", "1")
    succeed("compare_pruning.py", *grid, "--funcs", "random")
    monkeypatch.setattr("src.coresets.grid.Grid.check", lambda grid: None)  # there was no table yet when it started
    refuse("compare_pruning.py", *grid, "--funcs", "csl", status=FILE, keep=tmp_path,
           says=("2 cells that this grid lacks", "another --name"))  # fmt: skip


def test_overwriting_replaces_unfinished_cells(blobs, tmp_path):
    """A run with resume states, as after an interruption, and different settings."""
    succeed("train_prune.py", f"--dataset=npz:{blobs}", "--model=small_mlp", "--coreset_func=random",
            "--coreset_fraction=0.5", *TRAINING, *folders(tmp_path, *TRAIN))  # fmt: skip
    other = ("--funcs", "random", "--fractions", "0.5", "--seeds", "1", "--learning_rate=0.1")
    small = (*flags(blobs, tmp_path), *other)
    says = ("was made with different settings", r"learning_rate \(0.05 vs. 0.1\)", "--overwrite")
    refuse("compare_pruning.py", *small, status=FILE, says=says)
    succeed("compare_pruning.py", *small, "--overwrite")
    (path,) = results(tmp_path).values()
    assert read_json(path)["settings"]["learning_rate"] == 0.1


def test_cells_of_other_settings_are_found_before_the_first_run(blobs, tmp_path):
    one = (*flags(blobs, tmp_path), "--funcs", "random", "--fractions", "0.5", "--seeds", "2", "--name=one")
    succeed("compare_pruning.py", *one)
    says = (r"weight_decay \(0.0 vs. 0.01\)", "--overwrite")
    refuse(
        "compare_pruning.py", *flags(blobs, tmp_path, "--weight_decay=0.01"), status=FILE, says=says, keep=tmp_path
    )
    assert len(results(tmp_path)) == 1


def test_cells_that_diverge_do_not_stop_the_others(blobs, tmp_path):
    wild = (*flags(blobs, tmp_path), "--funcs", "random", "--seeds", "1", "--learning_rate=1e38")
    result = call("compare_pruning.py", *wild)
    assert result.status == FILE
    assert "2 of 2 cells failed" in result.complaint
    assert "learning rate" in result.complaint
