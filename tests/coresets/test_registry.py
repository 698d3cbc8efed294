"""The documentation and the registry agree."""

import re
import shutil
import subprocess
import sys

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


def test_every_method_is_named_on_the_page_of_pruning():
    text = (ROOT / "docs" / "pruning.md").read_text()
    assert [name for name in METHODS if not name.startswith("min_") and f"`{name}`" not in text] == []
    assert [name for name in PAPERS if name not in METHODS] == []


def test_a_method_is_one_file(tmp_path):
    """Adding one file to a copy of the package adds the method, its flags and its line in the help text."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.pkl", "*.npz"))
    shutil.copy(ROOT / "train_prune.py", tmp_path)
    (tmp_path / "src" / "coresets" / "first.py").write_text(
        "from dataclasses import dataclass\n"
        "from src.cli import number, option\n"
        "from src.coresets.inputs import Method, Needs, Options, Selection\n"
        "@dataclass(frozen=True)\n"
        "class FirstOptions(Options):\n"
        "    skipped: int = option(0, 'first: examples to skip', number(int, 0))\n"
        "def first(inputs, groups, options):\n"
        "    return Selection.of([g.positions[options.skipped :][: g.budget] for g in groups])\n"
        "METHODS = (Method('first', first, Needs(), 'nobody', 'the first', 'k', options=FirstOptions),)\n"
    )
    script = [sys.executable, str(tmp_path / "train_prune.py")]
    shown = subprocess.run([*script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "examples to skip" in shown
    assert re.search(r"selection method: [^:]*\bfirst\b", shown)
    refused = subprocess.run([*script, "--coreset_func=random", "--skipped=1"], capture_output=True, text=True)
    assert (refused.returncode, "without first" in refused.stderr) == (2, True)


def test_an_unknown_method_lists_the_choices():
    with pytest.raises(ArgumentError, match=r"unknown; choose from random, .*craig.*herding"):
        find_method("nope")
