"""Command lines: help, the commands of the documentation, the papers' flags, and flags that act."""

import argparse
import re
import shlex

import pytest
from refusals import FLAG, refuse
from support import ROOT, TRAIN, call, folders, succeed, write_blobs

from src.cli import PAPER_FLAGS, Parser
from src.models import MODELS

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
EXAMPLES = [f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.py"))]
DIFFERENCES = (ROOT / "docs" / "differences.md").read_text()


def parsers(script, monkeypatch):
    """The parser of a script, captured when it is about to parse."""
    caught = []

    def catch(self, *_):
        caught.append(self)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", catch)
        call(script)
    return caught[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    done = call(script, "--help")
    assert (done.status, done.err) == (0, "")
    parser = parsers(script, monkeypatch)
    assert [action.dest for action in parser._actions[:2]] == ["help", "verbose"]  # in every script, in no group
    for action in parser._actions[2:]:
        if action.help == argparse.SUPPRESS:  # flags of the paper's scripts that have no effect here
            continue
        assert action.help, action.option_strings
        assert action.container.title not in ("options", "optional arguments"), f"{action.dest} is in no group"
        text = parser._get_formatter()._expand_help(action)
        required = action.required or any(
            group.required and action in group._group_actions for group in parser._mutually_exclusive_groups
        )
        assert required or "default" in text, f"{action.option_strings} does not say its default"
        assert all(flag in done.out for flag in action.option_strings)


LOOPS = {"optimizer": "sgd", "seed": "1", "epochs": "1", "delta": "1", "structure": "kfac", "scores": "kfac"}


def commands():
    """Every command of the README, of docs/ and of the scripts' help texts: script and flags."""
    examples = [ROOT / "examples" / "README.md", *(ROOT / "examples").glob("*.py")]
    paths = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / name for name in SCRIPTS), *examples)
    texts = [path.read_text() for path in paths if path.exists()]
    text = re.sub(r"\\\n\s*", "", "\n".join(texts))
    assigned = dict(re.findall(r'^ *(\w+)="(.*)"$', text, re.MULTILINE))
    for values in (assigned, LOOPS):  # assigned values contain loop variables
        text = re.sub(r"\$\{?(\w+)\}?", lambda found, values=values: values.get(found[1], found[0]), text)
    for script, flags in re.findall(r"(?:python|torchrun\s[^\n`]*?) (\w+\.py) ([^\n`#|]*)", text):
        yield (
            script if (ROOT / script).exists() else f"examples/{script}",
            tuple(shlex.split(flags.replace("...", ""))),
        )


@pytest.mark.parametrize("command", sorted(set(commands())), ids=lambda command: " ".join((command[0], *command[1])))
def test_commands_of_readme_and_help_parse(command, monkeypatch, tmp_path):
    script, flags = command
    for name in re.findall(r"--model=(\w+\.py):", " ".join(flags)):  # the user's file is read
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    parsers(script, monkeypatch).parse_args(flags)


@pytest.mark.parametrize(
    "command",
    [
        "train_full.py --optimizer=sam --rho=0.1 --adaptive --lr_min=0.01 --cutout_holes=1 --cutout_length=4",
        "train_full.py --optimizer=iblr --delta=1 --hess_init=0.1",
        "train_full.py --sync_bn --distributed_training",
        "train_prune.py --coreset_func=min_mem --coreset_pretrain_epochs=40 --coreset_mode=large --per_class=1",
        "compare_pruning.py --funcs random glister el2n min_mem --fractions=0.5 --glister_eta=0.2"
        " --coreset_networks=2 --selection_memory=9 --scores_folder=.",
        "average_scores.py --seeds=1 --modes dyn_unc el2n --window=5 --el2n_epochs 1 2 --optimizer=sgd",
        "compute_hessian_eigen.py --eigen_mode=power_iter --power_iterations=5 --trace_tolerance=0.1",
        "examples/1_loo_iterations.py --optimizer=iblr --hess_init=0.2 --var_version=diag",
    ],
)
def test_flags_that_act_are_accepted(command, monkeypatch):
    script, *flags = command.split()
    parsers(script, monkeypatch).parse_args(flags)


