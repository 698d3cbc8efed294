"""Parts of script 3's retraining, trained separately and joined, equal one run; parts that do not fit are refused."""

import json

import pytest
from mpe_runs import VALIDATION, refuse, result, retraining, run, same
from mpe_runs import flags as flags_of
from refusals import FILE, FLAG
from support import succeed

import mpe.retraining

PARTS = ("0-1", "4-4", "2-3")  # of models 0 to 4, which one run trains in chunks of 2


def part(base, which):
    return succeed(VALIDATION, *flags_of(VALIDATION, base, f"--retrain_part={which}", "--resume"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    base = tmp_path_factory.mktemp("parts")
    following = part(base, "none").out.splitlines()[-1]
    assert following.startswith("next: ")
    assert "--retrain_part=0-4" in following
    assert "--resume" in following
    before = sorted(path for path in base.rglob("*") if "ckpts" in str(path))
    for which in PARTS:
        part(base, which)
    # parts only read the base model, and do not write the joint result
    after = sorted(path for path in base.rglob("*") if "ckpts" in str(path))
    assert all("retraining" in str(path) for path in set(after) - set(before))
    assert not (base / "pickles" / "t_retrain.pkl").exists()
    return base


def test_joined_parts_equal_one_run(parts, tmp_path, monkeypatch):
    alone = run(VALIDATION, tmp_path)
    monkeypatch.setattr(mpe.retraining, "one_epoch", None)  # joining trains nothing
    joined = run(VALIDATION, parts, "--resume")
    same(alone, joined)
    same(result(VALIDATION, tmp_path, "scores"), result(VALIDATION, parts, "scores"))


def test_parts_with_other_settings_are_refused(parts):
    path = retraining(parts) / "part_2_4" / "settings.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "learning_rate": 0.5}))
    refuse(FILE, VALIDATION, parts, "--resume", says=["part_2_4", "learning_rate", "0.5"])
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (("--retrain_part=0-1", "--resume"), FILE, ["last.pt", "base model"]),
        (("--retrain_part=0-1",), FLAG, ["--retrain_part", "--resume"]),
        (("--retrain_part=3-5", "--resume"), FLAG, ["--retrain_part 3-5", "0 to 4"]),
        (("--retrain_part=3",), FLAG, ["--retrain_part", "0-49"]),
    ],
)
def test_refusals(tmp_path, more, status, says):
    refuse(status, VALIDATION, tmp_path, *more, says=says)
