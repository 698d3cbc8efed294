"""Flags of the SAMIS paper's scripts that mean nothing here are accepted, with one warning that names them."""

import pytest
from refusals import FLAG, refuse
from support import TRAIN, call, folders, succeed, write_blobs
from test_bad_flags import parsers

from src.cli import PAPER_FLAGS

TRAINING = ("train_full.py", "train_split.py", "train_prune.py")
SHARED_PARSER = (*TRAINING, "compute_sam_sgd.py", "compute_hessian_eigen.py", "compute_ntk.py")
OWN = {  # where this project gives such a flag a meaning
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
    for script, value in (("train_split.py", "full"), ("train_full.py", "split"), ("train_full.py", "craig")):
        refuse(script, *flags, f"--coreset_func={value}", status=FLAG, says=("--coreset_func", "train_prune.py"))


@pytest.mark.parametrize(("model", "agrees"), [("mlp", True), ("resnet8", False)])
def test_batch_normalization_follows_from_the_model(blobs, tmp_path, model, agrees):
    flags = (f"--dataset=npz:{blobs}", f"--model={model}", "--epochs=1")
    succeed("train_full.py", *flags, "--batch_size=10", *folders(tmp_path, *TRAIN))
    measure = ("compute_hessian_eigen.py", *flags, "--top_n=1", "--lanczos_steps=2", "--max_steps=2",
               "--trace_probes=0", "--deactivate_bn", *folders(tmp_path, "models", "hessian"))  # fmt: skip
    if agrees:
        assert "nobn follows" in succeed(*measure).err
    else:
        refuse(*measure, status=FLAG, says=("--deactivate_bn", "BatchNorm"))


def test_dead_flags_are_not_suggested():
    refuse("train_full.py", "--pivot=3", status=FLAG, says=("--pivot=3: unknown; see",))
