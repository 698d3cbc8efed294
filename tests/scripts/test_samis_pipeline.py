"""The scripts from data to averaged scores, in both protocols, and the scores compared with their definition."""

import json

import numpy as np
import pytest
import torch
from refusals import FILE, refuse
from support import TRAIN, call, folders, succeed, write_blobs

from src.artifacts.io import read_npz, read_pickle
from src.datasets import load_dataset, validation_indices
from src.metrics import Proxy
from src.training import load_model, read_dynamics

QUICK = ("--model=mlp", "--batch_size=32", "--learning_rate=0.05", "--lr_sched=const", "--data_augmentation")


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("blobs") / "blobs.npz")


def train_pair(data, base, *flags, script="train_full.py", seed=1):
    for optimizer in ("sgd", "sam"):
        succeed(
            script, f"--dataset=npz:{data}", *QUICK, f"--optimizer={optimizer}", f"--seed={seed}", *flags,
            *folders(base, *TRAIN),
        )  # fmt: skip


def by_hand(sgd_path, sam_path, train, positions):
    """SAMIS-L and SAMIS-P of some examples, one at a time in float64 NumPy."""
    networks = [load_model(path)[0] for path in (sgd_path, sam_path)]
    norm = load_model(sgd_path)[1]["normalisation"]
    s_l, s_p = [], []
    for i in positions:
        image = train.fetch(torch.tensor([i])).float() / 255
        image = (image - torch.tensor(norm.mean).view(1, -1, 1, 1)) / torch.tensor(norm.std).view(1, -1, 1, 1)
        with torch.no_grad():
            z = [network(image)[0].double().numpy() for network in networks]
        logp = [v - np.log(np.exp(v - v.max()).sum()) - v.max() for v in z]
        y = int(train.labels[i])
        s_l.append(abs(logp[0][y] - logp[1][y]))
        s_p.append(np.abs(np.exp(logp[0]) - np.exp(logp[1])).sum())
    return np.array(s_l), np.array(s_p)


def test_premature_protocol_to_proxy(blobs, tmp_path):
    dataset = f"--dataset=npz:{blobs}"
    for seed in (1, 2):
        train_pair(blobs, tmp_path, "--epochs=3", "--measure_proxies", seed=seed)
        done = succeed(
            "compute_sam_sgd.py", dataset, "--model=mlp", f"--seed={seed}", "--epochs=3",
            *folders(tmp_path, "datasets", "models", "metrics"),
        )  # fmt: skip
        assert "SGD loss" in done.out
        assert "SAMIS-P: mean" in done.out
    train, _ = load_dataset(f"npz:{blobs}", tmp_path)
    name = train.entry.name
    run = "standard_mlp_over_{}_with_{}_sched_const"
    stored = {}
    for seed in (1, 2):
        paths = [tmp_path / "models" / run.format(name, o) / f"seed_{seed}" / "epoch_3.pt" for o in ("sgd", "sam")]
        s_l, s_p = by_hand(*paths, train, range(len(train)))
        for which, expected in (("loss", s_l), ("prob", s_p)):
            arrays = read_npz(tmp_path / "metrics" / name / "mlp" / str(seed) / f"nn_{which}_diff_score.npz")
            np.testing.assert_allclose(arrays["arr_0"], expected, rtol=1e-4, atol=1e-6)
            assert str(arrays["protocol"]) == "full"
            stored.setdefault(which, []).append(arrays["arr_0"])
    succeed("average_scores.py", dataset, "--model=mlp", "--seeds", 1, 2,
            *folders(tmp_path, "datasets", "metrics"))  # fmt: skip
    mean = np.mean(stored["loss"], axis=0)
    scaled = (mean - mean.min()) / (mean.max() - mean.min())
    proxy = Proxy("samis_loss", name, folder=tmp_path / "metrics")
    np.testing.assert_allclose(proxy.scores, scaled, rtol=1e-12)
    plain = read_pickle(tmp_path / "metrics" / "sam_sgd" / f"samis_loss_{name}.pkl")
    assert list(plain) == list(range(len(train)))
    assert all(type(key) is int and type(value) is float for key, value in plain.items())


