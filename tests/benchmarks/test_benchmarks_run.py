"""Every benchmark runs at toy size and returns well-formed rows; times are not judged."""

import math

import pytest
import torch

from benchmarks.common import PlainImages, Row, fast_batches, median_run, random_images, table
from benchmarks.run_all import MODULES, benchmarks_of


@pytest.fixture(autouse=True)
def threads():
    """Benchmarks run on one thread and may change the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in MODULES for name in benchmarks_of(module)])
def test_rows_are_well_formed(module, name):
    rows = benchmarks_of(module)[name](True)
    assert rows
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert isinstance(row, Row)
        assert row.name
        assert row.unit
        assert 0 < row.ours < math.inf
        for alternative in (row.authors, row.strongest):
            assert alternative is None or 0 < alternative < math.inf
        assert row.authors is None or row.strongest is not None
        assert row.target is None or row.target > 0
        assert not row.variant or (row.authors is None and row.strongest and row.target is None)
    for part in table({f"{module} {name}": rows}).split("\n\n"):
        assert len({len(line) for line in part.splitlines()}) == 1  # columns are aligned


def test_the_table_separates_variants_and_marks_missed_targets():
    rows = [Row("training", 400.0, 1.5, 2.0, "s", target=0.9), Row("ours", None, 3.0, 1.0, "s", variant=True)]
    alternatives, variants = table({"module name": rows}).split("\n\n")
    cells = [
        [cell.strip() for cell in part.splitlines()[-1].strip("|").split("|")] for part in (alternatives, variants)
    ]
    assert cells[0] == ["training", "400", "1.5", "2", "s", "200", "0.75", "0.9 (missed)", "`module name`"]
    assert cells[1] == ["ours", "3", "1", "s", "3", "`module name`"]


def test_the_run_with_the_median_ratio_counts():
    runs = [[Row("a", None, strongest, 2.0, "s"), Row("b", None, None, ours, "s")]
            for strongest, ours in ((8.0, 1.0), (2.0, 3.0), (4.0, 2.0))]  # fmt: skip
    assert [(row.strongest, row.ours) for row in median_run(runs)] == [(4.0, 2.0), (None, 2.0)]


def test_a_target_applies_to_the_strongest_alternative():
    assert Row("faster", 90.0, 6.0, 2.0, "s", target=3.0).met is True
    assert Row("slower", 90.0, 6.0, 2.0, "s", target=3.1).met is False
    assert Row("no target", 90.0, 6.0, 2.0, "s").met is None
    assert Row("no alternative", None, None, 2.0, "s", target=3.0).met is None
    row = Row("ratios", 90.0, 6.0, 3.0, "s")
    assert (row.authors_ratio, row.ratio) == (30.0, 2.0)


@pytest.mark.parametrize("augmented", [False, True])
def test_the_fast_loader_serves_each_example_once(augmented):
    images = random_images("cifar10", 10)
    normalization = images.entry.normalizations["samis"]
    pixels = images.fetch(torch.arange(10))
    served = list(fast_batches(pixels, torch.arange(10), 4, normalization, augmented=augmented))
    assert [len(batch) for batch, _ in served] == [4, 4, 2]
    assert sorted(torch.cat([labels for _, labels in served]).tolist()) == list(range(10))
    if not augmented:
        loader = torch.utils.data.DataLoader(PlainImages(images, augmented=False), 4)
        assert all(torch.equal(own[0], batch[0]) for own, batch in zip(served, loader, strict=True))
