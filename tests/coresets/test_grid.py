"""The table of a comparison: numbers agree with NumPy, and files round-trip."""

import csv
import json

import numpy as np
import pytest

from src.coresets.grid import markdown, summarize, write_table


def cell(method, share, seed, accuracy, *, shots=None, **changes):
    finished = accuracy is not None
    record = {
        "method": method,
        "share": share,
        "shots": shots,
        "seed": seed,
        "finished": finished,
        "accuracy": accuracy,
        "best": accuracy + 0.01 if finished else None,
        "epoch": 5 if finished else 0,
        "examples": 100 if finished else None,
        "selection_seconds": None,
        "training_seconds": float(seed) if finished else None,
    }
    return record | changes


@pytest.fixture
def records():
    rng = np.random.default_rng(0)
    draw = rng.uniform(0.3, 0.9, (2, 3, 3))
    return [
        cell(method, share, seed, float(draw[m, s, seed - 1]))
        for seed in (1, 2, 3)
        for m, method in enumerate(("random", "craig"))
        for s, share in enumerate((0.5, 0.1, 0.9))
    ]


def test_means_and_spreads_are_numpys(records):
    rows = summarize(records)
    assert [(row["method"], row["share"]) for row in rows] == [
        (method, share) for method in ("random", "craig") for share in (0.1, 0.5, 0.9)
    ]
    for row in rows:
        values = [r["accuracy"] for r in records if (r["method"], r["share"]) == (row["method"], row["share"])]
        base = [r["accuracy"] for r in records if (r["method"], r["share"]) == ("random", row["share"])]
        assert row["mean"] == pytest.approx(np.mean(values), abs=1e-15)
        assert row["std"] == pytest.approx(np.sqrt(np.sum((values - np.mean(values)) ** 2) / 2), abs=1e-15)
        assert row["best"] == pytest.approx(np.mean(values) + 0.01, abs=1e-15)
        assert row["over_random_points"] == pytest.approx(100 * (np.mean(values) - np.mean(base)), abs=1e-12)
        assert (row["seeds"], row["of_seeds"], row["examples"]) == (3, 3, 100)
        assert (row["selection_seconds"], row["training_seconds"]) == (None, 2.0)
    assert rows[0]["over_random_points"] == 0.0
    assert summarize(records[:6] + records[6:][::-1]) == rows  # to the last bit


def test_one_seed_has_no_spread():
    rows = summarize([cell("random", 0.1, 7, 0.5), cell("craig", 0.1, 7, 0.625)])
    assert [row["std"] for row in rows] == [None, None]
    assert rows[1]["over_random_points"] == 12.5
    text = markdown(rows)
    assert "**62.5**" in text
    assert "±" not in text
    assert text.startswith("Test accuracy in percent after the last epoch, one seed; columns: fraction of")


def test_unfinished_cells_are_left_out_and_counted():
    records = [
        cell("random", 0.1, 1, 0.5),
        cell("random", 0.1, 2, 0.75),
        cell("random", 0.1, 3, 0.01, finished=False),  # interrupted: its partial result does not count
        cell("craig", 0.1, 1, None),
        cell("craig", 0.1, 2, None),
        cell("craig", 0.5, 1, 0.25),
    ]
    random, craig, half = summarize(records)
    assert (random["mean"], random["seeds"], random["of_seeds"]) == (0.625, 2, 3)
    assert (craig["mean"], craig["std"], craig["seeds"], craig["over_random_points"]) == (None, None, 0, None)
    assert half["over_random_points"] is None  # random has no run with this fraction
    lines = markdown([random, craig, half], "lenet on digits").splitlines()
    assert lines[0] == (
        "lenet on digits: test accuracy in percent after the last epoch, mean ± standard deviation over 3 seeds; "
        "columns: fraction of examples kept; bold: best mean in the column; -: no finished run."
    )
    assert [[entry.strip() for entry in line.split("|")[1:-1]] for line in lines[4:]] == [
        ["random", "62.5 ± 17.7 (2 of 3 seeds)", "-"],  # alone in its column: no best value is marked
        ["craig", "-", "25.0 (1 of 3 seeds)"],
    ]


def test_the_best_mean_of_each_column_is_bold(records):
    rows = summarize(records)
    lines = markdown(rows).splitlines()
    assert lines[1] == ""
    assert len({len(line) for line in lines[2:]}) == 1  # aligned
    entries = [[entry.strip() for entry in line.split("|")[1:-1]] for line in lines[4:]]
    for column, share in enumerate((0.1, 0.5, 0.9), start=1):
        means = {row["method"]: row["mean"] for row in rows if row["share"] == share}
        for entry in entries:
            assert entry[column].startswith("**") == (means[entry[0]] == max(means.values()))
    tied = summarize([cell("random", 0.1, 1, 0.5), cell("craig", 0.1, 1, 0.5)])
    assert markdown(tied).count("**50.0**") == 2


def test_examples_per_class_and_the_whole_set():
    records = [cell("random", None, 1, 0.5 + n / 100, shots=n) for n in (10, 1, 2)] + [cell("random", 1.0, 1, 0.95)]
    rows = summarize(records)
    assert [(row["shots"], row["share"]) for row in rows] == [(1, None), (2, None), (10, None), (None, 1.0)]
    header = markdown(rows).splitlines()[2]
    assert [entry.strip() for entry in header.split("|")[1:-1]] == [
        "method",
        "1 per class",
        "2 per class",
        "10 per class",
        "all",
    ]
    assert "columns: examples kept per class" in markdown(rows)


def test_the_files_read_back(tmp_path, records):
    records.append(cell("el2n", 0.1, 1, None))
    rows = summarize(records)
    settings = {"model": "lenet", "dataset": "digits", "epochs": 5}
    stem = tmp_path / "plots" / "rate_0.1"  # a dot in the name is not a file extension
    paths = write_table(stem, rows, records, settings)
    assert [path.name for path in paths] == ["rate_0.1.csv", "rate_0.1.json", "rate_0.1.md"]
    assert sorted(path.name for path in stem.parent.iterdir()) == [path.name for path in paths]
    with paths[0].open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, rows, strict=True):
        assert line["method"] == row["method"]
        for key in line.keys() - {"method"}:
            assert (float(line[key]) if line[key] else None) == row[key]  # to the last bit
    stored = json.loads(paths[1].read_text())
    assert stored == {"settings": settings, "rows": rows, "cells": records}
    assert paths[2].read_text() == markdown(rows, "lenet on digits")
