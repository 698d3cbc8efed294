"""The page of differences names flags and values that exist."""

import re

import pytest
from support import ROOT
from test_bad_flags import SCRIPTS, parsers

from src.cli import PAPER_FLAGS
from src.models import MODELS

TEXT = (ROOT / "docs" / "differences.md").read_text()
EXAMPLES = [f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.py"))]


@pytest.fixture(scope="module")
def known():
    flags = set()
    with pytest.MonkeyPatch.context() as patch:
        for script in (*SCRIPTS, *EXAMPLES):
            if script != "fetch_scores.py":
                flags |= parsers(script, patch)._option_string_actions.keys()
    return flags


def test_every_flag_that_it_names_exists(known):
    named = set(re.findall(r"`[^`]*?(--\w+)", TEXT))
    assert len(named) > 20
    assert named - known == set()


def test_every_table_has_four_columns_and_every_script_exists():
    for line in TEXT.splitlines():
        if line.startswith("|"):
            assert line.count("|") == 5, line
    for name in re.findall(r"`(\w+\.py)", TEXT):
        assert (ROOT / name).exists() or (ROOT / "examples" / name).exists(), name


def test_the_networks_whose_start_changed_are_named():
    for name, entry in MODELS.items():
        if entry.settings:
            assert f"`{name}`" in TEXT
    assert all(f"`--{name}`" in TEXT for name in ("wait_start", "out_folder", "pivots") if name in PAPER_FLAGS)
    assert "docs/differences.md" in (ROOT / "README.md").read_text()
