"""A run that ends worse than it began says so."""

import json
import math

import pytest
from support import TRAIN, folders, succeed

SMALL = ("--dataset=digits", "--subset=100", "--model=small_mlp")
RUN = (*SMALL, "--batch_size=50", "--lr_sched=const")


def history(base):
    (path,) = base.glob("models/*/seed_1/results.json")
    return json.loads(path.read_text())["history"]


@pytest.mark.parametrize(("rate", "diverges"), [("1e9", True), ("0.05", False)])
def test_a_loss_above_that_of_the_untrained_model_is_named(tmp_path, rate, diverges):
    result = succeed("train_full.py", *RUN, "--epochs=4", f"--learning_rate={rate}", *folders(tmp_path, *TRAIN))
    assert ("WARNING   | training did not lower the loss" in result.err) == diverges
    assert ("training did not lower the loss" in result.out) == diverges
    (log,) = tmp_path.glob("log/*/seed_1.log")
    assert ("training did not lower the loss" in log.read_text()) == diverges
    assert history(tmp_path)[0]["untrained_loss"] == pytest.approx(math.log(10), rel=0.2)


def test_a_resumed_run_remembers_the_untrained_model(tmp_path):
    flags = (*RUN, "--batch_size=100", "--learning_rate=1e9", "--resume", *folders(tmp_path, *TRAIN))
    succeed("train_full.py", *flags, "--epochs=1")
    before = history(tmp_path)[0]["untrained_loss"]
    assert before == history(tmp_path)[0]["train_loss"]  # of the one batch, before its step
    result = succeed("train_full.py", *flags, "--epochs=2")
    assert "training did not lower the loss" in result.out
    assert [record.get("untrained_loss") for record in history(tmp_path)] == [before, None]


def test_experiments_and_pretraining_warn_too(tmp_path):
    more = folders(tmp_path, "datasets", "models", "log", "resume_ckpts", "pickles")
    result = succeed("examples/4_evolving_sensitivities.py", *SMALL, "--epochs=2", "--bs=50", "--lr=100",
                     "--hess_init=0.001", "--delta=1", *more)  # fmt: skip
    assert "training did not lower the loss" in result.err
    result = succeed(
        "select_coreset.py",
        *SMALL,
        "--coreset_func=csl",
        "--coreset_fraction=0.5",
        "--coreset_pretrain_epochs=2",
        "--coreset_pretrain_lr=1e5",
        *folders(tmp_path, *TRAIN),
    )
    assert "training did not lower the loss" in result.err
    assert "smaller learning rate may help" in result.err