TRAINING = ("train_full.py", "train_split.py", "train_prune.py")
SHARED_PARSER = (*TRAINING, "compute_sam_sgd.py", "compute_hessian_eigen.py", "compute_ntk.py")
OWN = {  # if the flag has a meaning in this project
    "train_prune.py": {"coreset_epochs"},
    "compute_ntk.py": {"lower_index", "m_samples", "ntk_velocity_epoch", "ntk_chosen_metric"},
    "compute_hessian_eigen.py": {"deactivate_bn"},
}
REQUIRED = {"train_prune.py": ("--coreset_func=random",)}


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("blobs") / "blobs.npz", n=30)


@pytest.mark.parametrize("script", SHARED_PARSER)
def test_dead_flags_are_named_once_and_leave_no_trace(script, monkeypatch, capsys):
    dead = PAPER_FLAGS.keys() - OWN.get(script, set())
    parser = parsers(script, monkeypatch)
    plain = parser.parse_args(REQUIRED.get(script, ()))
    assert "WARNING" not in capsys.readouterr().err
    given = [f"--{name}=1" if PAPER_FLAGS[name] else f"--{name}" for name in sorted(dead)]
    assert vars(parser.parse_args([*REQUIRED.get(script, ()), *given])) == vars(plain)
    (line,) = capsys.readouterr().err.splitlines()
    assert "WARNING" in line
    assert all(f"--{name}" in line for name in dead)
    assert not [name for name in dead if f"--{name} " in call(script, "--help").out]


def test_a_run_with_dead_flags_is_the_run_without_them(blobs, tmp_path):
    flags = (f"--dataset=npz:{blobs}", "--model=mlp", "--epochs=1", "--batch_size=10", *folders(tmp_path, *TRAIN))
    first = succeed("train_full.py", *flags, "--wait_start", "--out_folder", "outs", "--coreset_func=full")
    assert len([line for line in first.err.splitlines() if "WARNING" in line]) == 1
    assert "--wait_start --out_folder" in first.err
    succeed("train_full.py", *flags, "--resume")  # the settings are the same


def test_the_function_that_the_papers_scripts_require(blobs, tmp_path):
    flags = (f"--dataset=npz:{blobs}", "--model=mlp", "--epochs=1", "--batch_size=9", *folders(tmp_path, *TRAIN))
    result = succeed("train_split.py", *flags, "--coreset_func=split")
    assert "WARNING" not in result.err


@pytest.mark.parametrize(("model", "agrees"), [("mlp", True), ("resnet8", False)])
def test_batch_normalization_follows_from_the_model(blobs, tmp_path, model, agrees):
    flags = (f"--dataset=npz:{blobs}", f"--model={model}", "--epochs=1")
    succeed("train_full.py", *flags, "--batch_size=10", *folders(tmp_path, *TRAIN))
    measure = ("compute_hessian_eigen.py", *flags, "--top_n=1", "--lanczos_steps=2", "--max_steps=2",
               "--trace_probes=0", "--deactivate_bn", *folders(tmp_path, "models", "hessian"))  # fmt: skip
    if agrees:
        assert "--deactivate_bn: has no effect" in succeed(*measure).err
    else:
        refuse(*measure, status=FLAG, says="--deactivate_bn")


@pytest.fixture(scope="module")
def known_flags():
    flags = set()
    with pytest.MonkeyPatch.context() as patch:
        for script in (*SCRIPTS, *EXAMPLES):
            if script != "fetch_scores.py":
                flags |= parsers(script, patch)._option_string_actions.keys()
    return flags


def test_every_flag_that_it_names_exists(known_flags):
    named = set(re.findall(r"`[^`]*?(--\w+)", DIFFERENCES))
    assert len(named) > 20
    assert named - known_flags == set()


def test_every_table_has_four_columns_and_every_script_exists():
    for line in DIFFERENCES.splitlines():
        if line.startswith("|"):
            assert line.count("|") == 5, line
    for name in re.findall(r"`(\w+\.py)", DIFFERENCES):
        assert (ROOT / name).exists() or (ROOT / "examples" / name).exists(), name


def test_the_networks_whose_start_changed_are_named():
    for name, entry in MODELS.items():
        if entry.settings:
            assert f"`{name}`" in DIFFERENCES
    assert all(f"`--{name}`" in DIFFERENCES for name in ("wait_start", "out_folder", "pivots") if name in PAPER_FLAGS)
    assert "docs/differences.md" in (ROOT / "README.md").read_text()