def test_split_protocol_scores_each_example_by_the_pair_that_never_saw_it(blobs, tmp_path):
    train_pair(blobs, tmp_path, "--epochs=1", "--samis_validation_split_index=all", script="train_split.py")
    again = succeed(
        "train_split.py", f"--dataset=npz:{blobs}", *QUICK, "--optimizer=sgd", "--epochs=1",
        "--samis_validation_split_index=all", *folders(tmp_path, *TRAIN),
    )  # fmt: skip
    assert again.out.count("already done") == 10
    succeed(
        "compute_sam_sgd.py", f"--dataset=npz:{blobs}", "--model=mlp", "--epochs=1",
        *folders(tmp_path, "datasets", "models", "metrics"),
    )  # fmt: skip
    train, _ = load_dataset(f"npz:{blobs}", tmp_path)
    name, labels = train.entry.name, train.labels.numpy()
    arrays = read_npz(tmp_path / "metrics" / name / "mlp" / "1" / "nn_loss_diff_score.npz")
    assert str(arrays["protocol"]) == "split"
    assert not np.isnan(arrays["arr_0"]).any()
    run = "split_mlp_over_{}_with_{}_sched_const_val_split_{}"
    for split in (1, 10):
        held_out = validation_indices(tmp_path / "datasets" / "splits", name, 1, split, labels, 3)
        paths = [tmp_path / "models" / run.format(name, o, split) / "seed_1" / "last.pt" for o in ("sgd", "sam")]
        expected, _ = by_hand(*paths, train, held_out)
        np.testing.assert_allclose(arrays["arr_0"][held_out], expected, rtol=1e-4, atol=1e-6)
    (tmp_path / "datasets" / "splits").rename(tmp_path / "elsewhere")
    (tmp_path / "datasets").rmdir()
    (tmp_path / "datasets").write_text("a folder that cannot be written")
    flags = (f"--dataset=npz:{blobs}", "--model=mlp", "--epochs=1", *folders(tmp_path, "datasets", "models"))
    elsewhere = (f"--metrics_folder={tmp_path / 'more'}", f"--splits_folder={tmp_path / 'elsewhere'}")
    refuse("compute_sam_sgd.py", *flags, status=FILE, says=("could not be written", "splits_folder"))
    succeed("compute_sam_sgd.py", *flags, *elsewhere)
    moved = read_npz(tmp_path / "more" / name / "mlp" / "1" / "nn_loss_diff_score.npz")
    np.testing.assert_array_equal(moved["arr_0"], arrays["arr_0"])


def test_splits_beside_a_datasets_folder_that_cannot_be_written(blobs, tmp_path):
    (tmp_path / "datasets").write_text("")
    flags = (f"--dataset=npz:{blobs}", *QUICK, "--epochs=1", *folders(tmp_path, *TRAIN))
    refuse("train_split.py", *flags, status=FILE, says=("splits could not be written", "splits_folder"))
    succeed("train_split.py", *flags, f"--splits_folder={tmp_path / 'elsewhere'}")
    assert len(list((tmp_path / "elsewhere").glob("*/seed_1/val_*.txt"))) == 10


def test_a_split_run_never_trains_on_its_held_out_examples(blobs, tmp_path):
    succeed(
        "train_split.py", f"--dataset=npz:{blobs}", *QUICK, "--epochs=1", "--samis_validation_split_index=4",
        "--measure_proxies", *folders(tmp_path, *TRAIN),
    )  # fmt: skip
    train, _ = load_dataset(f"npz:{blobs}", tmp_path)
    held_out = validation_indices(tmp_path / "datasets" / "splits", train.entry.name, 1, 4, train.labels.numpy(), 3)
    (path,) = (tmp_path / "metrics").glob("split_*/seed_1/dynamics.npz")
    unseen = np.isnan(read_dynamics(path)["loss"][0])
    assert sorted(np.flatnonzero(unseen)) == sorted(held_out)


def test_a_subset_keeps_original_indices_to_the_end(blobs, tmp_path):
    chosen = [5, 9, 17, 33, 34, 50, 51, 52, 53, 60, 70, 119]
    (tmp_path / "some.txt").write_text("\n".join(map(str, chosen)))
    subset = f"--subset={tmp_path / 'some.txt'}"
    train_pair(blobs, tmp_path, "--epochs=1", subset)
    refused = call("compute_sam_sgd.py", f"--dataset=npz:{blobs}", "--model=mlp", "--epochs=1",
                   *folders(tmp_path, "datasets", "models", "metrics"))  # fmt: skip
    assert refused.status == 1
    assert "was trained on a different subset" in refused.complaint
    succeed("compute_sam_sgd.py", f"--dataset=npz:{blobs}", "--model=mlp", "--epochs=1", subset,
            *folders(tmp_path, "datasets", "models", "metrics"))  # fmt: skip
    succeed("average_scores.py", f"--dataset=npz:{blobs}", "--model=mlp", "--seeds", 1,
            *folders(tmp_path, "datasets", "metrics"))  # fmt: skip
    name = load_dataset(f"npz:{blobs}", tmp_path)[0].entry.name
    assert list(read_pickle(tmp_path / "metrics" / "sam_sgd" / f"samis_prob_{name}.pkl")) == chosen
    assert Proxy("samis_prob", name, folder=tmp_path / "metrics").indices.tolist() == chosen


