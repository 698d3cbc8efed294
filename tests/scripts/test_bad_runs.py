"""Runs that cannot start, go on or be written: one line, and what stood on the disk still stands there."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from refusals import FILE, FLAG, RunsCode, assert_kept, check, on_a_full_disk, refuse, snapshot, spoilt
from support import ROOT, TRAIN, call, folders, succeed, write_blobs

from src.artifacts import read_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("blobs") / "blobs.npz", n=60)


def quick(blobs, base, *flags):
    return (f"--dataset=npz:{blobs}", "--model=small_mlp", "--batch_size=16", "--lr_sched=const",
            "--learning_rate=0.05", "--epochs=3", *flags, *folders(base, *TRAIN))  # fmt: skip


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory):
    """A finished run of three epochs: where it stands. Tests put back what they spoil."""
    base = tmp_path_factory.mktemp("finished")
    succeed("train_full.py", *quick(blobs, base))
    return base


def only(base, pattern):
    (path,) = base.rglob(pattern)
    return path


# ------------------------------------------------------------------------------------------- losses and settings


@pytest.mark.parametrize("optimizer", ["sgd", "sam", "iblr"])
def test_a_loss_that_is_not_finite_stops_with_epoch_and_batch(blobs, tmp_path, optimizer):
    flags = quick(blobs, tmp_path, "--model=mlp", f"--optimizer={optimizer}", "--measure_proxies")
    says = ("loss is not finite", r"epoch 1, batch \d+", "smaller learning rate", r"it is 1e\+30")
    refuse("train_full.py", *flags, "--learning_rate=1e30", status=1, says=says)
    assert not list(tmp_path.rglob("*.pt"))
    succeed("train_full.py", *flags)  # nothing of the broken start stands in the way


def test_a_last_step_that_breaks_the_network_is_not_saved(blobs, tmp_path):
    flags = quick(blobs, tmp_path, "--model=mlp", "--batch_size=60", "--epochs=1", "--learning_rate=1e30")
    says = ("test loss is not finite after epoch 1", "smaller learning rate")
    refuse("train_full.py", *flags, status=1, says=says)
    assert not list(tmp_path.rglob("*.pt"))


def test_other_settings_do_not_replace_results(blobs, finished):
    says = (r"learning_rate \(0\.05 there, 0\.1 here\)", "--overwrite")
    flags = quick(blobs, finished, "--learning_rate=0.1")
    refuse("train_full.py", *flags, status=FILE, says=("was made with different settings", *says), keep=finished)
    says = ("cannot be resumed with different settings", *says)
    refuse("train_full.py", *flags, "--resume", status=FILE, says=says, keep=finished)
    says = ("cannot be resumed", r"epochs \(3 there, 2 here\)")
    flags = quick(blobs, finished, "--epochs=2", "--resume")
    refuse("train_full.py", *flags, status=FILE, says=says, keep=finished)


@pytest.mark.parametrize("content", ["{broken", "[1, 2]", "{}", '{"settings": 3, "history": [1]}'])
def test_damaged_results(blobs, tmp_path, content):
    flags = quick(blobs, tmp_path, "--epochs=1")
    succeed("train_full.py", *flags)
    path = only(tmp_path, "results.json")
    path.write_text(content)
    says = (r"results\.json: ", "damaged", "--overwrite")
    refuse("train_full.py", *flags, status=FILE, says=says, keep=tmp_path)
    succeed("train_full.py", *flags, "--overwrite")
    assert json.loads(path.read_text())["finished"]


# ---------------------------------------------------------------------------------------------------- resume


def saved(tmp_path, state):
    return write_checkpoint(tmp_path / "state.pt", state).read_bytes()


def test_a_bad_state_is_named_and_the_one_before_it_is_used(blobs, finished, tmp_path):
    newest = only(finished, "epoch=3.pth.tar")
    proof = tmp_path / "proof"
    torch.save({"format": "resume-1", "model": RunsCode(proof)}, tmp_path / "evil.pt")
    content = newest.read_bytes()
    whole = read_checkpoint(newest)
    for bad, says in (
        (content[:3000], "truncated"),
        (b"junk", "truncated, or not in torch's format"),
        ((tmp_path / "evil.pt").read_bytes(), "could run code"),
        (saved(tmp_path, {"a": 1}), "not a resume state of this project"),
        (saved(tmp_path, {"format": "resume-1", "epoch": 3}), "not a resume state of this project"),
    ):
        with spoilt(newest, bad):
            done = succeed("train_full.py", *quick(blobs, finished, "--resume"))
            warnings = [line for line in done.err.splitlines() if "| WARNING" in line]
            assert len(warnings) == 1, done.err
            assert str(newest) in warnings[0]
            assert says in warnings[0]
            assert "continuing after epoch 2 of 3" in done.err
            again = read_checkpoint(newest)["model"]
            assert all(torch.equal(again[name], value) for name, value in whole["model"].items())
    assert not proof.exists()


def test_a_state_that_does_not_fit_is_named(blobs, finished, tmp_path):
    newest = only(finished, "epoch=3.pth.tar")
    whole = read_checkpoint(newest)
    steps = whole["optimizer"]
    for changes in (
        {"model": {name: value[:1] for name, value in whole["model"].items()}},
        {"optimizer": {}},
        *(
            {
                "optimizer": {
                    **steps,
                    "state": {i: {n: spoil(v) for n, v in s.items()} for i, s in steps["state"].items()},
                }
            }
            for spoil in (
                lambda v: v[:1],
                lambda v: v.long(),
                lambda v: v.to(torch.complex64),
                lambda v: v.sum(),
                str,
            )
        ),
        {"optimizer": {**steps, "state": {99: steps["state"][0]}}},
        *(
            {"optimizer": {**steps, "param_groups": [{**steps["param_groups"][0], name: value}]}}
            for name, value in (("lr", "a"), ("momentum", "a"), ("params", 3), ("nesterov", None))
        ),
        {"model": {name: value.to(torch.complex64) for name, value in whole["model"].items()}},
        {"model": 3},
        {"history": 7},
        {"history": []},
        {"history": whole["history"][:2]},
        {"history": [*whole["history"][:2], {**whole["history"][2], "test_accuracy": "text"}]},
        {"history": [*whole["history"][:2], {**whole["history"][2], "train_seconds": torch.zeros(2)}]},
        {"history": [*whole["history"][:2], 5]},
    ):
        with spoilt(newest, saved(tmp_path, {**whole, **changes})):
            says = (r"epoch=3\.pth\.tar: does not fit this network and optimiser", "delete it")
            refuse("train_full.py", *quick(blobs, finished, "--resume"), status=FILE, says=says, keep=finished)


@pytest.mark.parametrize("content", ["junk", "other shape"])
def test_damaged_dynamics_make_the_run_start_again(blobs, tmp_path, content):
    flags = quick(blobs, tmp_path, "--measure_proxies", "--resume")
    succeed("train_full.py", *flags)
    path, row = only(tmp_path, "dynamics.npz"), only(tmp_path, "dynamics_epoch=1.npz")
    first = path.read_bytes()
    if content == "junk":
        row.write_text(content)
    else:
        np.savez(row, row=np.zeros(3))
    done = succeed("train_full.py", *flags)
    assert done.err.count(f"{row}: ") == 2, "both states need this row"
    assert "starting from the beginning" in done.err
    assert path.read_bytes() == first


# --------------------------------------------------------------------------------------------- where to write


@pytest.mark.parametrize("name", ["models", "metrics", "log", "resume_ckpts"])
def test_a_folder_that_cannot_be_written_is_found_before_training(blobs, tmp_path, name):
    (tmp_path / name).write_text("a file in place of a folder")
    done = call("train_full.py", *quick(blobs, tmp_path, "--measure_proxies"))
    check(done, "train_full.py", FILE, f"{tmp_path / name}/", "cannot be (written|locked)|could not be written",
          "choose a")  # fmt: skip
    assert "epoch 1/3" not in done.err
    assert (tmp_path / name).read_text() == "a file in place of a folder"


def test_splits_that_cannot_be_written(blobs, tmp_path):
    (tmp_path / "datasets").write_text("")
    says = ("datasets/splits/.*: the validation splits could not be written", "give --splits_folder")
    refuse("train_split.py", *quick(blobs, tmp_path), status=FILE, says=says, keep=tmp_path)


def test_a_disk_that_is_full_from_the_start(blobs, tmp_path):
    done = on_a_full_disk(100, "train_full.py", *quick(blobs, tmp_path))
    check(done, "train_full.py", FILE, r"results\.json: could not be written", "make room or choose another folder")
    assert_kept({}, tmp_path)
    assert not list(tmp_path.rglob("*.pt"))


def test_a_disk_that_fills_while_a_run_goes_on(blobs, finished):
    before = snapshot(finished)
    done = on_a_full_disk(6000, "train_full.py", *quick(blobs, finished, "--epochs=5", "--resume"))
    check(done, "train_full.py", FILE, r"seed_1/\S+: could not be written", "make room")
    assert_kept(before, finished)
    assert "continuing after epoch 3 of 5" in succeed("train_full.py", *quick(blobs, finished, "--resume",
                                                      "--epochs=5")).err  # fmt: skip


# ------------------------------------------------------------------------------------------ several processes


def torchrun(*flags):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
         "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(ROOT / "train_full.py"), *map(str, flags)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    own = done.stderr.split("torch/distributed/elastic")[0]  # what follows is torchrun's own report
    assert "Traceback" not in own, own
    return [line for line in done.stderr.splitlines() if line.startswith("train_full.py: ")], done.stderr


def test_noise_that_processes_cannot_share(blobs, tmp_path):
    lines, report = torchrun(*quick(blobs, tmp_path, "--optimizer=iblr"), "--distributed_training")
    assert lines == ["train_full.py: --optimizer iblr: its noise is not shared; train it in one process"]
    assert f"exitcode  : {FLAG}" in report


def test_a_file_that_only_the_leading_process_reads(blobs, finished):
    before = snapshot(finished)
    flags = quick(blobs, finished, "--learning_rate=0.1")
    lines, _ = torchrun(*flags, "--distributed_training")
    assert sorted("was made with different settings" in line for line in lines) in ([True], [False, True])
    assert all("settings" in line or "another of the processes" in line for line in lines)
    assert_kept(before, finished)
    lines, _ = torchrun(*flags)
    assert lines == [
        "train_full.py: --distributed_training: is missing, though torchrun started 2 processes; give it"
    ]
