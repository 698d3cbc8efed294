"""Flags generated from dataclasses: names, types, defaults, and when they have an effect; log files of runs."""

import logging
from dataclasses import dataclass

import pytest
from support import Forked

from src.cli import Parser, build, log_to, number, option
from src.errors import FileError, FlagError


@dataclass(frozen=True)
class Config:
    steps: int = option(3, "steps", number(int, 1))
    kind: str = option("a", "kind", choices=("a", "b"))
    fast: bool = option(False, "fast")
    exact: bool = option(True, "exact", negatable=True, acts=(lambda args: args.kind == "b", "without --kind=b"))
    names: tuple[str, ...] = option([], "names", nargs="+")
    first: str | None = option(None, "first", exclusive="which")
    second: str | None = option(None, "second", exclusive="which")
    made: str = "elsewhere"


def parse(*words, **keywords):
    parser = Parser("test")
    parser.add(Config, "settings", **keywords)
    return build(Config, parser.parse_args(words))


def test_flags_fill_the_fields():
    assert parse() == Config()
    found = parse("--steps=5", "--kind", "b", "--fast", "--no-exact", "--names", "x", "y", "--second=z")
    assert found == Config(5, "b", True, False, ["x", "y"], None, "z")


def test_scripts_choose_fields_and_defaults():
    assert parse(defaults={"steps": 7}).steps == 7
    with pytest.raises(SystemExit):
        parse("--fast", skip=("fast",))
    with pytest.raises(SystemExit):
        parse("--made=here")
    with pytest.raises(SystemExit):
        parse(required=("steps",))
    with pytest.raises(SystemExit):
        parse(required=("which",))
    assert build(Config, Parser("none").parse_args([]), made="here").made == "here"


@pytest.mark.parametrize("words", [["--steps=0"], ["--kind=c"], ["--first=a", "--second=b"]])
def test_bad_values_exit_with_2(words):
    with pytest.raises(SystemExit) as stop:
        parse(*words)
    assert stop.value.code == 2


def test_a_flag_that_does_not_act_is_refused():
    with pytest.raises(FlagError, match="--no-exact"):
        parse("--no-exact")


def test_a_run_keeps_the_loggers_of_its_caller(tmp_path):
    root = logging.getLogger()
    log_to(tmp_path / "earlier.log")  # replaces the log file of earlier scripts in this process
    before = root.handlers[:-1]
    try:
        for name in ("first", "second"):
            log_to(tmp_path / name / "run.log")
            logging.getLogger("src").warning("line of the %s run", name)
            assert root.handlers[: len(before)] == before
            assert len(root.handlers) == len(before) + 1
        for name in ("first", "second"):
            (line,) = (tmp_path / name / "run.log").read_text().splitlines()
            assert f"line of the {name} run" in line
        (tmp_path / "file").touch()
        with pytest.raises(FileError, match="log_folder"):
            log_to(tmp_path / "file" / "run.log")
    finally:
        for handler in root.handlers[len(before) :]:
            root.removeHandler(handler)
            handler.close()


def test_details_and_library_warnings_go_to_the_log_file(tmp_path):
    script, log = tmp_path / "speak.py", tmp_path / "run.log"
    script.write_text(
        "import logging, warnings\n"
        "from pathlib import Path\n"
        "from src.cli import Parser, log_to, run_script\n"
        "def main():\n"
        "    Parser('test').parse_args()\n"
        f"    log_to(Path({str(log)!r}))\n"
        "    warnings.warn('old interface', DeprecationWarning)\n"
        "    logging.getLogger('src.module').debug('a detail')\n"
        "    logging.getLogger('src.module').info('a fact')\n"
        "run_script(main)\n"
    )
    quiet, verbose = Forked(script).result(), Forked(script, "--verbose").result()
    assert [result.status for result in (quiet, verbose)] == [0, 0]
    assert [line.split(" | ")[-1] for line in quiet.err.splitlines()] == ["a fact"]
    for text in (log.read_text(), verbose.err):
        assert all(found in text for found in ("DeprecationWarning: old interface", "a detail", "a fact"))
