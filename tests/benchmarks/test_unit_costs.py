"""Fits of unit costs, the formulas of the studies' costs, and the tables in docs/scaling.md."""

import pytest
from support import ROOT

from benchmarks.unit_costs import Unit, flops, operations, studies, study_cost, study_table, unit_table
from src.artifacts.io import read_json


def test_the_fit_finds_planted_coefficients():
    linear = Unit("memory", "linear", "bytes", "examples", (10, 20, 40), (23.0, 43.0, 83.0))
    assert linear.fit == pytest.approx((3.0, 2.0))
    assert linear.error == pytest.approx(0.0, abs=1e-12)
    square = Unit("selection", "square", "CPU s", "examples", (10, 20, 40), (51.0, 201.0, 801.0), power=2)
    assert square.fit == pytest.approx((1.0, 0.5))
    bent = Unit("memory", "bent", "bytes", "examples", (1, 2, 3), (1.0, 4.0, 1.0))  # the fit is 2 everywhere
    assert bent.error == pytest.approx(1.0)


def test_costs_of_studies_count_every_training():
    found = studies()
    splits = dict(study_cost(found["samis_splits"]))
    runs = 5 * 10 * 160  # seeds, splits, epochs
    sgd, sam = (next(name for name in splits if f" {optimizer} " in name) for optimizer in ("sgd", "sam"))
    assert splits[sgd] == pytest.approx(runs * (45_000 + 2 * 10_000 / 3))
    assert splits[sam] == pytest.approx(runs * 45_000)
    forward = flops("resnet50", "cifar100")
    assert operations(list(splits.items())) == pytest.approx(
        forward * (3 * splits[sgd] + 6 * splits[sam] + 2 * 5 * 50_000)
    )
    retrained = dict(study_cost(found["mpe_fig2a"]))["retraining large_mlp mnist sgd 256"]
    assert retrained == 1001 * 300 * 60_000
    grid = dict(study_cost(found["pruning_grid"]))
    kept = 5 * 4.5 + 1  # five methods, fractions 0.1 to 0.9, and the full training set
    networks = 5 + 1  # of el2n and forget
    (images,) = grid.values()
    assert images == pytest.approx(
        3 * (80 * (kept * 50_000 + 46 * 10_000 / 3) + networks * 40 * (50_000 + 10_000 / 3))
    )


def test_the_page_has_the_measured_tables():
    units = {one["name"]: Unit(**{name: one[name] for name in Unit.__dataclass_fields__})
             for one in read_json(ROOT / "docs" / "results" / "unit_costs.json")["units"]}  # fmt: skip
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert unit_table(list(units.values())) in page
    table, costs = study_table(units)
    assert table in page
    assert costs.keys() >= {"samis_splits", "memorization", "pruning_grid", "geometry", "mpe_fig2a", "mpe_fig11d"}
