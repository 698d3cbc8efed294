"""The documents and the registry say the same."""

import pytest
from support import ROOT

from src.coresets import METHODS, find_method, method_table
from src.errors import ArgumentError

PAPERS = ["craig", "glister", "gradmatch", "forget", "grand", "el2n", "infobatch", "graph_cut", "random", "min_mem",
          "min_forg", "min_etl", "min_eps", "min_flat", "min_sam-sgd-loss", "min_sam-sgd-prob"]  # fmt: skip


def test_the_table_is_the_registry():
    assert method_table() in (ROOT / "src" / "coresets" / "README.md").read_text(), (
        "put the output of src.coresets.method_table() into src/coresets/README.md"
    )


def test_every_method_is_named_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [name for name in METHODS if not name.startswith("min_") and f"`{name}`" not in text] == []
    assert [name for name in PAPERS if name not in METHODS] == []


def test_an_unknown_method_lists_the_choices():
    with pytest.raises(ArgumentError, match=r"unknown; choose from random, .*craig.*herding"):
        find_method("nope")
