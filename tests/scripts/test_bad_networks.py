"""Networks that are missing, damaged or of other data, when they are to be scored."""

import io
import shutil

import numpy as np
import pytest
import torch
from refusals import FILE, RunsCode, refuse, spoilt
from support import folders, succeed, write_blobs

from src.artifacts import read_checkpoint
from src.datasets import load_dataset

N = 60


def packed(state):
    """The bytes of a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ("--epochs=9",),
            ("no checkpoint of epoch 9, seed 1", "sgd_sched_const, .*sam_sched_const", "train_full.py"),
        ),
        (("--seed=5",), ("no checkpoint of epoch 3, seed 5", "python train_full.py .*--seed=5 --epochs=3")),
        (("--protocol=split",), ("and 17 more", "python train_split.py .*--samis_validation_split_index=1")),
        (("--lr_sched=step",), ("sgd_sched_step", "--lr_sched=step")),
        (("--model=lenet",), ("standard_lenet_over", "--model=lenet")),
        (("--subset=5", "--overwrite"), ("was trained on another subset", "give the same --subset")),
    ],
)
def test_missing_networks(world, flags, says):
    refuse("compute_sam_sgd.py", *world.compute(*flags), status=FILE, says=says, keep=world.base)


def test_networks_of_other_data(world, tmp_path):
    for changes, says in (
        ({"classes": 4}, r"num_classes \(3 there, 4 here\)"),
        ({"size": 10}, r"image_size \(8 there, 10 here\)"),
        ({"y_train": np.roll(np.arange(N) % 3, 1)}, "label_hash"),
    ):
        data = write_blobs(tmp_path / "other.npz", n=N, **changes)
        name = load_dataset(f"npz:{data}", tmp_path)[0].entry.name
        for optimizer in ("sgd", "sam"):
            run = world.run(optimizer)
            shutil.copytree(world.base / "models" / run, tmp_path / "models" / run.replace(world.name, name))
        refuse("compute_sam_sgd.py", f"--dataset=npz:{data}", "--model=small_mlp", "--epochs=3",
               *folders(tmp_path, "datasets", "models", "metrics"), status=FILE, keep=tmp_path,
               says=(r"epoch_3\.pt: was trained on other data", says, "give the data"))  # fmt: skip


def test_damaged_networks(world, tmp_path):
    whole, content = read_checkpoint(world.checkpoint), world.checkpoint.read_bytes()
    proof = tmp_path / "proof"
    nothing = {name: value * float("nan") for name, value in whole["model_state"].items()}
    for bad, says in (
        (content[:2000], "is damaged"),
        (b"", "is damaged"),
        (b"junk", "is damaged"),
        (packed({**whole, "extra": RunsCode(proof)}), "could run code"),
        (packed(whole["model_state"]), "not a checkpoint of this project"),
        (packed({**whole, "model": "nope"}), r"model \(nope there, small_mlp here\)"),
        (packed({**whole, "settings": 5}), "not a checkpoint of this project"),
        (packed({**whole, "normalisation": {}}), "do not fit the network"),
        *(
            (packed({**whole, "normalisation": {"mean": mean, "std": std}}), rf"the {name} of its normalization")
            for name, mean, std in (
                ("mean", [0.5, 0.5], [0.5]),
                ("mean", ["x"], [0.5]),
                ("mean", [float("nan")], [0.5]),
                ("mean", 1, [0.5]),
                ("std", [0.5], [0.0]),
                ("std", [0.5], [None]),
                ("std", [0.5], []),
                ("std", [0.5], torch.ones(1)),
            )
        ),
        *(
            (
                packed({**whole, "model_state": {n: value.to(kind) for n, value in whole["model_state"].items()}}),
                "has type",
            )
            for kind in (torch.int64, torch.complex64, torch.bool)
        ),
        (
            packed({**whole, "model_state": {**whole["model_state"], "head.bias": 3}}),
            "head.bias is not a dense tensor",
        ),
        (packed({**whole, "num_classes": 7}), "trained on other data: num_classes"),
        (packed({**whole, "model_state": nothing}), "losses that are not finite"),
    ):
        with spoilt(world.checkpoint, bad):
            refuse("compute_sam_sgd.py", *world.compute("--overwrite"), status=FILE, keep=world.base,
                   says=(r"epoch_3\.pt: ", says, "anew|again|recreate"))  # fmt: skip
    assert not proof.exists()


def test_results_that_stand_in_the_way(world):
    with spoilt(world.seed_file, b"junk"):
        refuse("compute_sam_sgd.py", *world.compute(), status=FILE, keep=world.base,
               says=(r"score\.npz: .*damaged", "--overwrite"))  # fmt: skip
        succeed("compute_sam_sgd.py", *world.compute("--overwrite"))
    refuse("compute_sam_sgd.py", *world.compute("--precision=fp64"), status=FILE, keep=world.base,
           says=(r"precision \(fp32 there, fp64 here\)", "--overwrite"))  # fmt: skip


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"tr_mem": np.zeros(3)}, ("scores 3 examples, the data set has 60",)),
        ({"other": np.zeros(N)}, ("no array 'tr_mem'", "fetch_scores.py")),
        ({"tr_mem": np.full(N, np.nan)}, ("not one finite number", "fetch_scores.py")),
    ],
)
def test_bad_memorisation_files_are_found_before_the_work(world, tmp_path, arrays, says):
    (tmp_path / "memorization").mkdir()
    np.savez(tmp_path / "memorization" / f"{world.name}_infl_matrix.npz", **arrays)
    refuse("compute_sam_sgd.py", *world.compute(f"--scores_folder={tmp_path}", "--overwrite"), status=FILE,
           says=(r"_infl_matrix\.npz: ", *says), keep=world.base)  # fmt: skip
