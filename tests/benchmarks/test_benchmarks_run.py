"""Every benchmark runs at toy size and returns plausible rows. Times are not checked."""

import math

import pytest
import torch

from benchmarks.common import Row, table
from benchmarks.run_all import MODULES, benchmarks_of


@pytest.fixture(autouse=True)
def threads():
    """Benchmarks run on one thread, and may change the number of threads."""
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
        assert 0 < row.plain < math.inf
        assert 0 < row.ours < math.inf
        assert row.target is None or row.target > 0
    lines = table(rows).splitlines()
    assert len(lines) == len(rows) + 1
    assert len({len(line.rsplit("  ", 1)[0]) for line in lines}) == 1  # columns are aligned


def test_a_row_says_whether_its_target_is_met():
    assert Row("faster", 6.0, 2.0, "s", target=3.0).met is True
    assert Row("slower", 6.0, 2.0, "s", target=3.1).met is False
    assert Row("no target", 6.0, 2.0, "s").met is None
    assert Row("twice", 6.0, 3.0, "s").ratio == 2.0
