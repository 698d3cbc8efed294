"""Help and the answers to bad flags need none of the large packages, which take seconds to import."""

import json
import subprocess
import sys

import pytest
from support import ROOT

SCRIPTS = sorted(str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / "examples") for path in folder.glob("*.py"))

# Answers all command lines in one process, in which the large packages cannot be imported.
ANSWER = """
import contextlib, io, json, runpy, sys

for name in ("torch", "torchvision", "matplotlib", "scipy", "sklearn", "pandas", "PIL"):
    sys.modules[name] = None
script, *lines = map(json.loads, sys.argv[1:])
for line in lines:
    sys.argv = [script, *line]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


def answers(script: str, *lines: list[str]) -> list[tuple[int, str, str]]:
    """Exit status, output and error output of a script for each command line."""
    words = [json.dumps(word) for word in (str(ROOT / script), *lines)]
    ran = subprocess.run([sys.executable, "-c", ANSWER, *words], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return [tuple(json.loads(line)) for line in ran.stdout.splitlines()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_unknown_flags_import_no_large_package(script):
    helped, unknown = answers(script, ["--help"], ["--no_such_flag=1"])
    assert helped[0] == 0
    assert "--" in helped[1]
    assert helped[2] == ""
    assert unknown[0] == 2
    assert len(unknown[2].splitlines()) == 1
