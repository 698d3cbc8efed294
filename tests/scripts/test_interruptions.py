"""Runs that are killed or interrupted."""

import shutil
import signal
import time

import numpy as np
import pytest
import torch
from refusals import FILE, refuse
from support import TRAIN, Forked, folders, succeed, write_blobs

from src.artifacts.io import read_checkpoint, read_npz, read_pickle

FLAGS = ("--model=resnet8", "--epochs=6", "--batch_size=16", "--learning_rate=0.05", "--lr_sched=cosine",
         "--data_augmentation", "--measure_proxies", "--optimizer=sam")  # fmt: skip


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("blobs") / "blobs.npz", n=160)


def wait_for(path, process, seconds=240):
    for _ in range(seconds * 50):
        if path.exists() or process.poll() is not None:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not appear")


def only(base, pattern):
    (path,) = base.glob(pattern)
    return path


def test_killed_anywhere_and_resumed_gives_the_same_bits(blobs, tmp_path):
    flags = (f"--dataset=npz:{blobs}", *FLAGS, "--resume")
    whole, killed = (folders(tmp_path / name, *TRAIN) for name in ("whole", "killed"))
    process = Forked("train_full.py", *flags, *whole)  # in a separate process, like the killed runs
    assert process.communicate(timeout=400)[0]
    for epoch in (1, 3):
        process = Forked("train_full.py", *flags, *killed)
        name = only(tmp_path / "whole" / "resume_ckpts", "*").name
        wait_for(tmp_path / "killed" / "resume_ckpts" / name / "seed_1" / f"epoch={epoch}.pth.tar", process)
        time.sleep(0.1)
        process.kill()
        process.communicate()
    process = Forked("train_full.py", *flags, *killed)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    states = [read_checkpoint(only(tmp_path / n / "models", "*/seed_1/last.pt"))["model_state"]
              for n in ("whole", "killed")]  # fmt: skip
    for key in states[0]:
        assert torch.equal(states[0][key], states[1][key]), key
    metrics = [only(tmp_path / n / "metrics", "*/seed_1") for n in ("whole", "killed")]
    first, second = (read_npz(folder / "dynamics.npz") for folder in metrics)
    for key in first:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)
    for file in ("forgettability_train.pkl", "epochs_to_learn_train.pkl", "hessian_flat_train.pkl",
                 "epsilon_flat_train.pkl"):  # fmt: skip
        values = [np.array(list(read_pickle(folder / file).values())) for folder in metrics]
        np.testing.assert_array_equal(*values, err_msg=file)


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_in_one_line_and_loses_nothing(blobs, tmp_path, sign, status):
    flags = (f"--dataset=npz:{blobs}", *FLAGS, "--epochs=2000", "--lr_sched=const", "--save_epochs=last",
             *folders(tmp_path, *TRAIN))  # fmt: skip
    process = Forked("train_full.py", *flags)
    folder = tmp_path / "resume_ckpts" / f"standard_resnet8_over_{_name(blobs)}_with_sam_sched_const" / "seed_1"
    wait_for(folder / "epoch=2.pth.tar", process)
    process.send_signal(sign)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in err
    if sign == signal.SIGINT:
        assert err.strip().splitlines()[-1].startswith("train_full.py: interrupted;")
    states = sorted(folder.glob("epoch=*"))
    assert states
    for path in states:
        read_checkpoint(path)
    assert not list(tmp_path.rglob("*.part"))


def _name(path):
    from src.datasets import load_dataset

    return load_dataset(f"npz:{path}", path.parent)[0].entry.name


def test_scripts_work_from_any_folder(blobs, tmp_path):
    away = tmp_path / "elsewhere"
    away.mkdir()
    process = Forked(
        "train_full.py", f"--dataset=npz:{blobs}", "--model=mlp", "--epochs=1",
        *[f"--{name}_folder=mine/{name}" for name in TRAIN], cwd=away,
    )  # fmt: skip
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert list(away.glob("mine/models/*/seed_1/last.pt"))


def test_two_processes_at_once_make_the_splits_once(blobs, tmp_path):
    flags = (f"--dataset=npz:{blobs}", "--model=mlp", "--epochs=1", *folders(tmp_path, *TRAIN))
    processes = [Forked("train_split.py", *flags, f"--samis_validation_split_index={i}") for i in (1, 2)]
    for process in processes:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    found = sorted(path.name for path in (tmp_path / "datasets" / "splits").rglob("*") if path.is_file())
    assert found == sorted(f"val_{i}.txt" for i in range(1, 11))
    assert succeed("train_split.py", *flags, "--samis_validation_split_index=3").status == 0


def test_a_second_process_may_not_train_the_same_run(blobs, tmp_path):
    flags = (f"--dataset=npz:{blobs}", *FLAGS, "--lr_sched=const", *folders(tmp_path, *TRAIN))
    process = Forked("train_full.py", *flags, "--epochs=2000", "--save_epochs=last")
    folder = f"standard_resnet8_over_{_name(blobs)}_with_sam_sched_const/seed_1"
    wait_for(tmp_path / "resume_ckpts" / folder / "epoch=1.pth.tar", process)
    refuse("train_full.py", *flags, "--learning_rate=0.1", "--overwrite", status=FILE,
           says=(f"{folder}: another process is training this run", "wait for it"))  # fmt: skip
    process.kill()
    process.communicate()
    assert succeed("train_full.py", *flags, "--learning_rate=0.1", "--overwrite", "--epochs=1").status == 0


def test_resuming_removes_states_that_a_kill_left(blobs, tmp_path):
    flags = (f"--dataset=npz:{blobs}", "--model=mlp", "--epochs=4", "--batch_size=64", "--lr_sched=const",
             "--learning_rate=0.01", "--resume", *folders(tmp_path, *TRAIN))  # fmt: skip
    succeed("train_full.py", *flags)
    state = only(tmp_path, "resume_ckpts/*/seed_1/epoch=4.pth.tar")
    shutil.copy(state, state.with_name("epoch=2.pth.tar"))
    succeed("train_full.py", *flags)
    kept = [name % epoch for name in ("epoch=%d.pth.tar", "weights_epoch=%d.pt") for epoch in (3, 4)]
    assert sorted(path.name for path in state.parent.iterdir()) == kept