def test_results_json_tells_settings_and_accuracies(blobs, tmp_path):
    succeed("train_full.py", f"--dataset=npz:{blobs}", *QUICK, "--epochs=8", *folders(tmp_path, *TRAIN))
    (path,) = (tmp_path / "models").glob("*/seed_1/results.json")
    results = json.loads(path.read_text())
    assert results["finished"]
    assert results["settings"]["learning_rate"] == 0.05
    assert [record["epoch"] for record in results["history"]] == list(range(1, 9))
    assert results["history"][-1]["test_accuracy"] > 0.9, "the patterns are easy to learn"


def test_missing_checkpoints_are_named_with_the_command_that_makes_them(blobs, tmp_path):
    flags = (
        f"--dataset=npz:{blobs}",
        "--model=mlp",
        "--epochs=7",
        *folders(tmp_path, "datasets", "models", "metrics"),
    )
    result = call("compute_sam_sgd.py", *flags)
    assert result.status == 1
    assert result.err.count("\n") == result.err.rstrip().count("\n") + 1
    assert "no checkpoint of epoch 7, seed 1 for standard_mlp_over_blobs" in result.complaint
    assert f"python train_full.py '--dataset=npz:{blobs}'" in result.complaint.replace("''", "'") or (
        f"python train_full.py --dataset=npz:{blobs}" in result.complaint
    )
    result = call("compute_sam_sgd.py", *flags, "--protocol=split")
    assert "train_split.py" in result.complaint
    assert "and 17 more" in result.complaint


def test_several_schedules_must_be_told_apart(blobs, tmp_path):
    train_pair(blobs, tmp_path, "--epochs=1")
    train_pair(blobs, tmp_path, "--epochs=1", "--lr_sched=step")
    flags = (
        f"--dataset=npz:{blobs}",
        "--model=mlp",
        "--epochs=1",
        *folders(tmp_path, "datasets", "models", "metrics"),
    )
    refused = call("compute_sam_sgd.py", *flags)
    assert refused.status == 2
    assert "--lr_sched" in refused.complaint
    succeed("compute_sam_sgd.py", *flags, "--lr_sched=step")
    refused = call("compute_sam_sgd.py", *flags, "--lr_sched=const")
    assert refused.status == 1
    assert "lr_sched (step vs. const)" in refused.complaint
    succeed("compute_sam_sgd.py", *flags, "--lr_sched=const", "--overwrite")


def test_the_fast_recipe_sets_defaults_that_flags_override(tmp_path):
    flags = ("train_full.py", "--recipe=fast", "--dataset=digits", "--subset=60", "--epochs=1", "--measure_proxies",
             "--end_scores", "end_loss", "--save_epochs=last", *folders(tmp_path, *TRAIN))  # fmt: skip
    succeed(*flags, "--learning_rate=0.1")
    (results,) = (tmp_path / "models").glob(
        "standard_fastnet_over_digits_with_sgd_sched_onecycle/seed_1/results.json"
    )
    settings = json.loads(results.read_text())["settings"]
    expected = {"model": "fastnet", "batch_size": 256, "learning_rate": 0.1, "nesterov": True, "weight_decay": 5e-4,
                "data_augmentation": True, "alternate_flips": True, "epochs": 1}  # fmt: skip
    assert {name: settings[name] for name in expected} == expected
    assert call(*flags, "--optimizer=adam").status == 2
    assert call("train_full.py", "--recipe=slow").status == 2
    assert call("train_full.py", "--dataset=digits", "--data_augmentation", "--alternate_flips").status == 2
    written = {path.name for path in (tmp_path / "metrics").rglob("*_train.pkl")}
    assert written == {"end_loss_train.pkl", "forgettability_train.pkl", "epochs_to_learn_train.pkl"}
